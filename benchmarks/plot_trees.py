# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Draw benchmarks/results/trees.json: speed-up and tokens per round by depth, trees and chains.

python -m benchmarks.plot_trees [trees.json] [trees.svg]
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

RESULTS = Path(__file__).resolve().parent / "results"
WAYS = {"tree": ("tab:green", "o"), "chain": ("tab:blue", "s")}


def draw(results: dict[str, Any], out: Path) -> None:
    first = results["results"][0]
    plain = first["greedy"]["plain"]["tokens_per_second"]
    depths = [int(depth) for depth in first["depths"]]
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    speed, tau, ways = figure.subplots(1, 3)
    for name, (colour, marker) in WAYS.items():
        rows = [first["depths"][str(depth)][name] for depth in depths]
        style = {"color": colour, "marker": marker, "label": name}
        speed.plot(depths, [row["tokens_per_second"] / plain for row in rows], **style)
        bound = [row["serial_bound"] / plain for row in rows]
        speed.plot(depths, bound, color=colour, linestyle=":", label=f"{name}, bound, no overlap")
        tau.plot(depths, [row["tau"] for row in rows], **style)
    speed.set(title="Speed-up over streaming alone", xlabel="depth limit", xticks=depths)
    tau.set(title="Tokens per round (tau)", xlabel="depth limit", xticks=depths)
    labels, bars = [], []
    for result in results["results"]:
        greedy = result["greedy"]
        for name in WAYS:
            labels.append(f"{result['dtype']}, {result['bits']} bits, {name}")
            bars.append(greedy[name]["tokens_per_second"] / greedy["plain"]["tokens_per_second"])
    ways.barh(labels, bars, color=[WAYS[label.rsplit(", ", 1)[1]][0] for label in labels])
    ways.bar_label(ways.containers[0], fmt="%.1fx")
    ways.invert_yaxis()
    ways.set(title="Speed-up, depth limit 48", xlim=(0, 1.15 * max(bars)))
    for axes in (speed, tau):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.suptitle(
        f"{first['model_gib']} GiB model streamed from disk; depths: {first['dtype']}, "
        f"{first['bits']}-bit substitutes, greedy, one request",
        fontsize=9,
    )
    with matplotlib.rc_context({"svg.hashsalt": "trees"}):  # the same figures, the same file
        figure.savefig(out, format="svg", metadata={"Date": None})


def main() -> int:
    given = [Path(argument) for argument in sys.argv[1:]]
    source, out = [*given, *(RESULTS / "trees.json", RESULTS / "trees.svg")[len(given) :]]
    draw(json.loads(source.read_text()), out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
