# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Data-free weight quantisation: round to nearest (RTN) and half-quadratic (HQQ).

A weight W [N, K] is cut into groups of `group_size` columns. Each group has one scale s and one
integer zero point z, and every element a code q in [0, 2**bits); W is about (q - z) * s. How
scales and zero points are found is in scale_search.py.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vllm_subspec.weights.quantized_weight import QuantFormat, QuantizedWeight
from vllm_subspec.weights.scale_search import SCALE_SEARCH, min_max_parameters, nearest_steps

Quantizer = Literal["hqq", "rtn"]

# Elements worked on at a time; temporary memory is about six float32 tensors of this size. On a
# CPU: for each thread as few as keep the temporaries near its L2 cache, yet enough to hide the cost
# of dispatching an operation. On an accelerator: enough to fill it.
CHUNK_ELEMENTS_PER_THREAD = 1 << 16
CHUNK_ELEMENTS_DEVICE = 1 << 24

# Up to this group size the groups are laid out as columns: reductions and broadcasts then run over
# long contiguous rows, which is several times faster than many short ones.
_COLUMN_LAYOUT_MAX_GROUP = 256


def quantize(
    weight: Tensor,
    fmt: QuantFormat,
    quantizer: Quantizer = "hqq",
    scale_dtype: torch.dtype = torch.bfloat16,
) -> QuantizedWeight:
    """Quantise a floating-point weight [N, K] on the device it is on.

    Scales are rounded to `scale_dtype` before codes are chosen. "hqq" keeps, for each group, the
    scale of RTN unless its own has the lower l_p error, so it is never worse than "rtn" in that
    norm. Deterministic. Raises ValueError when the weight is not a finite floating-point matrix,
    the group size does not divide K, the quantiser is unknown, or a scale overflows `scale_dtype`.
    """
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(
            f"only a floating-point matrix can be quantised, not {weight.dtype} of shape "
            f"{tuple(weight.shape)}"
        )
    if quantizer not in SCALE_SEARCH:
        raise ValueError(f"quantizer must be one of {tuple(SCALE_SEARCH)}, not {quantizer!r}")
    weight = weight.detach()
    rows, columns = weight.shape
    group = fmt.columns_per_group(columns)
    groups = columns // group if group else 0
    device = weight.device
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=device)
    scales = torch.empty(rows, groups, dtype=scale_dtype, device=device)
    zeros = torch.empty(rows, groups, dtype=torch.uint8, device=device)

    if device.type == "cpu":
        chunk = CHUNK_ELEMENTS_PER_THREAD * torch.get_num_threads()
    else:
        chunk = CHUNK_ELEMENTS_DEVICE
    step = max(1, chunk // max(1, columns))
    search = SCALE_SEARCH[quantizer]
    dim = 0 if group <= _COLUMN_LAYOUT_MAX_GROUP else 1

    for start in range(0, rows, step):
        part = slice(start, start + step)
        x = weight[part].reshape(-1, group)
        x = (x.t() if dim == 0 else x).to(torch.float32, memory_format=torch.contiguous_format)
        scale, zero = min_max_parameters(x, fmt, scale_dtype, dim)
        scale = search(x, scale, zero, fmt, scale_dtype, dim)
        code = nearest_steps(x, scale, zero, fmt).add_(zero).to(torch.uint8)
        codes[part] = (code.t() if dim == 0 else code).reshape(-1, columns)
        scales[part] = scale.view(-1, groups)
        zeros[part] = zero.view(-1, groups)
    return QuantizedWeight(codes, scales, zeros, fmt)
