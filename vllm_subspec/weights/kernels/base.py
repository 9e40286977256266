# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""What every substitute kernel is: a packed low-bit weight that multiplies activations."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from vllm_subspec.weights.quantized_weight import QuantFormat, QuantizedWeight


class SubstituteKernel(nn.Module, ABC):
    """A linear layer on a quantised weight [N, K], packed for one device.

    Takes and returns ``dtype``, whatever it computes in. What it packed is all it keeps: the codes
    it was made from are not referenced afterwards.

    Args:
        weight: codes of at most ``container_bits`` bits, on the device to compute on.
        dtype: dtype of activations, bias and output.

    Raises:
        ValueError: this kernel cannot hold a weight of that format and shape.
    """

    name: ClassVar[str]
    container_bits: ClassVar[tuple[int, ...]]
    """Widths this kernel stores; narrower codes are kept as they are in a wider container."""

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype) -> None:
        super().__init__()
        rows, columns = weight.codes.shape
        reason = self.refusal(weight.format, rows, columns)
        if reason is not None:
            raise ValueError(
                f"{self.name} cannot hold a weight of shape {(rows, columns)}: {reason}"
            )
        self.rows = rows
        self.columns = columns
        self.dtype = dtype
        self._pack(weight)

    @classmethod
    @abstractmethod
    def available(cls, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether this machine computes it, and computes it right, on that device."""

    @classmethod
    @abstractmethod
    def format_for(cls, bits: int, group_size: int | None) -> QuantFormat:
        """The format to quantise to for ``bits`` and ``group_size`` (None: the kernel's choice).

        Raises ValueError naming group_size when the kernel has no such groups.
        """

    @classmethod
    @abstractmethod
    def refusal(cls, fmt: QuantFormat, rows: int, columns: int) -> str | None:
        """Why a weight of this format and shape [rows, columns] cannot be held; None if it can."""

    @classmethod
    @abstractmethod
    def estimate_nbytes(cls, fmt: QuantFormat, rows: int, columns: int) -> int:
        """Bytes that a weight of this format and shape will take."""

    @abstractmethod
    def _pack(self, weight: QuantizedWeight) -> None:
        """Turn codes, scales and zero points into this kernel's own buffers."""

    @abstractmethod
    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x`` [M, K] times the weight's transpose, plus ``bias`` [N]: [M, N] of ``dtype``."""

    @property
    def nbytes(self) -> int:
        """Bytes held for the packed weight."""
        held = (*self.buffers(), *self.parameters())
        return sum(tensor.numel() * tensor.element_size() for tensor in held)


def largest_group(columns_per_group: int, allowed: Sequence[int]) -> int | None:
    """The largest allowed group size that divides a group, so that splitting it loses nothing."""
    return max((size for size in allowed if columns_per_group % size == 0), default=None)


def split_groups(weight: QuantizedWeight, group: int) -> tuple[Tensor, Tensor]:
    """Scales and zero points [N, K / group] of the same weight in smaller groups."""
    parts = weight.format.columns_per_group(weight.codes.shape[1]) // group
    return (
        weight.scales.repeat_interleave(parts, dim=1),
        weight.zeros.repeat_interleave(parts, dim=1),
    )
