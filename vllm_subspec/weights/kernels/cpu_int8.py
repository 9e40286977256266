# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""8-bit weights on the CPU: oneDNN's int8 matrix product through vLLM's handles."""

import torch
import vllm._custom_ops as ops
from torch import Tensor

from vllm_subspec.weights.kernels.base import SubstituteKernel
from vllm_subspec.weights.quantize import quantize
from vllm_subspec.weights.quantized_weight import QuantFormat, QuantizedWeight

_FORMAT = QuantFormat(8, -1, symmetric=True)


class OneDnnInt8Kernel(SubstituteKernel):
    """W8A8: int8 weights with a scale per output row, activations quantised per token as they come.

    A token's result does not depend on the other tokens of the batch. A weight in groups or with
    zero points (an existing checkpoint) is coded anew, one scale per row.
    """

    name = "oneDNN W8A8"
    container_bits = (8,)
    scales: Tensor

    @classmethod
    def available(cls, device: torch.device, dtype: torch.dtype) -> bool:
        # Without VNNI, oneDNN adds pairs of products in 16 bits, which saturates.
        if device.type != "cpu" or not dtype.is_floating_point:
            return False
        capabilities = torch.cpu.get_capabilities()
        vnni = any(capabilities.get(name) for name in ("avx512_vnni", "avx_vnni"))
        return vnni and hasattr(torch.ops._C, "create_onednn_scaled_mm_handler")

    @classmethod
    def format_for(cls, bits: int, group_size: int | None) -> QuantFormat:
        return _FORMAT

    @classmethod
    def refusal(cls, fmt: QuantFormat, rows: int, columns: int) -> str | None:
        return None

    @classmethod
    def estimate_nbytes(cls, fmt: QuantFormat, rows: int, columns: int) -> int:
        return rows * columns + rows * torch.float32.itemsize

    def _pack(self, weight: QuantizedWeight) -> None:
        if weight.format != _FORMAT:
            weight = quantize(weight.dequantize(), _FORMAT, "rtn", torch.float32)
        self._compute = torch.float32 if self.dtype == torch.float16 else self.dtype
        signed = (weight.codes ^ 0x80).view(torch.int8)  # code - 128
        # The handle owns a packed copy of the codes but only points at the scales.
        self.register_buffer("scales", weight.scales.float().t().contiguous(), persistent=False)
        self._handle = ops.create_onednn_scaled_mm(
            signed.t(), self.scales, self._compute, True, False, 32
        )

    @property
    def nbytes(self) -> int:
        return self.estimate_nbytes(_FORMAT, self.rows, self.columns)

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
