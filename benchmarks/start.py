# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""How long a first start takes, and a second one that finds the weight store and the substitutes.

    python -m benchmarks.start [--gib 1.6] [--repeats 3]

Both begin with a new process and with no file of the model or the store in the page cache, and end
with the first token. Writes benchmarks/results/start.json.
"""

import argparse
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.checkpoints import BUILD, PROMPTS, ROOT, checkpoint
from benchmarks.peers.memory import forget
from vllm_subspec.bench import environment
from vllm_subspec.bench.engine_process import EngineProcess

if TYPE_CHECKING:
    from vllm_subspec.bench.session import Session

RESULT = ROOT / "benchmarks" / "results" / "start.json"
FOLDER = BUILD / "start"


def first_token(session: "Session") -> int:
    """The first token of an answer; runs where the engine is."""
    return session.generate(PROMPTS[:1], 1)[0].tokens[0]


def start(model: Path) -> tuple[float, int]:
    """Seconds from nothing to the first token, and that token."""
    forget([model, FOLDER])
    began = time.perf_counter()
    options = {"store_dir": str(FOLDER), "resident_weights_gib": 0}
    with EngineProcess(model, options) as engine:
        token = engine.call(first_token)
        return time.perf_counter() - began, token


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.start", description=__doc__.split("\n")[0])
    parser.add_argument("--gib", type=float, default=1.6, help="size of the checkpoint")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    model = checkpoint(arguments.gib)
    seconds: dict[str, list[float]] = {"first": [], "second": []}
    tokens = set()
    for _ in range(arguments.repeats):
        shutil.rmtree(FOLDER, ignore_errors=True)
        FOLDER.mkdir(parents=True)
        for name, times in seconds.items():
            took, token = start(model)
            times.append(took)
            tokens.add(token)
            print(f"{name} start: {took:.1f} s")
    ratios = [a / b for a, b in zip(seconds["first"], seconds["second"], strict=True)]
    files = {path.suffix: path.stat().st_size for path in FOLDER.iterdir() if path.stat().st_size}
    result = {
        "environment": environment.describe(),
        "model": model.name,
        "seconds": seconds,
        "first_over_second": ratios,
        "bytes_kept": files,
        "same_token": len(tokens) == 1,
    }
    environment.write(RESULT, result)
    print(f"a second start is {min(ratios):.1f} to {max(ratios):.1f} times as fast")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
