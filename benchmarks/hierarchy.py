# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Method hierspec on a 4-bit target beside vLLM's own methods.

    python -m benchmarks.hierarchy [--gib 0.5] [--tokens 128]

One engine for each way, each in a process of its own; the prompts go round the engines, of which
one computes at a time. The premise (arXiv 2505.22179, figure 2) is measured on the same machine: a
pass of the target over n tokens, over one of a single token, with 4-bit weights and with the same
model's bfloat16 weights. Writes benchmarks/results/hierarchy.json; `benchmarks.plot_hierarchy`
draws it.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_subspec.bench import environment
from vllm_subspec.bench.engine_process import EngineProcess

if TYPE_CHECKING:
    from vllm_subspec.bench.session import Generated, Session

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "hierarchy.json"
SMALL = str(ROOT / "models" / "pystd-1m")
PASSES = (1, 2, 4, 8, 16, 24, 32, 48, 64)

NGRAM = {"method": "ngram", "depth": 6, "branching": 4, "nodes": 16}
MODEL = {"method": "draft_model", "model": SMALL, "depth": 4, "branching": 6, "nodes": 24}
# The published settings of both designs.
EAGLE = {"method": "eagle", "model": SMALL + "-eagle", "depth": 3, "branching": 10, "nodes": 30}
TREE = {"method": "draft_model", "model": SMALL, "depth": 3, "branching": 10, "nodes": 24}
INTERMEDIATE = {"method": "hierspec", "intermediate": SMALL}

WAYS: dict[str, dict[str, Any] | None] = {
    "no speculation": None,
    "vLLM ngram": {
        "method": "ngram",
        "num_speculative_tokens": 5,
        "prompt_lookup_min": 2,
        "prompt_lookup_max": 5,
    },
    "vLLM draft_model": {"method": "draft_model", "model": SMALL, "num_speculative_tokens": 5},
    "tree, fixed": {"method": "hierspec", "drafter": TREE, "pruning": "none"},
    "tree": {"method": "hierspec", "drafter": TREE},
    "hierspec eagle, fixed": {**INTERMEDIATE, "drafter": EAGLE, "pruning": "none"},
    "hierspec eagle": {**INTERMEDIATE, "drafter": EAGLE},
    "hierspec ngram": {**INTERMEDIATE, "drafter": NGRAM},
}


def quantised(gib: float) -> tuple[Path, Path]:
    """A bfloat16 checkpoint and its 4-bit copy (compressed-tensors), both written once."""
    from benchmarks.checkpoints import checkpoint
    from vllm_subspec.weights.quantized_weight import QuantFormat
    from vllm_subspec.weights.save_checkpoint import quantize_checkpoint

    whole = checkpoint(gib)
    folder = whole.with_name(whole.name + "-w4a16")
    if not (folder / "config.json").exists():
        quantize_checkpoint(whole, folder, QuantFormat(4, 64, True), "hqq", lambda *_: None)
    return whole, folder


def pass_seconds(session: "Session") -> dict[int, float]:
    """Of passes of the target over so many tokens without any text before them."""
    rpc = session.llm.collective_rpc
    return {tokens: rpc(_pass_seconds, args=(tokens,))[0] for tokens in PASSES}


def _pass_seconds(worker: Any, tokens: int) -> float:
    times = []
    for _ in range(7):
        began = time.perf_counter()
        worker.model_runner._dummy_run(tokens)
        times.append(time.perf_counter() - began)
    return sorted(times)[3]


def generate(
    session: "Session",
    prompt: str,
    tokens: int,
) -> "Generated":
    """One answer."""
    (answer,) = session.generate([prompt], tokens)
    return answer


def asking(engine: EngineProcess) -> Callable[[str, int], "Generated"]:
    """Answers a prompt with so many tokens."""
    return lambda prompt, tokens: engine.call(generate, prompt, tokens)


def rounds(asks: Mapping[str, Callable[[str, int], Any]], tokens: int) -> dict[str, Any]:
    """Every prompt by every way in turn, after a warm-up of each."""
    from benchmarks.checkpoints import PROMPTS
    from vllm_subspec.bench.session import harmonic

    for ask in asks.values():
        for prompt in PROMPTS:
            ask(prompt, tokens // 2)
    answers: dict[str, list[Any]] = {name: [] for name in asks}
    for prompt in PROMPTS:
        for name, ask in asks.items():
            answers[name].append(ask(prompt, tokens))
    return {
        name: {
            "tokens_per_second": harmonic([a.tokens_per_second for a in given]),
            "by_prompt": [a.tokens_per_second for a in given],
            "tau": sum(a.decode_tokens for a in given) / sum(len(a.steps) - 1 for a in given),
        }
        for name, given in answers.items()
    }


def hierspec(gib: float, tokens: int) -> dict[str, Any]:
    """All ways beside each other, and what passes cost."""
    whole, low = quantised(gib)
    engines = {name: EngineProcess(low, way, max_model_len=1024) for name, way in WAYS.items()}
    asks = {name: asking(engine) for name, engine in engines.items()}
    result: dict[str, Any] = {"ways": rounds(asks, tokens)}
    result["pass_seconds"] = {"w4a16": engines["no speculation"].call(pass_seconds)}
    for engine in engines.values():
        engine.close()
    with EngineProcess(whole, None, max_model_len=1024) as twin:
        result["pass_seconds"]["bfloat16"] = twin.call(pass_seconds)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=0.5)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    measured = hierspec(args.gib, args.tokens)
    environment.write(args.out, {"environment": environment.describe(), **measured})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
