# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""A pass without speculation over a model streamed from disk, beside the disk's own time for it.

    python -m benchmarks.plain_pass --levels avx2 --out benchmarks/results/plain-pass.json

One process for each level of instructions (`machine.isa`). In turns the weight store is read as
fast as the disk gives it, with nothing else to do, and a request decodes a few tokens; each token
is a pass that streams every decoder layer.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks import at_level
from benchmarks.checkpoints import BUILD, PROMPTS, checkpoint
from vllm_subspec.bench import environment
from vllm_subspec.machine import isa


def measure(gib: float, repeats: int, tokens: int) -> dict[str, Any]:
    """At the level of this process."""
    from vllm_subspec.bench.bandwidth import store_read_rate
    from vllm_subspec.bench.session import Session

    options = {"resident_weights_gib": 0, "store_dir": str(BUILD / "stores")}
    session = Session(checkpoint(gib), options)
    store = Path(session.call("memory_plan")["store"])
    nbytes = session.call("memory_plan")["store_bytes"]
    disk, passes = [], []
    for _ in range(repeats):
        disk.append(nbytes / store_read_rate(store))
        (answer,) = session.generate(PROMPTS[:1], tokens, speculate=False)
        passes.append(answer.decode_seconds / (len(answer.tokens) - 1))
    level = isa.level()
    return {
        "level": level.name if level else "none",
        "streamed_bytes": nbytes,
        "disk_seconds": disk,
        "pass_seconds": passes,
        "pass_over_disk": round(statistics.median(passes) / statistics.median(disk), 3),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=1.6, help="size of the model")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=6, help="decoded in each turn")
    parser.add_argument("--levels", nargs="+", help="default: all that this CPU has")
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # a child's
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.gib, args.repeats, args.tokens)))
        return 0
    results = []
    for level in args.levels or [level.name for level in isa.machine_levels()]:
        size = (
            "--gib",
            str(args.gib),
            "--repeats",
            str(args.repeats),
            "--tokens",
            str(args.tokens),
        )
        results.append(at_level.run("benchmarks.plain_pass", level, "--one", *size))
        print({name: results[-1][name] for name in ("level", "pass_over_disk")}, flush=True)
    if args.out:
        environment.write(args.out, {**environment.describe(), "levels": results})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
