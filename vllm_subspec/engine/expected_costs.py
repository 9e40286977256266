# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""What rounds will cost, before the first one: measured on the loaded weights of a CPU.

A draft step reads all substitutes and computes logits; a pass of the target waits for its streamed
weights or, with many tokens, for their products. So the kernels that will compute are called on the
weights that they will read, with nothing between them. Attention and norms are left out: the first
rounds correct it.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearBase

from vllm_subspec.core.cost import ExpectedCosts
from vllm_subspec.engine import ranks
from vllm_subspec.engine.loading import Loading
from vllm_subspec.weights.kernels import SubstituteKernel
from vllm_subspec.weights.ring import Ring

_TOKENS = (1, 32)
_TRIES = 2


def expected_costs(loading: Loading, target: Any, hidden: int) -> ExpectedCosts | None:
    """Expected costs of one request; None where nothing streams, or experts draft.

    Args:
        target: a vLLM model, with its streamed weights in the ring's slots.
        hidden: width of its hidden state.
    """
    if loading.ring is None:
        return None
    stream = _stream_seconds(loading, loading.ring)
    found = list(loading.substitutes.values())
    kernels = [kernel for kernel in found if isinstance(kernel, SubstituteKernel)]
    if len(kernels) < len(found):
        return None
    dtype = next(target.parameters()).dtype
    step, verify = [], []
    with torch.inference_mode():
        for tokens in _TOKENS:
            head = _seconds(target.compute_logits, tokens, hidden, dtype)
            products = [_seconds(kernel, tokens, kernel.columns, dtype) for kernel in kernels]
            step.append(head + sum(products))
            verify.append(max(stream, head + _product_seconds(loading, tokens, dtype)))
    # All ranks have come here, whatever each has read: logits are computed by all of them together.
    stream, *agreed = ranks.agree([stream, *step, *verify])
    if not stream:
        return None
    return ExpectedCosts(
        dict(zip(_TOKENS, agreed[: len(step)], strict=True)),
        dict(zip(_TOKENS, agreed[len(step) :], strict=True)),
    )


def _stream_seconds(loading: Loading, ring: Ring) -> float:
    """Time to stream all weights once, at the rate of the reads so far: those that fill the ring
    before the first pass, and those of passes that warm up. 0 before any has ended."""
    reads = ring.transfer.loads
    if not reads:
        return 0.0
    seconds = sum(read.ended - read.began for read in reads)
    nbytes = sum(ring.block_nbytes[read.block] for read in reads)
    return loading.plan.store_bytes * seconds / nbytes


def _product_seconds(loading: Loading, tokens: int, dtype: torch.dtype) -> float:
    """Time of the target's linears: one streamed layer speaks for all of them, and one resident."""
    layers, plan = loading.offloader.layers, loading.plan
    return sum(
        len(alike) * _layer_seconds(layers[alike[0]], tokens, dtype)
        for alike in (plan.streamed, plan.resident)
        if alike
    )


def _layer_seconds(layer: nn.Module, tokens: int, dtype: torch.dtype) -> float:
    seconds = 0.0
    for linear in layer.modules():
        if isinstance(linear, LinearBase):
            columns = getattr(linear, "input_size_per_partition", linear.input_size)
            product = functools.partial(linear.quant_method.apply, linear)
            seconds += _seconds(product, tokens, columns, dtype)
    return seconds


def _seconds(
    call: Callable[[torch.Tensor], Any], tokens: int, columns: int, dtype: torch.dtype
) -> float:
    x = torch.zeros(tokens, columns, dtype=dtype)
    fastest = float("inf")
    for _ in range(_TRIES):
        began = time.perf_counter()
        call(x)
        fastest = min(fastest, time.perf_counter() - began)
    return fastest
