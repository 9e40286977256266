# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Token trees against chains and against streaming without speculation, on one engine.

    python -m benchmarks.trees [--gib 1.6] [--runs bfloat16:4 bfloat16:8 float32:4] [--tokens 256]
    python -m benchmarks.trees --runs bfloat16:4 --parts "batch of 4" "equal depth" --update

Every decoder layer is streamed from disk. For each run one process with one engine, on which the
ways of drafting take turns, prompt by prompt. The first run measures all PARTS: greedy text, a
batch of 4, sampling at temperature 0.6 beside a fixed beam, which prunes nothing, chain and tree of
equal depth, and a depth sweep; the others greedy text alone. Writes benchmarks/results/trees.json,
or with --update replaces the measured parts of it; `benchmarks.plot_trees` draws it.
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.chain import first_difference
from vllm_subspec.bench import environment
from vllm_subspec.bench.bandwidth import store_read_rate

RESULT = Path(__file__).resolve().parent / "results" / "trees.json"

DEPTH, BRANCHING = 48, 6
DEPTHS = (4, 8, 16, 32, 48, 64)
CHAIN: dict[str, Any] = {"branching": 1, "depth": DEPTH}
TREE: dict[str, Any] = {"branching": BRANCHING, "depth": DEPTH}
FULL_CHAIN: dict[str, Any] = {**CHAIN, "pruning": "none"}
FULL_BEAM: dict[str, Any] = {**TREE, "pruning": "none"}


class Measured:
    """One engine and what its ways of drafting did.

    Args:
        dtype: of the model.
        bits: of the substitutes.
    """

    def __init__(self, dtype: str, bits: int, args: argparse.Namespace) -> None:
        from benchmarks.checkpoints import BUILD, PROMPTS, checkpoint
        from vllm_subspec.bench.session import Session

        options = {
            "resident_weights_gib": 0,
            "bits": bits,
            "store_dir": str(BUILD / "stores"),
            "drafter": None,
            "num_speculative_tokens": DEPTH * BRANCHING,
            "depth": max(DEPTHS),
        }
        self.session = Session(checkpoint(args.gib, dtype), options, dtype=dtype)
        self.plan = self.session.call("memory_plan")
        self.prompts = PROMPTS
        self.singles = [[prompt] for prompt in PROMPTS]
        self.args = args
        self._readers: list[float] = []
        self.session.generate(PROMPTS[:1], 2, speculate=False)

    def plain(self, prompts: list[str], tokens: int) -> list[Any]:
        self._readers.append(store_read_rate(Path(self.plan["store"])))
        answers: list[Any] = self.session.generate(prompts, tokens, speculate=False, logprobs=2)
        return answers

    def drafted(
        self, way: dict[str, Any], prompts: list[str], tokens: int, **sampling: Any
    ) -> dict[str, Any]:
        """One batch of answers drafted ``way``, and what its rounds were like."""
        self.session.llm.collective_rpc("set_drafting", kwargs=way)
        before = self.session.call("drafting_stats")
        answers = self.session.generate(prompts, tokens, speculate=True, **sampling)
        after = self.session.call("drafting_stats")
        return {"answers": answers, "stats": {key: after[key] - before[key] for key in after}}

    def ways(
        self,
        ways: dict[str, dict[str, Any]],
        batches: list[list[str]],
        tokens: int,
        **sampling: Any,
    ) -> dict[str, Any]:
        """Every batch by every way in turn, after a short warm-up of each."""
        for way in ways.values():
            self.drafted(way, batches[0], min(64, tokens), **sampling)
        done: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
        for batch in batches:
            for name, way in ways.items():
                done[name].append(self.drafted(way, batch, tokens, **sampling))
        return {name: self.summary(runs) for name, runs in done.items()}

    def summary(self, runs: list[dict[str, Any]]) -> dict[str, Any]:
        """Speeds of whole batches, and the mean round."""
        from vllm_subspec.bench.session import harmonic

        stats = {key: sum(run["stats"][key] for run in runs) for key in runs[0]["stats"]}
        rounds, requests = stats["rounds"], stats["request_rounds"]
        draft, verify = stats["draft_seconds"] / rounds, stats["verify_seconds"] / rounds
        tau = stats["emitted_tokens"] / requests
        return {
            "tokens_per_second": harmonic([speed(run["answers"]) for run in runs]),
            "by_batch": [speed(run["answers"]) for run in runs],
            "tau": tau,
            "nodes_per_round": stats["draft_nodes"] / requests,
            "depth_per_round": stats["draft_depth"] / requests,
            "steps_per_round": stats["steps"] / rounds,
            "nodes_per_step": stats["expanded_nodes"] / stats["steps"],
            "draft_seconds_per_round": draft,
            "verify_seconds_per_round": verify,
            "overhead_share": (draft - stats["forward_seconds"] / rounds) / (draft + verify),
            **self.bounds(tau * requests / rounds, draft),
        }

    def bounds(self, tokens: float, draft_seconds: float) -> dict[str, float]:
        """Tokens/s at most, of rounds that emit ``tokens``."""
        from vllm_subspec.core.plan import overlapped_bound, serial_bound

        stream = self.plan["store_bytes"] / sorted(self._readers)[len(self._readers) // 2]
        return {
            "stream_seconds": stream,
            "serial_bound": serial_bound(tokens, stream, draft_seconds),
            "overlapped_bound": overlapped_bound(tokens, stream, draft_seconds),
        }


def speed(answers: list[Any]) -> float:
    """Tokens/s of a batch after its first step."""
    return sum(a.decode_tokens for a in answers) / max(a.decode_seconds for a in answers)


def headline(measured: Measured) -> dict[str, Any]:
    """Greedy, batch 1: plain, chain and tree on every prompt."""
    from vllm_subspec.bench.session import harmonic

    args = measured.args
    ways = {"chain": CHAIN, "tree": TREE}
    for way in ways.values():
        measured.drafted(way, measured.prompts[:1], 96)
    plain: list[Any] = []
    done: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    parts = []
    for prompt in measured.prompts:
        plain += measured.plain([prompt], args.plain_tokens)
        for name, way in ways.items():
            run = measured.drafted(way, [prompt], args.tokens)
            done[name].append(run)
            (answer,) = run["answers"]
            parts.append(first_difference(plain[-1].tokens, answer.tokens, plain[-1].margins))
    result: dict[str, Any] = {name: measured.summary(runs) for name, runs in done.items()}
    speeds = [a.tokens_per_second for a in plain]
    result["plain"] = {"tokens_per_second": harmonic(speeds), "by_batch": speeds}
    result["differences"] = [part for part in parts if part["first_difference"] is not None]
    return result


def batch_of_4(measured: Measured) -> dict[str, Any]:
    args, batch = measured.args, [measured.prompts]
    plain = measured.plain(measured.prompts, args.plain_tokens)
    return {
        "plain": {"tokens_per_second": speed(plain)},
        **measured.ways({"chain": CHAIN, "tree": TREE}, batch, args.tokens),
    }


def sampled(measured: Measured) -> dict[str, Any]:
    ways = {"chain": CHAIN, "tree": TREE, "fixed beam": FULL_BEAM}
    tokens = measured.args.tokens // 2
    return measured.ways(ways, measured.singles, tokens, temperature=0.6, seed=1)


def equal_depth(measured: Measured) -> dict[str, Any]:
    ways = {"chain": FULL_CHAIN, "tree": FULL_BEAM}
    return measured.ways(ways, measured.singles, measured.args.tokens)


def depths(measured: Measured) -> dict[str, Any]:
    return {
        str(depth): measured.ways(
            {
                "chain": {"branching": 1, "depth": depth},
                "tree": {"branching": BRANCHING, "depth": depth},
            },
            measured.singles[::2],
            measured.args.tokens // 4,
        )
        for depth in DEPTHS
    }


PARTS: dict[str, Callable[[Measured], dict[str, Any]]] = {
    "greedy": headline,
    "batch of 4": batch_of_4,
    "temperature 0.6": sampled,
    "equal depth": equal_depth,
    "depths": depths,
}


def measure(dtype: str, bits: int, parts: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """``parts`` on one engine."""
    measured = Measured(dtype, bits, args)
    return {
        "dtype": dtype,
        "bits": bits,
        "model_gib": args.gib,
        "streamed_bytes": measured.plan["store_bytes"],
        **{part: PARTS[part](measured) for part in parts},
    }


def _worker(dtype: str, bits: int, parts: list[str], args: argparse.Namespace, out: Any) -> None:
    out.put(measure(dtype, bits, parts, args))


def show(result: dict[str, Any]) -> None:
    """The headline of one engine, in a few lines."""
    if "greedy" not in result:
        return
    greedy = result["greedy"]
    plain = greedy["plain"]["tokens_per_second"]
    print(f"{result['dtype']}, {result['bits']} bits: {plain:.2f} tokens/s without speculation")
    for name in ("chain", "tree"):
        way = greedy[name]
        print(
            f"  {name}: {way['tokens_per_second']:.2f} tokens/s, "
            f"{way['tokens_per_second'] / plain:.1f}x, tau {way['tau']:.1f}, bounds "
            f"{way['serial_bound']:.1f} serial / {way['overlapped_bound']:.1f} overlapped"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=1.6)
    parser.add_argument("--runs", nargs="+", default=["bfloat16:4", "bfloat16:8", "float32:4"])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--plain-tokens", type=int, default=12)
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="of every run")
    parser.add_argument("--update", action="store_true", help="keep what is not measured now")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    known: dict[str, Any] = {"environments": {}, "results": []}
    if args.update:
        known = json.loads(args.out.read_text())
    context = multiprocessing.get_context("spawn")
    for number, run in enumerate(args.runs):
        dtype, bits = run.split(":")
        parts = args.parts or (["greedy"] if number else [*PARTS])
        queue: Any = context.Queue()
        process = context.Process(target=_worker, args=(dtype, int(bits), parts, args, queue))
        process.start()
        while process.is_alive() and queue.empty():
            time.sleep(1)
        if queue.empty():
            return 1
        result = queue.get()
        process.join()
        show(result)
        same = [r for r in known["results"] if (r["dtype"], r["bits"]) == (dtype, int(bits))]
        if same:
            same[0].update(result)
        else:
            known["results"].append(result)
        measured = dict.fromkeys(parts, environment.describe())
        known["environments"].setdefault(run, {}).update(measured)
        environment.write(args.out, known)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
