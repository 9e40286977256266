# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""4-bit weights on the CPU: torch's int4 weight-only matrix product."""

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from vllm_subspec.weights.kernels.base import SubstituteKernel, largest_group, split_groups
from vllm_subspec.weights.quantized_weight import QuantFormat, QuantizedWeight

_ROWS = 16  # the packed layout's block of output rows
# Only bfloat16 activations have a vectorised kernel; float32 and float16 run scalar code, 30 times
# slower, so every other dtype is converted.
_COMPUTE = torch.bfloat16


class CpuInt4Kernel(SubstituteKernel):
    """What the 4-bit kernels of the CPU hold: groups of a multiple of 32 columns, any rows."""

    container_bits = (4,)
    groups: ClassVar[tuple[int, ...]]
    """Columns per group that the kernel computes with; other groups are split into these."""

    @classmethod
    def format_for(cls, bits: int, group_size: int | None) -> QuantFormat:
        size = 64 if group_size is None else group_size
        if size != -1 and largest_group(size, cls.groups) is None:
            raise ValueError(
                f"group_size {size} has no {bits}-bit kernel on this CPU: use a multiple of 32 "
                "or -1"
            )
        return QuantFormat(bits, size)

    @classmethod
    def refusal(cls, fmt: QuantFormat, rows: int, columns: int) -> str | None:
        if fmt.bits > 4:
            return f"its codes have {fmt.bits} bits, more than 4"
        if fmt.group_size != -1 and columns % fmt.group_size:
            return f"group_size {fmt.group_size} does not divide its {columns} columns"
        if largest_group(fmt.columns_per_group(columns), cls.groups) is None:
            return f"its groups of {fmt.columns_per_group(columns)} columns are no multiple of 32"
        return None

    @classmethod
    def kernel_group(cls, fmt: QuantFormat, columns: int) -> int:
        """The groups that a weight that is not refused is split into."""
        return largest_group(fmt.columns_per_group(columns), cls.groups) or columns


class TorchInt4Kernel(CpuInt4Kernel):
    """``aten::_weight_int4pack_mm_for_cpu``: exact codes, bfloat16 activations.

    torch computes (code - 8) * scale + offset with both in bfloat16; an integer zero point z is
    handed over as the offset (8 - z) * scale.
    """

    name = "torch int4pack"
    groups = (256, 128, 64, 32)
    packed: Tensor
    scales_and_zeros: Tensor

    @classmethod
    def available(cls, device: torch.device, dtype: torch.dtype) -> bool:
        return device.type == "cpu" and dtype.is_floating_point

    @classmethod
    def estimate_nbytes(cls, fmt: QuantFormat, rows: int, columns: int) -> int:
        group = cls.kernel_group(fmt, columns)
        rows += -rows % _ROWS
        return rows * columns // 2 + 2 * rows * (columns // group) * _COMPUTE.itemsize

    def _pack(self, weight: QuantizedWeight) -> None:
        self.group = self.kernel_group(weight.format, self.columns)
        scales, zeros = split_groups(weight, self.group)
        padding = (0, 0, 0, -self.rows % _ROWS)
        # Narrower codes go to the middle of the container: their offsets are then small, and so is
        # the error of rounding them.
        shift = 8 - (1 << (weight.format.bits - 1))
        codes = pad(weight.codes, padding).to(torch.int32) + shift
        scales = pad(scales, padding).float().t()
        offsets = (8 - shift - pad(zeros, padding).float().t()) * scales
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        self.register_buffer("packed", packed, persistent=False)
        both = torch.stack((scales, offsets), dim=-1).to(_COMPUTE)
        self.register_buffer("scales_and_zeros", both, persistent=False)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        out = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.to(_COMPUTE), self.packed, self.group, self.scales_and_zeros
        )
        if out.shape[1] != self.rows:
            out = out[:, : self.rows].contiguous()
        out = out.to(self.dtype)
        return out if bias is None else out.add_(bias)
