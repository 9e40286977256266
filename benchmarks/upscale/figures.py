# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Measure the upscaler: agreement by width, depth and noise, time and memory of a large checkpoint.

    python -m benchmarks.upscale.figures

Checkpoints are made below build/ and removed again. Results of parts that are not asked for stay.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.upscale import Recipe, load_config, upscale
from benchmarks.upscale.check import compare
from benchmarks.upscale.shape import GIB, size_in_bytes, upscaled_config
from vllm_subspec.bench import environment

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "models" / "pystd-6m"
RESULT = ROOT / "benchmarks" / "results" / "upscale.json"

LARGE_GIB = 4.0
# (width, layers, noise) by part. The source has 6 layers, a published 32B model has 64.
RECIPES = {
    "width-2": [(2, 6, noise) for noise in (0.0, 1.0, 2.5)],
    "width-4": [(4, 6, noise) for noise in (0.0, 1.7, 2.5)],
    "width-8": [(8, 6, noise) for noise in (0.0, 2.5, 3.0)],
    "depth": [(2, layers, 1.0) for layers in (18, 64)],
}


def agreement(recipes: Sequence[tuple[int, int, float]], folder: Path) -> list[dict[str, Any]]:
    """Of each recipe's checkpoint with the source, and of both with their 4-bit copies."""
    found = []
    for width, layers, noise in recipes:
        recipe = Recipe(SOURCE.name, width, layers, noise, 0, "bfloat16")
        out = folder / f"{width}x{layers}-{noise}"
        upscale(SOURCE, out, recipe)
        size = size_in_bytes(upscaled_config(load_config(SOURCE), recipe))
        measured = asdict(compare(SOURCE, out))
        found.append(
            {"width": width, "layers": layers, "noise": noise, "gib": size / GIB} | measured
        )
        print(json.dumps(found[-1]), flush=True)
    return found


def making(folder: Path) -> dict[str, Any]:
    """Time and peak memory of a process that makes a large checkpoint, and of one that only copies
    the source, which needs the same libraries."""
    seconds, peak = _made(folder / "large", "--gib", str(LARGE_GIB))
    _, least = _made(folder / "copy", "--width", "1")
    held = sum(path.stat().st_size for path in (folder / "large").glob("*.safetensors"))
    return {
        "gib": held / GIB,
        "seconds": seconds,
        "peak_mib": peak,
        "peak_mib_of_a_copy": least,
    }


# The kernel's own peak: that of getrusage includes the program from which this one was forked.
_PROGRAM = """
import sys
from benchmarks.upscale.__main__ import main
status = main(sys.argv[1:])
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM:")))
sys.exit(status)
"""


def _made(out: Path, *options: str) -> tuple[float, float]:
    """Seconds and peak resident MiB of the command that makes `out`."""
    command = [sys.executable, "-c", _PROGRAM, str(SOURCE), str(out), *options]
    began = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return time.monotonic() - began, int(done.stdout.split()[-2]) / 1024


PARTS: dict[str, Callable[[Path], Any]] = {"making": making} | {
    part: partial(agreement, recipes) for part, recipes in RECIPES.items()
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    result = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    build = ROOT / "build"
    build.mkdir(exist_ok=True)
    for part in arguments.parts:
        with tempfile.TemporaryDirectory(dir=build) as folder:
            found = PARTS[part](Path(folder))
        result[part] = {"environment": environment.describe(), "found": found}
        environment.write(arguments.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
