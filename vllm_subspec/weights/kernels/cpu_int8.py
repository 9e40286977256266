# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""8-bit weights on the CPU: the products of libraries, one scale for each output row."""

from abc import abstractmethod
from typing import ClassVar

import torch
import vllm._custom_ops as ops
from torch import Tensor
from torch.nn.functional import pad

from vllm_subspec.weights.kernels.base import SubstituteKernel
from vllm_subspec.weights.quantize import quantize
from vllm_subspec.weights.quantized_weight import QuantFormat, QuantizedWeight


class CpuInt8Kernel(SubstituteKernel):
    """What the 8-bit kernels of the CPU hold: any rows and columns.

    A weight in groups or with zero points (an existing checkpoint) is coded anew, by rows.
    """

    container_bits = (8,)
    format: ClassVar = QuantFormat(8, -1, symmetric=True)

    @classmethod
    def format_for(cls, bits: int, group_size: int | None) -> QuantFormat:
        return cls.format

    @classmethod
    def refusal(cls, fmt: QuantFormat, rows: int, columns: int) -> str | None:
        return None

    @classmethod
    def estimate_nbytes(cls, fmt: QuantFormat, rows: int, columns: int) -> int:
        return rows * columns + rows * torch.float32.itemsize

    def _pack(self, weight: QuantizedWeight) -> None:
        if weight.format != self.format:
            weight = quantize(weight.dequantize(), self.format, "rtn", torch.float32)
        self._pack_rows(weight.codes, weight.scales)

    @abstractmethod
    def _pack_rows(self, codes: Tensor, scales: Tensor) -> None:
        """Take uint8 codes [N, K] around 128 and scales [N, 1]."""


class OneDnnInt8Kernel(CpuInt8Kernel):
    """oneDNN's W8A8 through vLLM's handles: activations quantized per token as they come.

    A token's result does not depend on the other tokens of the batch.
    """

    name = "oneDNN W8A8"
    scales: Tensor

    @classmethod
    def available(cls, device: torch.device, dtype: torch.dtype) -> bool:
        # Without VNNI, oneDNN adds pairs of products in 16 bits, which saturates.
        if device.type != "cpu" or not dtype.is_floating_point:
            return False
        capabilities = torch.cpu.get_capabilities()
        vnni = any(capabilities.get(name) for name in ("avx512_vnni", "avx_vnni"))
        return vnni and hasattr(torch.ops._C, "create_onednn_scaled_mm_handler")

    def _pack_rows(self, codes: Tensor, scales: Tensor) -> None:
        self._compute = torch.float32 if self.dtype == torch.float16 else self.dtype
        signed = (codes ^ 0x80).view(torch.int8)  # code - 128
        # The handle owns a packed copy of the codes but only points at the scales.
        self.register_buffer("scales", scales.float().t().contiguous(), persistent=False)
        self._handle = ops.create_onednn_scaled_mm(
            signed.t(), self.scales, self._compute, True, False, 32
        )

    @property
    def nbytes(self) -> int:
        return self.estimate_nbytes(self.format, self.rows, self.columns)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        x = x.to(self._compute).contiguous()
        if bias is not None:
            bias = bias.to(self._compute)
        # vLLM's Python wrappers of these two operations cost as much as the small ones take.
        codes = torch.empty_like(x, dtype=torch.int8)
        scales = torch.empty((x.shape[0], 1), dtype=torch.float32)
        out = torch.empty((x.shape[0], self.rows), dtype=self._compute)
        torch.ops._C.dynamic_scaled_int8_quant.default(codes, x, scales, None)
        torch.ops._C.onednn_scaled_mm.default(
            out, codes, scales, None, None, bias, self._handle.handler_tensor
        )
        return out.to(self.dtype)


# Only bfloat16 activations have a vectorized kernel in torch. It reads and writes whole blocks of
# rows and columns, without a look at where they end.
_COMPUTE = torch.bfloat16
_BLOCK = 32


class TorchInt8Kernel(CpuInt8Kernel):
    """``aten::_weight_int8pack_mm``: exact codes, bfloat16 activations. On every CPU."""

    name = "torch int8pack"
    codes: Tensor
    scales: Tensor

    @classmethod
    def available(cls, device: torch.device, dtype: torch.dtype) -> bool:
        return device.type == "cpu" and dtype.is_floating_point

    def _pack_rows(self, codes: Tensor, scales: Tensor) -> None:
        rows, columns = -codes.shape[0] % _BLOCK, -codes.shape[1] % _BLOCK
        signed = pad((codes ^ 0x80).view(torch.int8), (0, columns, 0, rows))
        self.register_buffer("codes", signed.contiguous(), persistent=False)
        scales = pad(scales.flatten().to(_COMPUTE), (0, rows))
        self.register_buffer("scales", scales, persistent=False)

    @classmethod
    def estimate_nbytes(cls, fmt: QuantFormat, rows: int, columns: int) -> int:
        return (rows + -rows % _BLOCK) * (columns + -columns % _BLOCK + _COMPUTE.itemsize)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        x = pad(x.to(_COMPUTE), (0, -self.columns % _BLOCK)).contiguous()
        out = torch.ops.aten._weight_int8pack_mm(x, self.codes, self.scales)
        if out.shape[1] != self.rows:
            out = out[:, : self.rows].contiguous()
        out = out.to(self.dtype)
        return out if bias is None else out.add_(bias)
