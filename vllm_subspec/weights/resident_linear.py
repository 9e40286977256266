# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Full-precision linears that stay on a CPU: resident layers, output layers, drafting models.

vLLM packs their weights for oneDNN and, where oneDNN has no kernel (16-bit weights below AVX-512,
float16 on most CPUs), falls back to torch's product, which from a few tokens on is several times
slower than memory. Our own linear reads the weight as it was loaded; it takes the place of vLLM's
where it has been measured to be faster, and then nothing is packed.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import vllm._custom_ops as ops
from torch import Tensor
from torch.nn import functional
from vllm.logger import init_logger
from vllm.model_executor.layers import utils
from vllm.platforms import current_platform

from vllm_subspec.weights.kernels import measured
from vllm_subspec.weights.plain_linear import OWN, own_linear

logger = init_logger(__name__)

VLLM = "vLLM's packed"
FALLBACK = "vLLM's fallback"


@functools.cache
def measure(dtype: torch.dtype) -> dict[str, measured.Seconds]:
    """Seconds of a product with our linear and with the one that vLLM has here, by name and
    tokens. Nothing where ours cannot compute, or vLLM's is another library's (zentorch)."""
    own = own_linear(dtype)
    if own is None or current_platform.is_zen_cpu():
        return {}
    rows, columns = measured.SHAPE
    weights = functools.partial(torch.full, (rows, columns), 1 / columns, dtype=dtype)

    def plain() -> measured.Product:
        weight = weights()
        return lambda x: own(x, weight, None)

    def packed() -> measured.Product:
        handler = ops.create_onednn_mm(weights().t(), 32)
        return lambda x: ops.onednn_mm(handler, x, None)

    def fallback() -> measured.Product:
        weight = weights()
        return lambda x: functional.linear(x, weight)

    nbytes = rows * columns * dtype.itemsize
    return measured.seconds(
        f"resident, {str(dtype).removeprefix('torch.')}",
        {
            OWN: measured.Candidate(plain, nbytes),
            VLLM: measured.Candidate(packed, nbytes),
            FALLBACK: measured.Candidate(fallback, nbytes),
        },
    )


@functools.cache
def replaces_vllm(dtype: torch.dtype) -> bool:
    """Whether resident weights of ``dtype`` are computed with our linear, and hence not packed."""
    found = measure(dtype)
    theirs = found.get(VLLM) or found.get(FALLBACK)
    if OWN not in found or theirs is None:
        return False
    ours = measured.typical(found[OWN]) < measured.typical(theirs)
    logger.info_once("Resident linears of %s are %s.", dtype, "our own" if ours else "vLLM's")
    return ours


@contextlib.contextmanager
def resident_linears() -> Iterator[None]:
    """While vLLM loads models: linears that are computed faster with ours are not packed."""
    original = utils.dispatch_cpu_unquantized_gemm

    @functools.wraps(original)
    def dispatch(layer: Any, remove_weight: bool) -> None:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        plain = not weight.is_meta and weight.ndim == 2 and weight.is_contiguous()
        if plain and replaces_vllm(weight.dtype):
            layer.cpu_linear = resident_linear
        else:
            original(layer, remove_weight)

    utils.dispatch_cpu_unquantized_gemm = dispatch
    try:
        yield
    finally:
        utils.dispatch_cpu_unquantized_gemm = original


def resident_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x`` [..., in] times ``weight`` [out, in]: what takes the place of vLLM's `cpu_linear`."""
    rows = x.reshape(-1, x.shape[-1])
    out: Tensor = torch.ops.vllm_subspec.linear.default(rows, weight, bias)
    return out.view(*x.shape[:-1], weight.shape[0])
