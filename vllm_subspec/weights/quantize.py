# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Data-free weight quantisation: round to nearest (RTN) and half-quadratic (HQQ).

A weight W [N, K] is cut into groups of `group_size` columns. Each group has one scale s and one
integer zero point z, and every element a code q in [0, 2**bits); W is about (q - z) * s. How
scales and zero points are found is in scale_search.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from vllm_subspec.weights.scale_search import SCALE_SEARCH, min_max_parameters, nearest_steps

Quantizer = Literal["hqq", "rtn"]

SUPPORTED_BITS = (2, 3, 4, 8)

# Elements worked on at a time; temporary memory is about six float32 tensors of this size. On a
# CPU: for each thread as few as keep the temporaries near its L2 cache, yet enough to hide the cost
# of dispatching an operation. On an accelerator: enough to fill it.
CHUNK_ELEMENTS_PER_THREAD = 1 << 16
CHUNK_ELEMENTS_DEVICE = 1 << 24

# Up to this group size the groups are laid out as columns: reductions and broadcasts then run over
# long contiguous rows, which is several times faster than many short ones.
_COLUMN_LAYOUT_MAX_GROUP = 256


@dataclass(frozen=True)
class QuantFormat:
    """How a linear layer's weight is coded.

    `bits` is 2, 3, 4 or 8. `group_size` is in columns; -1 means one group per output row.
    `symmetric` fixes every zero point at 2**(bits - 1); otherwise zero points are stored.
    """

    bits: int
    group_size: int
    symmetric: bool = False

    def __post_init__(self) -> None:
        if self.bits not in SUPPORTED_BITS:
            raise ValueError(f"bits must be one of {SUPPORTED_BITS}, not {self.bits}")
        if self.group_size != -1 and self.group_size < 1:
            raise ValueError(f"group_size must be positive, or -1 for rows, not {self.group_size}")

    @property
    def max_code(self) -> int:
        return (1 << self.bits) - 1

    def columns_per_group(self, columns: int) -> int:
        """Columns in each group of a weight with `columns` columns.

        Raises ValueError when the group size does not divide `columns`.
        """
        if self.group_size == -1:
            return columns
        if columns % self.group_size:
            raise ValueError(
                f"group_size {self.group_size} does not divide the {columns} columns of the weight"
            )
        return self.group_size


@dataclass(frozen=True)
class QuantizedWeight:
    """A quantised weight of shape [N, K] with G = K / group size groups per row.

    codes: uint8 [N, K], values in [0, 2**bits). scales: floating point [N, G].
    zeros: uint8 [N, G], integer zero points in [0, 2**bits).
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    format: QuantFormat

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(codes - zeros) * scales, computed in float32; [N, K] of `dtype`."""
        rows, groups = self.scales.shape
        steps = self.codes.view(rows, groups, -1).float() - self.zeros.unsqueeze(-1)
        return steps.mul_(self.scales.unsqueeze(-1)).view_as(self.codes).to(dtype)

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same weight on another device."""
        return QuantizedWeight(
            self.codes.to(device), self.scales.to(device), self.zeros.to(device), self.format
        )

    def rows(self, start: int, count: int) -> QuantizedWeight:
        """Output rows [start, start + count), as views."""
        part = slice(start, start + count)
        return QuantizedWeight(self.codes[part], self.scales[part], self.zeros[part], self.format)

    def columns(self, start: int, count: int) -> QuantizedWeight:
        """Input columns [start, start + count), as copies.

        Raises ValueError when the cut goes through a group.
        """
        group = self.format.group_size
        groups = slice(None)
        if group != -1:
            if start % group or count % group:
                raise ValueError(
                    f"columns {start} to {start + count} cut through groups of {group} columns"
                )
            groups = slice(start // group, (start + count) // group)
        return QuantizedWeight(
            self.codes[:, start : start + count].contiguous(),
            self.scales[:, groups].contiguous(),
            self.zeros[:, groups].contiguous(),
            self.format,
        )

    @staticmethod
    def concatenate(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
        """Weights of one input under each other, as fused linears want them.

        Raises ValueError when their widths or formats differ (apart from symmetry: symmetric parts
        have explicit zero points here too).
        """
        first = parts[0].format
        symmetric = all(part.format.symmetric for part in parts)
        for part in parts[1:]:
            same = (part.format.bits, part.format.group_size) == (first.bits, first.group_size)
            if not same or part.codes.shape[1] != parts[0].codes.shape[1]:
                raise ValueError(
                    f"weights of {first} x {parts[0].codes.shape[1]} columns and {part.format} x "
                    f"{part.codes.shape[1]} columns cannot be joined"
                )
        if len(parts) == 1:
            return parts[0]
        return QuantizedWeight(
            torch.cat([part.codes for part in parts]),
            torch.cat([part.scales for part in parts]),
            torch.cat([part.zeros for part in parts]),
            replace(first, symmetric=symmetric),
        )


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
