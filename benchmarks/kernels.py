# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Kernels of this CPU at every level that it has, beside what it can do at most.

    python -m benchmarks.kernels --out benchmarks/results/kernels-NAME.json

One process for each level, under the cap (`machine.isa`), so that libraries use no more than ours.
All kernels of a width or dtype take turns on weights that rotate out of cache, and so does reading
memory. The float32 rate is the best of torch's large product, before and after, and of all float32
linears below.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from vllm.platforms import current_platform

from benchmarks import at_level
from vllm_subspec.bench import environment, kernel_rates
from vllm_subspec.bench.kernel_rates import Rate
from vllm_subspec.machine import isa, rates
from vllm_subspec.weights import plain_linear
from vllm_subspec.weights.kernels import choice

SHAPES = ((4096, 4096), (11008, 4096))
TOKENS = (1, 4, 8, 16, 32, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def measure(seconds: float) -> dict[str, Any]:
    """All kernels at the level of this process."""
    before = rates.float32_rate()
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
    full = [
        rate.operations / rate.best
        for family, by_name in found.items()
        if family.startswith("full precision, float32")
        for several in by_name.values()
        for rate in several
    ]
    float32 = max(before, rates.float32_rate(), *full)
    level = isa.level()
    return {
        "level": level.name if level else "none",
        "float32_gflop_per_s": round(float32 / 1e9, 1),
        "kernels": {
            family: {
                name: {str(rate.tokens): rate.to_json_dict(float32) for rate in several}
                for name, several in by_name.items()
            }
            for family, by_name in found.items()
        },
    }


def print_table(result: dict[str, Any]) -> None:
    print(f"\n{result['level']}: float32 {result['float32_gflop_per_s']} GFLOP/s")
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
        given = ("--threads", str(args.threads), "--seconds", str(args.seconds))
        results.append(at_level.run("benchmarks.kernels", level, "--one", *given))
        print_table(results[-1])
    if args.out:
        about = {**environment.describe(), "threads": args.threads}
        environment.write(args.out, {**about, "levels": results})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
