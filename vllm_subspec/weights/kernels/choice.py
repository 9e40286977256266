# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Which kernel carries which width on which device, by measurement.

CPU figures: speed-up over vLLM's resident bfloat16 linear of the same shape (2048 x 2048), one
thread on A, weights rotating out of cache; error relative to float64 with the unquantised Gaussian
weight. A: Xeon with VNNI and no bfloat16 instructions
(``benchmarks/results/kernels-cpu.json``). B: AMD with AVX512-BF16, two threads.

| kernel | A, 1 token | A, 4 | A, 17 | A, 33 | B, 1 | B, 6 | B, 33 | error |
|---|---|---|---|---|---|---|---|---|
| oneDNN W8A8, per row | 1.5 | 5.7 | 8.9 | 10 | 2.0 | 1.9 | 1.9 | 0.012 |
| torch int4pack, group 64 | 2.2 | 4.8 | 2.8 | 2.5 | 1.9 | 0.64 | 0.43 | 0.09 |
| torch int8pack, per row | 1.3 | 3.5 | 2.2 | 2.0 | 0.85 | 0.54 | 0.40 | 0.009 |
| vLLM CPUWNA16, group 64 | 0.58 | 1.7 | 1.9 | 2.0 | 0.46 | 0.44 | 0.43 | 0.09 |

At 4 bits our own W4A8 kernel comes first where the CPU has AVX512-VNNI and the machine a C++
compiler: it reads memory faster than int4pack, and unpacks a weight once for up to 16 tokens.

torch's ``_dyn_quant_matmul_4bit`` has only scalar reference code on x86 (0.1), and the per-tensor
dynamic linears of fbgemm make the tokens of a batch depend on each other. On CUDA vLLM chooses:
Machete on Hopper, else Marlin; neither was measured here.
"""

from contextlib import suppress

import torch
from vllm.logger import init_logger

from vllm_subspec.weights.kernels.base import SubstituteKernel
from vllm_subspec.weights.kernels.cpu_int4 import TorchInt4Kernel
from vllm_subspec.weights.kernels.cpu_int4_vnni import Int4VnniKernel
from vllm_subspec.weights.kernels.cpu_int8 import OneDnnInt8Kernel
from vllm_subspec.weights.kernels.mixed_precision import MixedPrecisionKernel
from vllm_subspec.weights.quantized_weight import QuantFormat

logger = init_logger(__name__)

_GROUP_SIZES = (64, 32, 128, 256, -1)
"""Of the option, in the order in which they are advised."""

# Of several for one width, the first that is available.
_KERNELS: dict[str, tuple[type[SubstituteKernel], ...]] = {
    "cpu": (Int4VnniKernel, TorchInt4Kernel, OneDnnInt8Kernel),
    "cuda": (MixedPrecisionKernel,),
}


def choose(
    bits: int, group_size: int | None, device: torch.device, dtype: torch.dtype
) -> tuple[type[SubstituteKernel], QuantFormat]:
    """The kernel for codes of ``bits`` bits on ``device``, and the format to quantise to.

    A width without a kernel is carried in the next wider one that has: its codes stay as they are
    in a wider container. ``group_size`` None leaves the groups to the kernel; a kernel of one scale
    per row overrides any. Both are logged once.

    Raises:
        ValueError: no kernel for that width, or for groups of that size, on this device.
    """
    able = [
        (width, kernel)
        for kernel in _KERNELS.get(device.type, ())
        if kernel.available(device, dtype)
        for width in kernel.container_bits
    ]
    width, kernel = min(
        ((w, k) for w, k in able if w >= bits), key=lambda item: item[0], default=(None, None)
    )
    if kernel is None:
        widths = ", ".join(str(w) for w in sorted({w for w, _ in able})) or "no width at all"
        raise ValueError(
            f"bits {bits}: no kernel for this {device.type} and {dtype}, which has: {widths}"
        )
    fmt = kernel.format_for(bits, group_size)
    carried = "" if bits == width else f", carried in its {width}-bit container"
    logger.info_once("Substitutes of %d bits use %s%s.", bits, kernel.name, carried)
    if group_size is not None and fmt.group_size != group_size:
        logger.info_once(
            "%s has one scale per output row: group_size %d has no effect.", kernel.name, group_size
        )
    return kernel, fmt


def estimate_nbytes(
    bits: int, group_size: int | None, device: torch.device, rows: int, columns: int
) -> int:
    """Bytes that the substitute of a weight [rows, columns] will take on ``device``.

    Raises ValueError as ``choose`` does, or when the kernel cannot hold that shape.
    """
    kernel, fmt = choose(bits, group_size, device, torch.bfloat16)
    reason = kernel.refusal(fmt, rows, columns)
    if reason is not None:
        raise ValueError(
            f"{kernel.name} cannot hold a weight of shape {(rows, columns)}: {reason}"
            + _remedy(kernel, bits, rows, columns)
        )
    return kernel.estimate_nbytes(fmt, rows, columns)


def _remedy(kernel: type[SubstituteKernel], bits: int, rows: int, columns: int) -> str:
    for size in _GROUP_SIZES:
        with suppress(ValueError):
            if kernel.refusal(kernel.format_for(bits, size), rows, columns) is None:
                return f'; set "group_size": {size}'
    return ""
