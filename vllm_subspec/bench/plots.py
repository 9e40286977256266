# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Plots of a result (`measure`), each as the text of an SVG."""

import io
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vllm_subspec.bench.scenario import OFF
from vllm_subspec.core.round_log import CONFIDENCE_EDGES

GIB = 1 << 30
_COLOURS = {
    OFF: "#8a8f98",
    "chain": "#3b7dd8",
    "tree": "#2a9d6f",
    "union": "#d9722e",
    "full chain": "#9ec1f0",
    "full tree": "#9fd8c0",
    "hierspec": "#d9722e",
}
_LANES = {"read weights": "#8a8f98", "draft": "#3b7dd8", "verify": "#2a9d6f", "stalled": "#c8453b"}
_FEWEST = 5  # tokens behind a plotted rate


def speeds(cell: dict[str, Any]) -> str:
    """Tokens/s of each way, and its two bounds."""

    def draw(axes: Axes) -> None:
        ways = cell["ways"]
        places = np.arange(len(ways))[::-1]
        values = [way["tokens_per_second"] for way in ways.values()]
        axes.barh(places, values, color=[_COLOURS[name] for name in ways], height=0.6)
        for key, marker, size, title in (
            ("serial_bound", "|", 22, "bound, nothing overlapped"),
            ("overlapped_bound", "D", 5, "bound, all overlapped"),
        ):
            pairs = zip(ways.values(), places, strict=True)
            if known := [(way[key], y) for way, y in pairs if key in way]:
                across, up = zip(*known, strict=True)
                axes.plot(across, up, marker, color="#222", label=title, markersize=size)
        for value, y in zip(values, places, strict=True):
            axes.annotate(f" {value:.2f}", (value, y), va="center", fontsize=9)
        axes.set_yticks(places, list(ways))
        axes.set_xlabel("tokens/s")
        _legend(axes, loc="upper right")

    return _svg(draw, height=0.9 + 0.5 * len(cell["ways"]))


def emitted(cell: dict[str, Any]) -> str:
    """How many tokens the rounds emitted."""

    def draw(axes: Axes) -> None:
        longest = 1
        for name, way in _drafting(cell):
            counts = np.array(way["log"]["emitted"])
            longest = max(longest, int(np.flatnonzero(counts).max(initial=1)))
            share = counts / counts.sum()
            label = f"{name}, mean {way['tau']:.1f}"
            axes.stairs(share, np.arange(counts.size + 1) - 0.5, color=_COLOURS[name], label=label)
        axes.set_xlim(0.5, longest + 0.5)
        axes.set_xlabel("tokens of a round (tau)")
        axes.set_ylabel("share of rounds")
        _legend(axes)

    return _svg(draw)


def by_depth(cell: dict[str, Any]) -> str:
    """How often a token was accepted whose ancestors were."""

    def draw(axes: Axes) -> None:
        for name, way in _drafting(cell):
            depths, rates = _rates(way["log"]["by_depth"])
            axes.plot(depths, rates, ".-", color=_COLOURS[name], label=name)
        axes.set_xlabel("depth in the draft")
        axes.set_ylabel("accepted")
        axes.set_ylim(0, 1.03)
        _legend(axes)

    return _svg(draw)


def by_confidence(cell: dict[str, Any]) -> str:
    """How often a token was accepted, by how sure the draft was of it."""

    def draw(axes: Axes) -> None:
        middles = (CONFIDENCE_EDGES[1:] + CONFIDENCE_EDGES[:-1]) / 2
        axes.plot([0, 1], [0, 1], ":", color="#8a8f98", label="as sure as right")
        for name, way in _drafting(cell):
            places, rates = _rates(way["log"]["by_confidence"])
            axes.plot(middles[places], rates, ".-", color=_COLOURS[name], label=name)
        axes.set_xlabel("probability that the draft gave the token (sharpened)")
        axes.set_ylabel("accepted")
        axes.set_ylim(0, 1.03)
        _legend(axes)

    return _svg(draw)


def timeline(way: dict[str, Any]) -> str:
    """Rounds as they went: when weights were read, tokens drafted, drafts verified."""

    def draw(axes: Axes) -> None:
        lines = way["timeline"]
        spans = {
            "read weights": [(one["began"], one["ended"]) for one in lines["loads"]],
            "draft": [(r["draft_began"], r["draft_ended"]) for r in lines["records"]],
            "verify": [(r["verify_began"], r["verify_ended"]) for r in lines["records"]],
            "stalled": [(one["began"], one["ended"]) for one in lines["waits"]],
        }
        for lane, (name, known) in enumerate(reversed(spans.items())):
            bars = [(begin, end - begin) for begin, end in known]
            axes.broken_barh(bars, (lane - 0.35, 0.7), color=_LANES[name], ec="white", lw=0.3)
        for record in lines["records"]:
            text = f"{record['emitted']} tokens"
            axes.annotate(text, (record["verify_ended"], 3.45), ha="right", fontsize=8)
        axes.set_yticks(range(len(spans)), list(reversed(spans)))
        axes.set_ylim(-0.5, 3.8)
        axes.set_xlim(0, max(r["verify_ended"] for r in lines["records"]))
        axes.set_xlabel("seconds")

    return _svg(draw, width=9.0, height=2.4)


def memory(engine: dict[str, Any]) -> str:
    """Where the planned bytes go, and the peak."""

    def draw(axes: Axes) -> None:
        plan = engine["plan"]
        parts = ("resident", "substitute", "ring", "other", "kv", "workspace", "drafter")
        left = 0.0
        for number, part in enumerate(parts):
            size = plan.get(f"{part}_bytes", 0) / GIB
            if part == "drafter" and not size:
                continue
            colour = f"C{number}"
            axes.barh(1, size, left=left, color=colour, label=f"{part} {size:.2f}", height=0.6)
            left += size
        axes.barh(0, engine["peak_bytes"] / GIB, color="#8a8f98", height=0.6)
        axes.set_yticks([1, 0], ["planned", "peak"])
        axes.set_xlabel("GiB")
        axes.legend(fontsize=8, frameon=False, ncols=6, loc="lower left", bbox_to_anchor=(0, 1))

    return _svg(draw, width=9.0, height=1.9)


def sweep(cells: list[dict[str, Any]], axis: str) -> str:
    """Tokens/s of each way along ``axis``, a key of a cell."""

    def draw(axes: Axes) -> None:
        chosen = sorted(cells, key=lambda cell: cell[axis])
        for name in cells[0]["ways"]:
            values = [cell["ways"][name]["tokens_per_second"] for cell in chosen]
            at = [cell[axis] for cell in chosen]
            axes.plot(at, values, ".-", color=_COLOURS[name], label=name)
        axes.set_xlabel(
            {"bits": "bits of a substitute", "batch": "requests at once"}.get(axis, axis)
        )
        axes.set_xticks(sorted({cell[axis] for cell in cells}))
        axes.set_ylabel("tokens/s")
        axes.set_ylim(bottom=0)
        _legend(axes)

    return _svg(draw)


def _drafting(cell: dict[str, Any]) -> Iterable[tuple[str, dict[str, Any]]]:
    return ((n, way) for n, way in cell["ways"].items() if way["log"]["totals"]["rounds"])


def _rates(counts: dict[str, list[int]]) -> tuple[np.ndarray, np.ndarray]:
    tested, accepted = np.array(counts["tested"]), np.array(counts["accepted"])
    places = np.flatnonzero(tested >= _FEWEST)
    return places, accepted[places] / tested[places]


def _legend(axes: Axes, **where: Any) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=False, **where)


def _svg(draw: Callable[[Axes], None], width: float = 5.2, height: float = 3.0) -> str:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    draw(axes)
    axes.spines[["top", "right"]].set_visible(False)
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    # Within a page an XML declaration has no place.
    return re.sub(r"^.*?(?=<svg)", "", out.getvalue(), flags=re.DOTALL)
