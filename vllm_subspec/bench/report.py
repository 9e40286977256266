# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""A result as one HTML page that needs nothing else: styles and plots are in it."""

from importlib import resources
from typing import Any

import jinja2

from vllm_subspec.bench import plots
from vllm_subspec.bench.scenario import OFF


def render(result: dict[str, Any]) -> str:
    """The page.

    Args:
        result: of `measure`, with its "environment".
    """
    template = resources.files(__package__).joinpath("report.html").read_text("utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    standard = result["cells"][0]
    return environment.from_string(template).render(
        result=result,
        standard=standard,
        title=_title(result),
        setting=_setting,
        off=OFF,
        gib=1 << 30,
        speeds=plots.speeds(standard),
        rounds={
            "Tokens of a round": plots.emitted(standard),
            "Acceptance by depth": plots.by_depth(standard),
            "Acceptance by draft probability": plots.by_confidence(standard),
        },
        timelines={
            name: plots.timeline(way)
            for name, way in standard["ways"].items()
            if way["timeline"]["records"]
        },
        sweeps={
            axis: plots.sweep(cells, axis)
            for axis in ("batch", "depth", "bits", "temperature")
            if len(cells := _along(result["cells"], axis)) > 1
        },
        memories=[(e, plots.memory(e)) for e in result["engines"] if e["plan"] is not None],
    )


def _title(result: dict[str, Any]) -> str:
    name = str(result["scenario"]["model"]).rstrip("/").rsplit("/", 1)[-1]
    return f"{name}: ways of drafting"


def _setting(cell: dict[str, Any]) -> str:
    told = {
        "bits": cell["bits"],
        "batch": cell["batch"],
        "temperature": cell["temperature"],
        "depth": cell["depth"],
    }
    return ", ".join(f"{name} {value:g}" for name, value in told.items() if value is not None)


def _along(cells: list[dict[str, Any]], axis: str) -> list[dict[str, Any]]:
    """The cells that differ from the first one along ``axis`` alone, and that one."""
    others = [key for key in ("bits", "batch", "temperature", "depth") if key != axis]
    same = [c for c in cells if all(c[key] == cells[0][key] for key in others)]
    return [cell for cell in same if cell[axis] is not None]
