# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Linears on this CPU: vLLM's resident one, the streamed one, and the candidates for substitutes.

    python -m benchmarks.kernels --threads 1 --out benchmarks/results/kernels-cpu.json

Alternates all candidates on weights that rotate out of cache and takes medians. With one thread
the clock is the thread's own CPU time, which other programs on the machine disturb little; with
more it is wall-clock time, which wants an otherwise idle machine.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import vllm._custom_ops as ops
from torch import Tensor
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.platforms import current_platform
from vllm_subspec.weights.kernels.cpu_int4_vnni import Int4VnniKernel

from vllm_subspec.bench import environment
from vllm_subspec.weights.kernels.cpu_int4 import TorchInt4Kernel
from vllm_subspec.weights.kernels.cpu_int8 import OneDnnInt8Kernel
from vllm_subspec.weights.kernels.mixed_precision import MixedPrecisionKernel
from vllm_subspec.weights.plain_linear import plain_linear, stores_transposed
from vllm_subspec.weights.quantize import quantize
from vllm_subspec.weights.quantized_weight import QuantFormat

Linear = Callable[[Tensor], Tensor]

RESIDENT = "vLLM resident bf16"
FORMATS = {
    "own W4A8 g64": (Int4VnniKernel, QuantFormat(4, 64)),
    "torch int4pack g64": (TorchInt4Kernel, QuantFormat(4, 64)),
    "oneDNN W8A8": (OneDnnInt8Kernel, QuantFormat(8, -1, symmetric=True)),
    "vLLM CPUWNA16 g64": (MixedPrecisionKernel, QuantFormat(4, 64)),
}
CACHE_BYTES = 80 << 20  # of bfloat16 weights to rotate through: more than a last-level cache


def int8pack(weight: Tensor) -> Linear:
    """torch's int8 weight-only product: the alternative to W8A8."""
    coded = quantize(weight, QuantFormat(8, -1, symmetric=True), "rtn")
    signed, scales = (coded.codes ^ 0x80).view(torch.int8), coded.scales.flatten()
    return lambda x: torch.ops.aten._weight_int8pack_mm(x, signed, scales)


def linears(weight: Tensor) -> dict[str, Linear]:
    """Every candidate for one bfloat16 weight [N, K]."""
    resident = ops.create_onednn_mm(weight.t(), 32)
    transposed = stores_transposed(weight.device, weight.dtype)
    plain = weight.t().contiguous().t() if transposed else weight
    made: dict[str, Linear] = {
        RESIDENT: lambda x: ops.onednn_mm(resident, x, None),
        "streamed bf16": lambda x: plain_linear(x, plain),
        "F.linear bf16": lambda x: torch.nn.functional.linear(x, weight),
        "torch int8pack": int8pack(weight),
    }
    for name, (kernel, fmt) in FORMATS.items():
        if kernel is Int4VnniKernel and not kernel.available(weight.device, weight.dtype):
            continue
        made[name] = kernel(quantize(weight, fmt, "rtn"), weight.dtype)
    return made


def measure(rows: int, columns: int, tokens: list[int], args: argparse.Namespace) -> dict[str, Any]:
    """Median microseconds of each candidate by token count, and its relative error."""
    copies = max(2, CACHE_BYTES // (2 * rows * columns))
    weights = [torch.randn(rows, columns).bfloat16() / columns**0.5 for _ in range(copies)]
    candidates = [linears(weight) for weight in weights]
    clock = time.thread_time if args.threads == 1 else time.perf_counter
    held = {
        name: linear.nbytes
        for name, linear in candidates[0].items()
        if isinstance(linear, OneDnnInt8Kernel | Int4VnniKernel | TorchInt4Kernel)
    }
    result: dict[str, Any] = {"shape": [rows, columns], "tokens": {}}
    for m in tokens:
        x = torch.randn(m, columns).bfloat16()
        exact = x.double() @ weights[0].double().T
        errors = {
            name: float((linear(x).double() - exact).norm() / exact.norm())
            for name, linear in candidates[0].items()
        }
        times: dict[str, list[float]] = {name: [] for name in errors}
        end, turn = time.perf_counter() + args.seconds, 0
        while turn < 3 or time.perf_counter() < end:
            for name, linear in candidates[turn % copies].items():
                start = clock()
                linear(x)
                times[name].append(clock() - start)
            turn += 1
        median = {name: statistics.median(t) for name, t in times.items()}
        result["tokens"][str(m)] = {
            name: {
                "us": round(median[name] * 1e6, 1),
                "speed_up": round(median[RESIDENT] / median[name], 2),
                "relative_error": round(errors[name], 5),
                "turns": turn,
            }
            for name in median
        }
        for name, nbytes in held.items():
            result["tokens"][str(m)][name]["gb_per_s"] = round(nbytes / median[name] / 1e9, 2)
        print_rows(rows, columns, m, result["tokens"][str(m)])
    return result


def print_rows(rows: int, columns: int, m: int, by_name: dict[str, dict[str, float]]) -> None:
    """One line per candidate; GB/s are of packed weight."""
    for name, figures in by_name.items():
        print(
            f"{rows} x {columns}, {m:3} tokens  {name:20}{figures['us']:9.1f} us"
            f"{figures.get('gb_per_s', math.nan):7.1f} GB/s{figures['speed_up']:7.2f} x"
            f"   error {figures['relative_error']:.4f}",
            flush=True,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="2048x2048,2048x6144", help="N x K, comma-separated")
    parser.add_argument("--tokens", default="1,2,4,6,8,17,33,65")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each shape and token count")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/kernels-cpu.json"))
    args = parser.parse_args()
    current_platform.import_kernels()
    torch.set_num_threads(args.threads)
    tokens = [int(m) for m in args.tokens.split(",")]
    with set_current_vllm_config(VllmConfig()), torch.inference_mode():
        # vLLM's parameters ask for their rank.
        init_distributed_environment(1, 0, "tcp://127.0.0.1:29561", 0, "gloo")
        initialize_model_parallel(1)
        sizes = [shape.split("x") for shape in args.shapes.split(",")]
        shapes = [measure(int(rows), int(columns), tokens, args) for rows, columns in sizes]
    environment.write(
        args.out, {**environment.describe(), "threads": args.threads, "shapes": shapes}
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
