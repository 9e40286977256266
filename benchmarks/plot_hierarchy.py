# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Draw benchmarks/results/hierarchy.json: methods beside each other, and what a pass costs.

python -m benchmarks.plot_hierarchy [hierarchy.json] [hierarchy.svg]
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

RESULTS = Path(__file__).resolve().parent / "results"


def bars(axes: Axes, ways: dict[str, dict[str, Any]], title: str) -> None:
    names = list(ways)
    speeds = [ways[name]["tokens_per_second"] for name in names]
    colours = ["tab:green" if "hier" in name else "tab:blue" for name in names]
    labels = [f"{name} ({ways[name]['tau']:.1f})" for name in names]
    axes.barh(labels, speeds, color=colours)
    axes.bar_label(axes.containers[0], fmt="%.1f")  # type: ignore[arg-type]
    axes.invert_yaxis()
    axes.set(title=title, xlabel="tokens/s (tokens per round)", xlim=(0, 1.15 * max(speeds)))


def draw(results: dict[str, Any], out: Path) -> None:
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    ways, cost = figure.subplots(1, 2)
    bars(ways, results["ways"], "4-bit target")
    for name, seconds in results["pass_seconds"].items():
        tokens = [int(n) for n in seconds]
        relative = [value / seconds["1"] for value in seconds.values()]
        cost.plot(tokens, relative, marker="o", label=name)
    cost.set(title="A pass over n tokens, by one over 1", xlabel="n")
    cost.set_ylim(bottom=0)
    cost.grid(alpha=0.3)
    cost.legend(fontsize=8)
    with matplotlib.rc_context({"svg.hashsalt": "hierarchy"}):  # the same figures, the same file
        figure.savefig(out, format="svg", metadata={"Date": None})


def main() -> int:
    given = [Path(argument) for argument in sys.argv[1:]]
    defaults = RESULTS / "hierarchy.json", RESULTS / "hierarchy.svg"
    source, out = [*given, *defaults[len(given) :]]
    draw(json.loads(source.read_text()), out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
