# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Which kernel carries which width on which device.

On a CPU by measurement (`measured`). Kernels that were considered and left out: vLLM's CPUWNA16 is
always slower than bfloat16; torch's ``_dyn_quant_matmul_4bit`` has only scalar reference code on
x86; the per-tensor dynamic linears of fbgemm make the tokens of a batch depend on each other. On
CUDA vLLM chooses: Machete on Hopper, else Marlin.
"""

import functools
from collections.abc import Mapping
from contextlib import suppress

import torch
from vllm.logger import init_logger

from vllm_subspec.weights.kernels import measured
from vllm_subspec.weights.kernels.base import SubstituteKernel
from vllm_subspec.weights.kernels.cpu_int4 import TorchInt4Kernel
from vllm_subspec.weights.kernels.cpu_int8 import OneDnnInt8Kernel, TorchInt8Kernel
from vllm_subspec.weights.kernels.cpu_own import OwnInt4Kernel, OwnInt8Kernel
from vllm_subspec.weights.kernels.mixed_precision import MixedPrecisionKernel
from vllm_subspec.weights.quantized_weight import QuantFormat, QuantizedWeight

logger = init_logger(__name__)

_GROUP_SIZES = (64, 32, 128, 256, -1)
"""Of the option, in the order in which they are advised."""

Kernel = type[SubstituteKernel]

# Of several for one width that are about as fast, the first.
_KERNELS: dict[str, tuple[Kernel, ...]] = {
    "cpu": (OwnInt4Kernel, TorchInt4Kernel, OwnInt8Kernel, OneDnnInt8Kernel, TorchInt8Kernel),
    "cuda": (MixedPrecisionKernel,),
}
_DRAFTED = (1, 8, 32)
"""Tokens of the passes that decide: those of a draft."""
_CLEARLY = 1.1
"""How many times as fast a later kernel must be to be taken."""


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
    able: dict[int, list[Kernel]] = {}
    for kernel in _KERNELS.get(device.type, ()):
        if kernel.available(device, dtype):
            for width in kernel.container_bits:
                able.setdefault(width, []).append(kernel)
    wide_enough = [width for width in able if width >= bits]
    if not wide_enough:
        widths = ", ".join(map(str, sorted(able))) or "no width at all"
        raise ValueError(
            f"bits {bits}: no kernel for this {device.type} and {dtype}, which has: {widths}"
        )
    width = min(wide_enough)
    kernel = _fastest(tuple(able[width]), dtype) if device.type == "cpu" else able[width][0]
    fmt = kernel.format_for(bits, group_size)
    carried = "" if bits == width else f", carried in its {width}-bit container"
    logger.info_once("Substitutes of %d bits use %s%s.", bits, kernel.name, carried)
    if group_size is not None and fmt.group_size != group_size:
        logger.info_once(
            "%s has one scale per output row: group_size %d has no effect.", kernel.name, group_size
        )
    return kernel, fmt


def estimate_nbytes(
    bits: int,
    group_size: int | None,
    device: torch.device,
    dtype: torch.dtype,
    rows: int,
    columns: int,
) -> int:
    """Bytes that the substitute of a weight [rows, columns] will take on ``device``.

    Raises ValueError as ``choose`` does, or when the kernel cannot hold that shape.
    """
    kernel, fmt = choose(bits, group_size, device, dtype)
    reason = kernel.refusal(fmt, rows, columns)
    if reason is not None:
        raise ValueError(
            f"{kernel.name} cannot hold a weight of shape {(rows, columns)}: {reason}"
            + _remedy(kernel, bits, rows, columns)
        )
    return kernel.estimate_nbytes(fmt, rows, columns)


def candidates(
    bits: int, dtype: torch.dtype, shape: tuple[int, int] = measured.SHAPE
) -> dict[str, measured.Candidate]:
    """The kernels of this CPU for codes of ``bits`` bits, 4 or 8, by name, the preferred first.

    Args:
        shape: rows and columns of the weights that they are to be measured with.
    """
    cpu = torch.device("cpu")
    able = [k for k in _KERNELS["cpu"] if bits in k.container_bits and k.available(cpu, dtype)]
    return _candidates(tuple(able), dtype, shape)


@functools.cache
def _fastest(kernels: tuple[Kernel, ...], dtype: torch.dtype) -> Kernel:
    """The first of ``kernels``, all of one width, unless another is clearly faster."""
    if len(kernels) == 1:
        return kernels[0]
    (width,) = kernels[0].container_bits
    family = f"{width} bits, {str(dtype).removeprefix('torch.')}"
    found = measured.seconds(family, _candidates(kernels, dtype, measured.SHAPE))
    name = fastest(found, kernels[0].name)
    return next(kernel for kernel in kernels if kernel.name == name)


def fastest(found: Mapping[str, measured.Seconds], preferred: str) -> str:
    """The name of the fastest on the whole of a draft's passes, or ``preferred`` if that is about
    as fast."""
    whole = {name: measured.typical(times, _DRAFTED) for name, times in found.items()}
    best = min(whole, key=lambda name: whole[name])
    if preferred in whole and whole[preferred] < _CLEARLY * whole[best]:
        return preferred
    return best


def _candidates(
    kernels: tuple[Kernel, ...], dtype: torch.dtype, shape: tuple[int, int]
) -> dict[str, measured.Candidate]:
    (width,) = kernels[0].container_bits
    fmt = kernels[0].format_for(width, None)
    weight = functools.cache(lambda: _some_weight(fmt, shape))  # as long as the candidates live

    def candidate(kernel: Kernel) -> measured.Candidate:
        nbytes = kernel.estimate_nbytes(fmt, *shape)
        return measured.Candidate(lambda: kernel(weight(), dtype), nbytes)

    return {kernel.name: candidate(kernel) for kernel in kernels}


def _some_weight(fmt: QuantFormat, shape: tuple[int, int]) -> QuantizedWeight:
    rows, columns = shape
    groups = columns // fmt.columns_per_group(columns)
    zeros = torch.full((rows, groups), 1 << (fmt.bits - 1), dtype=torch.uint8)
    codes = torch.randint(0, fmt.max_code + 1, (rows, columns), dtype=torch.uint8)
    scales = torch.full((rows, groups), 1 / columns, dtype=torch.bfloat16)
    return QuantizedWeight(codes, scales, zeros, fmt)


def _remedy(kernel: type[SubstituteKernel], bits: int, rows: int, columns: int) -> str:
    for size in _GROUP_SIZES:
        with suppress(ValueError):
            if kernel.refusal(kernel.format_for(bits, size), rows, columns) is None:
                return f'; set "group_size": {size}'
    return ""
