# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Write the README's measured figures from benchmarks/results/*.json.

    python scripts/figures.py [--check]

The section between the two marks is replaced; with --check nothing is written, and the exit status
is 1 where README and results disagree.
"""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
BEGIN, END = "<!-- figures: scripts/figures.py -->\n", "<!-- end of figures -->\n"
WAYS = {
    "no speculation": "no speculation",
    "vLLM ngram": "vLLM `ngram`",
    "vLLM draft_model": "vLLM `draft_model`",
    "tree, fixed": "tree on the target, 24 nodes (EAGLE-2's design)",
    "tree": "tree on the target, pruned",
    "hierspec eagle, fixed": "`hierspec`, EAGLE head, published settings",
    "hierspec eagle": "`hierspec`, EAGLE head",
    "hierspec ngram": "`hierspec`, lookups",
}


def load(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def speed(way: dict[str, Any]) -> float:
    return float(way["tokens_per_second"])


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def streamed(results: dict[str, Any]) -> str:
    """The substitute's own trees and chains (trees.json)."""
    rows = []
    for result in results["results"]:
        greedy = result["greedy"]
        plain = speed(greedy["plain"])
        for name in ("chain", "tree"):
            way = greedy[name]
            bounds = f"{way['serial_bound']:.1f} / {way['overlapped_bound']:.1f}"
            rows.append(
                [
                    result["dtype"],
                    str(result["bits"]),
                    name,
                    f"{plain:.2f}",
                    f"{speed(way):.1f}",
                    f"**{speed(way) / plain:.1f}x**",
                    f"{way['tau']:.1f}",
                    bounds,
                ]
            )
    first = results["results"][0]
    equal, warm, batch = first["equal depth"], first["temperature 0.6"], first["batch of 4"]
    tau = [equal[name]["tau"] for name in ("tree", "chain")]
    beam = speed(warm["tree"]) / speed(warm["fixed beam"])
    chain, tree = (speed(batch[n]) / speed(batch["plain"]) for n in ("chain", "tree"))
    head = ["model", "substitute bits", "draft", "no speculation, tokens/s", "SubSpec, tokens/s"]
    return f"""\
{table([*head, "speed-up", "tokens per round", "bounds, tokens/s"], rows)}

Bounds: tokens per round over streaming plus drafting time / over the longer of the two. With
{first["dtype"]} and {first["bits"]} bits:

- At equal depth (48, nothing pruned) a tree yields {tau[0]:.1f} tokens per round, a chain \
{tau[1]:.1f}: {tau[0] / tau[1]:.2f} times.
- At temperature 0.6 the pruned tree is {beam:.1f} times as fast as a fixed beam of 6 x 48, and a
  chain as fast as the tree ({speed(warm["chain"]):.1f} and {speed(warm["tree"]):.1f} tokens/s).
- A batch of 4: {speed(batch["plain"]):.2f} tokens/s without speculation, \
{speed(batch["chain"]):.1f} with chains ({chain:.1f}x), {speed(batch["tree"]):.1f} with trees \
({tree:.1f}x):
  without bfloat16 units, verifying four trees takes longer than streaming the weights.
- Drafting outside the draft's own forwards takes \
{100 * first["greedy"]["tree"]["overhead_share"]:.1f}% of a round."""


def union(results: dict[str, Any]) -> str:
    rows = []
    for temperature, ways in results["union"]["default"].items():
        speeds = [f"{speed(ways[name]):.1f}" for name in ("hierarchy", "tree", "chain")]
        gain = speed(ways["hierarchy"]) / speed(ways["tree"])
        rows.append([temperature, *speeds, f"{gain:.2f}x"])
    head = ["temperature", "lookups, verified by the substitute", "trees", "chains"]
    return table([*head, "lookups over trees"], rows)


def hierarchies(results: dict[str, Any]) -> str:
    ways = results["hierspec"]["ways"]
    rows = [
        [title, f"{speed(ways[name]):.1f}", f"{ways[name]['tau']:.1f}"]
        for name, title in WAYS.items()
    ]
    ratios = {
        name: {n: seconds[n] / seconds["1"] for n in ("8", "24")}
        for name, seconds in results["hierspec"]["pass_seconds"].items()
    }
    low, twin = ratios["w4a16"], ratios["bfloat16"]
    return f"""\
{table(["way", "tokens/s", "tokens per round"], rows)}

A pass of this target over 24 tokens takes {low["24"]:.1f} times as long as one over a single
token, over 8 tokens {low["8"]:.1f} times. Unlike on a GPU its bfloat16 twin is worse \
({twin["24"]:.1f} and {twin["8"]:.1f}),
as this CPU multiplies bfloat16 slowly."""


def render() -> str:
    """The section, marks included."""
    trees, hierarchy = load("trees"), load("hierarchy")
    return f"""\
{BEGIN}
{streamed(trees)}

![Speed-up and tokens per round by depth](benchmarks/results/trees.svg)

These are the substitute's own trees and chains (`"drafter": null`). The default, lookups that it
verifies, beside them in a fresh engine, 128 tokens per prompt, tokens/s:

{union(hierarchy)}

**A 4-bit target** (0.5 GiB model in W4A16, `pystd-1m` as the small model, greedy, one request, 4
prompts x 128 tokens; one engine for each way, taking turns):

{hierarchies(hierarchy)}

![Methods beside each other, and what a pass costs](benchmarks/results/hierarchy.svg)

{END}"""


def updated(readme: str) -> str:
    """The README with the section that the results ask for."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return before + render() + after


def main() -> int:
    current = README.read_text()
    wanted = updated(current)
    if sys.argv[1:] == ["--check"]:
        if current != wanted:
            print("README.md and benchmarks/results disagree: run scripts/figures.py")
        return int(current != wanted)
    README.write_text(wanted)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
