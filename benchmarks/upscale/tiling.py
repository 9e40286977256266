# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Net2Net's arithmetic on single tensors: a linear that maps tiled inputs to tiled outputs."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor


def widen(
    weight: Tensor,
    copies: tuple[int, int],
    noise: float,
    dtype: torch.dtype,
    seed: int,
    keep: bool = True,
) -> Iterator[Tensor]:
    """Tile a linear's weight [N, K] to [outputs N, inputs K], where `copies` is (outputs, inputs).

    Yields its blocks of rows [N, inputs K] in `dtype`, one for each output copy. `noise` is the
    noise's standard deviation over that of weight / inputs. With `keep` false the result is the
    noise alone: a linear that maps every tiled input to zero. The rounding error of one input copy
    is carried into the next, so that rounding leaves the sum over copies off by one rounding, not
    by `inputs` of them. A block is made in six bytes of memory for each of its elements or so.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = weight.float()
    rows, columns = weight.shape
    outputs, inputs = copies
    share = weight / inputs if keep else torch.zeros_like(weight)
    deviation = 0.0
    if noise and inputs > 1:
        # Taking the mean out of independent draws leaves 1 - 1 / inputs of their variance.
        deviation = noise * float(weight.std()) / inputs / math.sqrt(1 - 1 / inputs)
    error = torch.zeros(inputs, rows, columns)
    for _ in range(outputs):
        if deviation:
            error.normal_(generator=generator).mul_(deviation)
            error -= error.mean(dim=0)
        else:
            error.zero_()
        block = torch.empty(rows, inputs, columns, dtype=dtype)
        carry = share.new_zeros(())
        for copy in range(inputs):
            exact = error[copy].add_(share).add_(carry)
            block[:, copy] = exact
            carry = exact - block[:, copy]
        yield block.view(rows, inputs * columns)


def layer_plan(source_layers: int, layers: int) -> list[tuple[int, bool]]:
    """(source layer, keeps its function) of each new layer, the added ones spread evenly."""
    starts = [index * source_layers // layers for index in range(layers + 1)]
    return [(start, end > start) for start, end in zip(starts, starts[1:], strict=False)]
