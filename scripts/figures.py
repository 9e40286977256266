# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Write the README's measured figures from benchmarks/results/*.json.

    python scripts/figures.py [--check]

The section between the two marks is replaced; with --check nothing is written, and the exit status
is 1 where README and results disagree.
"""

import json
import statistics
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
    """Ways of drafting beside each other and beside none (streamed.json)."""
    ways = [name for name in results["scenario"]["ways"] if name != "off"]
    rows = []
    for cell in results["cells"]:
        plain = speed(cell["ways"]["off"])
        drafted = [cell["ways"][name] for name in ways]
        best = max(drafted, key=speed)
        shown = [f"{speed(way):.1f} ({way['speedup']:.1f}x)" for way in drafted]
        shown[drafted.index(best)] = f"**{shown[drafted.index(best)]}**"
        rows.append(
            [
                *(f"{cell[key]:g}" for key in ("bits", "batch", "temperature", "depth")),
                f"{plain:.2f}",
                *shown,
                f"{best['tau']:.1f}",
                f"{best['serial_bound']:.1f} / {best['overlapped_bound']:.1f}",
            ]
        )
    settings = ["bits", "batch", "temperature", "depth"]
    last = ["tokens per round", "bounds, tokens/s"]
    return table([*settings, "no speculation, tokens/s", *ways, *last], rows)


def budget(results: dict[str, Any]) -> str:
    """A model of a published shape in the memory of a small device (budget-*.json)."""
    (engine,), (cell,), gib = results["engines"], results["cells"], 2**30
    plan = engine["plan"]
    rows = [
        [
            "no speculation" if name == "off" else f"`{name}`",
            f"{speed(way):.2f}",
            "" if name == "off" else f"{way['speedup']:.1f}",
            "" if name == "off" else f"{way['tau']:.1f}",
            "" if name == "off" else f"{way['serial_bound']:.2f} / {way['overlapped_bound']:.2f}",
        ]
        for name, way in cell["ways"].items()
    ]
    head = ["way", "tokens/s", "times no speculation", "tokens per round", "bounds, tokens/s"]
    streamed, layers = len(plan["streamed"]), len(plan["streamed"] + plan["resident"])
    link, store = engine["link_bytes_per_second"], plan["store_bytes"]
    return f"""\
{table(head, rows)}

{streamed} of {layers} layers are streamed, {store / gib:.1f} GiB a pass at {link / 1e9:.2f} GB/s; \
with more layers in place of the
substitutes, no speculation could reach {link / (store - plan["substitute_bytes"]):.2f} tokens/s. \
Planned memory {plan["total"] / gib:.2f} GiB, peak {engine["peak_bytes"] / gib:.2f} GiB."""


def hierarchies(results: dict[str, Any]) -> str:
    ways = results["ways"]
    rows = [
        [title, f"{speed(ways[name]):.1f}", f"{ways[name]['tau']:.1f}"]
        for name, title in WAYS.items()
    ]
    ratios = {
        name: {n: seconds[n] / seconds["1"] for n in ("8", "24")}
        for name, seconds in results["pass_seconds"].items()
    }
    low, twin = ratios["w4a16"], ratios["bfloat16"]
    return f"""\
{table(["way", "tokens/s", "tokens per round"], rows)}

A pass of this target over 24 tokens takes {low["24"]:.1f} times as long as one over a single
token, over 8 tokens {low["8"]:.1f} times. Unlike on a GPU its bfloat16 twin is worse \
({twin["24"]:.1f} and {twin["8"]:.1f}),
as this CPU multiplies bfloat16 slowly."""


def peers(results: dict[str, Any]) -> str:
    """Other ways to run the model in the same memory (peers.json)."""
    ran = sorted(results["peers"].values(), key=speed, reverse=True)
    rows = [
        [
            row["what"],
            f"{speed(row):.2f}",
            "" if row is ran[0] else f"{row['subspec_over_this']:.1f}",
            f"{row['first_token_seconds']:.1f}",
        ]
        for row in ran
    ]
    reasons: dict[str, list[str]] = {}
    for row in results["could_not_run"].values():
        reasons.setdefault(row["why"], []).append(row["what"])
    missing = "\n".join(f"- {', '.join(whats)}: {why}." for why, whats in reasons.items())
    head = ["way", "tokens/s", "SubSpec is faster by", "first token, s"]
    return f"{table(head, rows)}\n\nWhat could not run here:\n\n{missing}"


def load_table(results: dict[str, Any]) -> str:
    """A server under load, with speculation and without (goodput.json)."""

    def pair(load: dict[str, Any], name: str, digits: int, unit: float = 1.0) -> list[str]:
        runs = [
            [run[name] for run in load["runs"] if run["speculation"] == speculation]
            for speculation in (False, True)
        ]
        return [f"{statistics.median(values) / unit:.{digits}f}" for values in runs]

    rows = [
        [
            load["load"],
            *pair(load, "output_throughput", 1),
            f"{load['ratios']['output_throughput']:.2f}x",
            *(" / ".join(pair(load, f"median_{time}_ms", 1, 1000)) for time in ("ttft", "e2el")),
            " / ".join(pair(load, "request_goodput", 2)),
        ]
        for load in results["closed_loop"] + results["open_loop"]
    ]
    head = ["load", "no speculation, tokens/s", "SubSpec, tokens/s", "SubSpec is faster by"]
    beside = ["first token, s", "whole answer, s", "good answers/s"]
    return table([*head, *(f"{name}: without / with" for name in beside)], rows)


def start_sentence(results: dict[str, Any]) -> str:
    """First and second starts (start.json)."""
    first, second = (statistics.median(results["seconds"][name]) for name in ("first", "second"))
    store, substitutes = (
        results["bytes_kept"][f".{kind}"] / 2**30 for kind in ("store", "substitutes")
    )
    least, most = (f(results["first_over_second"]) for f in (min, max))
    return f"""\
From nothing to the first token a first start takes {first:.0f} s, and a second one, which finds the
weight store ({store:.1f} GiB) and the quantized substitutes ({substitutes:.1f} GiB), \
{second:.0f} s: {least:.1f} to {most:.1f} times as
fast."""


def kernels(results: dict[str, Any]) -> str:
    """Own kernels at every level of one machine's instructions (kernels-*.json)."""

    def share(by_name: dict[str, Any], tokens: int, of: str) -> str:
        return f"{by_name['own'][str(tokens)][of]:.0%}"

    rows = []
    for level in results["levels"]:
        families = level["kernels"]
        full = families["full precision, bfloat16, 11008 x 4096"]
        low = {bits: families[f"{bits} bits, bfloat16, 11008 x 4096"] for bits in (4, 8)}
        own = {bits: low[bits][f"own W{bits}A8"] for bits in low}
        times = low[4]["torch int4pack"]["16"]["median_us"] / own[4]["16"]["median_us"]
        rows.append(
            [
                f"`{level['level']}`",
                share(full, 1, "share_of_reading"),
                share(full, 32, "share_of_float32_rate"),
                f"{full['torch']['32']['median_us'] / full['own']['32']['median_us']:.1f}",
                f"{own[4]['1']['share_of_reading']:.0%}",
                f"{times:.1f}",
                f"{own[8]['1']['share_of_reading']:.0%}",
            ]
        )
    head = [
        "level",
        "bfloat16, 1 token: of memory's rate",
        "32 tokens: of the float32 rate",
        "times torch",
        "4 bits, 1 token: of memory's rate",
        "16 tokens: times torch int4pack",
        "8 bits, 1 token: of memory's rate",
    ]
    return table(head, rows)


LEVELS = {
    "amx_bf16": "amx",
    "avx512_bf16": "avx512_bf16",
    "avx512_vnni": "avx512_vnni",
    "avx512f": "avx512",
}
"""Of a CPU, by the highest flag that it has."""


def command(results: dict[str, Any]) -> str:
    """What was run, and on which class of CPUs."""
    about = results.get("environment", results)
    flags = about["cpu_flags"]
    level = next((level for flag, level in LEVELS.items() if flag in flags), "avx2")
    return f"    {about['command']}\n\nOn {about['cores']} cores of class `{level}`:"


def render() -> str:
    """The section, marks included."""
    ways, hierarchy, others = load("streamed"), load("hierarchy"), load("peers")
    loaded, starts, shape = load("goodput"), load("start"), load("budget-qwen2.5-7b")
    ttft, tpot = (loaded["targets_ms"][name] / 1000 for name in ("ttft", "tpot"))
    speeds = load("kernels-zen5")
    told, gib = ways["scenario"], 2**30
    return f"""\
{BEGIN}
{command(ways)}

{streamed(ways)}

{told["tokens"]} tokens an answer. `chain` and `tree` are grown by the substitute alone; with
`union`, the default, it verifies lookups. The last two columns are of the fastest way: its tokens
per round, and these over streaming plus drafting time / over the longer of the two.

![Tokens per second of each way](benchmarks/results/streamed.svg)
![Tokens per second by depth](benchmarks/results/streamed-depth.svg)

**The shape of Qwen2.5-7B in 8 GiB** (the bundled model as wide and as deep, in bfloat16; the first
layers streamed from disk; greedy, one request, {shape["scenario"]["requests"]} prompts x \
{shape["scenario"]["tokens"]} tokens):

{command(shape)}

{budget(shape)}

**Other ways to run a model larger than memory** ({others["model_bytes"] / gib:.1f} GiB model, \
{others["memory_limit_bytes"] / gib:.1f} GiB of memory for each, page
cache included; greedy, {others["prompts"]} prompts x {others["tokens"]} tokens or \
{others["seconds_per_answer"]:.0f} seconds, the prompt's own pass counted; taking turns):

{command(others)}

{peers(others)}

**A server under load** ({loaded["model_bytes"] / gib:.1f} GiB model, all layers streamed from \
disk; answers of {loaded["tokens"]}
tokens; a good answer's first token comes within {ttft:.1f} s and the others take {tpot:.1f} s \
each at most; runs with
and without take turns, {loaded["repeats"]} of each):

{command(loaded)}

{load_table(loaded)}

**Kernels** of one CPU at every level of instructions that it has (a weight of 11008 x 4096, out of
cache; medians; memory is read in turns with them):

{command(speeds)}

{kernels(speeds)}

**Starting** ({starts["model"]}):

{command(starts)}

{start_sentence(starts)}

**A 4-bit target** (0.5 GiB model in W4A16, `pystd-1m` as the small model, greedy, one request, 4
prompts x 128 tokens; one engine for each way, taking turns):

{command(hierarchy)}

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
