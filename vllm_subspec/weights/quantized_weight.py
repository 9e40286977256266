# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""A quantised weight matrix: W [N, K] is about (q - z) * s.

It is cut into groups of columns; each group has one scale s and one integer zero point z, and every
element a code q in [0, 2**bits).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

SUPPORTED_BITS = (2, 3, 4, 8)


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
