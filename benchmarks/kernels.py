# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Kernels of this CPU at every level that it has, beside what it can do at most.

    python -m benchmarks.kernels --out benchmarks/results/kernels-NAME.json

One process for each level, under the cap (`machine.isa`), so that libraries use no more than ours.
All kernels of a width or dtype take turns on weights that rotate out of cache. The read bandwidth
and the float32 rate are measured in the same process, before and after, and the better one counts;
so does a kernel's own rate where that is higher than any library's.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from vllm.platforms import current_platform

from vllm_subspec.bench import environment, kernel_rates
from vllm_subspec.bench.kernel_rates import Machine, Rate
from vllm_subspec.machine import isa
from vllm_subspec.weights import plain_linear
from vllm_subspec.weights.kernels import choice

SHAPES = ((4096, 4096), (11008, 4096))
TOKENS = (1, 4, 8, 16, 32, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def measure(seconds: float) -> dict[str, Any]:
    """All kernels at the level of this process."""
    before = kernel_rates.machine()
    found: dict[str, dict[str, list[Rate]]] = {}
    for rows, columns in SHAPES:
        shape = f"{rows} x {columns}"
        for dtype in DTYPES:
            name = str(dtype).removeprefix("torch.")
            found[f"full precision, {name}, {shape}"] = kernel_rates.alternate(
                plain_linear.candidates(dtype, (rows, columns)),
                dtype,
                (rows, columns),
                TOKENS,
                seconds,
            )
        for bits in (4, 8):
            found[f"{bits} bits, bfloat16, {shape}"] = kernel_rates.alternate(
                choice.candidates(bits, torch.bfloat16, (rows, columns)),
                torch.bfloat16,
                (rows, columns),
                TOKENS,
                seconds,
            )
    machine = best_of(before, kernel_rates.machine(), found)
    level = isa.level()
    result: dict[str, Any] = {
        "level": level.name if level else "none",
        "read_gb_per_s": round(machine.read / 1e9, 2),
        "float32_gflop_per_s": round(machine.float32 / 1e9, 1),
        "kernels": {},
    }
    for family, by_name in found.items():
        result["kernels"][family] = {
            name: {str(rate.tokens): rate.to_json_dict(machine) for rate in several}
            for name, several in by_name.items()
        }
    return result


def best_of(before: Machine, after: Machine, found: dict[str, dict[str, list[Rate]]]) -> Machine:
    """The most that was seen: what a share is a share of."""
    full = [
        rate
        for family, by_name in found.items()
        if family.startswith("full precision, float32")
        for several in by_name.values()
        for rate in several
    ]
    machine = Machine(max(before.read, after.read), max(before.float32, after.float32))
    most = max(rate.operations / rate.best for rate in full)
    return replace(machine, float32=max(machine.float32, most))


def print_table(result: dict[str, Any]) -> None:
    print(
        f"\n{result['level']}: memory {result['read_gb_per_s']} GB/s, float32 "
        f"{result['float32_gflop_per_s']} GFLOP/s"
    )
    for family, by_name in result["kernels"].items():
        print(f"  {family}")
        for name, by_tokens in by_name.items():
            cells = "".join(
                f"{figures['best_us']:10.0f} us {100 * figures['share_of_reading']:4.0f}%m"
                f"{100 * figures['share_of_float32_rate']:4.0f}%f"
                for figures in by_tokens.values()
            )
            print(f"    {name:<14}{cells}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=0.5, help="of each kernel, by tokens")
    parser.add_argument("--levels", help="comma-separated; default: all that this CPU has")
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # a child's
    args = parser.parse_args()
    if args.one:
        current_platform.import_kernels()
        torch.set_num_threads(args.threads)
        with torch.inference_mode():
            print(json.dumps(measure(args.seconds)))
        return 0
    machine = [level.name for level in isa.machine_levels()]
    levels = args.levels.split(",") if args.levels else machine
    results = []
    for level in levels:
        command = [sys.executable, "-m", "benchmarks.kernels", "--one"]
        command += ["--threads", str(args.threads), "--seconds", str(args.seconds)]
        done = subprocess.run(
            command,
            env={**os.environ, isa.VARIABLE: level, "VLLM_LOGGING_LEVEL": "ERROR"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        results.append(json.loads(done.stdout.splitlines()[-1]))
        print_table(results[-1])
    if args.out:
        about = {**environment.describe(), "threads": args.threads}
        environment.write(args.out, {**about, "levels": results})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
