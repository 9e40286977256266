# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""SubSpec with chains against the same engine streaming without speculation.

    python -m benchmarks.chain [--gib 1.6] [--dtype bfloat16 float32] [--bits 4 8] [--tokens 128]

For each type of the model and width of the substitutes one process: every decoder layer is streamed
from disk, batch 1, greedy. Each prompt is answered without speculation and with it, one after the
other. Beside the speeds stand two bounds: tokens per round over the longer of streaming and
drafting (all overlapped), and over both (nothing overlapped). Writes benchmarks/results/chain.json.
"""

import argparse
import itertools
import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

from vllm_subspec.bench import environment
from vllm_subspec.bench.bandwidth import store_read_rate

RESULT = Path(__file__).resolve().parent / "results" / "chain.json"


def measure(dtype: str, bits: int, args: argparse.Namespace) -> dict[str, Any]:
    """One engine: both ways on every prompt, alternating."""
    from benchmarks.checkpoints import BUILD, PROMPTS, checkpoint
    from vllm_subspec.bench.session import Session, harmonic, peak_rss
    from vllm_subspec.core.plan import overlapped_bound, serial_bound

    model = checkpoint(args.gib, dtype)
    options = {
        "resident_weights_gib": 0,
        "bits": bits,
        "store_dir": str(BUILD / "stores"),
        "branching": 1,
        "depth": args.depth,
        "ring_layers": args.ring_layers,
    }
    session = Session(model, options, dtype=dtype)
    plan = session.call("memory_plan")
    bandwidths: list[float] = []
    rows: list[dict[str, Any]] = []
    session.generate(PROMPTS[:1], 32, speculate=True)
    session.generate(PROMPTS[:1], 2, speculate=False)
    ring = {"bytes": 0.0, "seconds": 0.0}
    head = {"ready": 0.0, "total": 0.0}
    rounds: dict[str, float] = {}
    for prompt in PROMPTS:
        bandwidths.append(store_read_rate(Path(plan["store"])))
        before = session.call("streaming_stats")
        (plain,) = session.generate([prompt], args.plain_tokens, speculate=False, logprobs=2)
        time.sleep(1)  # the head start of the prompt's own pass is no verification's: let it load
        between = session.call("streaming_stats")
        drafted = session.call("drafting_stats")
        (subspec,) = session.generate([prompt], args.tokens, speculate=True)
        after = session.call("streaming_stats")
        for key, value in session.call("drafting_stats").items():
            rounds[key] = rounds.get(key, 0) + value - drafted[key]
        # All passes but the first of the answer lie within its decode time.
        share = (len(plain.steps) - 1) / len(plain.steps)
        ring["bytes"] += (between["bytes_streamed"] - before["bytes_streamed"]) * share
        ring["seconds"] += plain.decode_seconds
        head["ready"] += after["head_start_ready"] - between["head_start_ready"]
        head["total"] += after["head_start_total"] - between["head_start_total"]
        rows.append(
            {
                "plain_tokens_per_second": plain.tokens_per_second,
                "subspec_tokens_per_second": subspec.tokens_per_second,
                "tau": subspec.tau,
                "compared_tokens": len(plain.tokens),
                **first_difference(plain.tokens, subspec.tokens, plain.margins),
            }
        )
    plain_speed = harmonic([r["plain_tokens_per_second"] for r in rows])
    speed = harmonic([r["subspec_tokens_per_second"] for r in rows])
    reader = sorted(bandwidths)[len(bandwidths) // 2]
    tau = rounds["emitted_tokens"] / rounds["rounds"]
    stream = plan["store_bytes"] / reader
    draft = rounds["draft_seconds"] / rounds["rounds"]
    overlapped = overlapped_bound(tau, stream, draft)
    return {
        "dtype": dtype,
        "bits": bits,
        "model_gib": args.gib,
        "streamed_bytes": plan["store_bytes"],
        "plain_tokens_per_second": plain_speed,
        "subspec_tokens_per_second": speed,
        "speedup": speed / plain_speed,
        "tau": tau,
        "draft_steps_per_round": rounds["steps"] / rounds["rounds"],
        "draft_seconds_per_round": draft,
        "verify_seconds_per_round": rounds["verify_seconds"] / rounds["rounds"],
        "stream_seconds": stream,
        "overlapped_bound": overlapped,
        "serial_bound": serial_bound(tau, stream, draft),
        "efficiency": speed / overlapped,
        "reader_bytes_per_second": reader,
        "ring_bytes_per_second": ring["bytes"] / ring["seconds"],
        "ring_share_of_reader": ring["bytes"] / ring["seconds"] / reader,
        "head_start_ready": head["ready"] / head["total"],
        "ring_layers": plan["ring_layers"],
        "peak_rss_bytes": peak_rss(),
        "planned_bytes": plan["total"],
        "prompts": rows,
    }


def first_difference(
    plain: list[int], subspec: list[int], margins: list[float]
) -> dict[str, float | None]:
    """Where two answers part, and how far apart the two best tokens are there; None: nowhere."""
    pairs = enumerate(zip(plain, subspec, strict=False))
    at = next((i for i, (x, y) in pairs if x != y), None)
    return {"first_difference": at, "margin_there": None if at is None else margins[at]}


def _worker(dtype: str, bits: int, args: argparse.Namespace, out: Any) -> None:
    out.put(measure(dtype, bits, args))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=1.6)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--plain-tokens", type=int, default=24)
    parser.add_argument("--depth", type=int, default=48)
    parser.add_argument("--ring-layers", type=int)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    results = []
    context = multiprocessing.get_context("spawn")
    for dtype, bits in itertools.product(args.dtype, args.bits):
        queue: Any = context.Queue()
        process = context.Process(target=_worker, args=(dtype, bits, args, queue))
        process.start()
        while process.is_alive() and queue.empty():
            time.sleep(1)
        if queue.empty():
            return 1
        results.append(queue.get())
        process.join()
        print(json.dumps({k: v for k, v in results[-1].items() if k != "prompts"}, indent=1))
        environment.write(args.out, {"environment": environment.describe(), "results": results})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
