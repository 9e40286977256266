# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""4- and 8-bit weights through vLLM's mixed-precision kernels (Machete, Marlin, ...)."""

import torch
from torch import Tensor
from vllm.model_executor.kernels.linear import MPLinearLayerConfig, choose_mp_linear_kernel
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    pack_quantized_values_into_int32,
)
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.parameter import GroupQuantScaleParameter, PackedvLLMParameter
from vllm.platforms import current_platform
from vllm.scalar_type import ScalarType, scalar_types

from vllm_subspec.weights.kernels.base import SubstituteKernel, largest_group, split_groups
from vllm_subspec.weights.quantize import quantize
from vllm_subspec.weights.quantized_weight import QuantFormat, QuantizedWeight

_GROUPS = (128, 64, 32)  # what Marlin has; larger groups are split


def no_w4a16() -> str | None:
    """Why vLLM's CPU build has no product by 4-bit weights in this process; None if it has one.

    vLLM chooses its kernel all the same, and fails at the first product.
    """
    current_platform.import_kernels()
    if hasattr(torch.ops._C, "cpu_gemm_wna16"):
        return None
    return (
        "vLLM's library for CPUs without AVX-512 has no product of 4-bit weights and unquantized "
        "activations (W4A16), so use an unquantized checkpoint or another CPU"
    )


class MixedPrecisionKernel(SubstituteKernel):
    """vLLM's own W4A16 and W8A16 linears, given the parameters of a compressed-tensors checkpoint.

    At 4 bits zero points are kept (uint4); a symmetric weight becomes uint4b8. At 8 bits vLLM's
    kernels are symmetric (uint8b128); an asymmetric weight is coded anew.
    """

    name = "vLLM mixed precision"
    container_bits = (4, 8)

    @classmethod
    def available(cls, device: torch.device, dtype: torch.dtype) -> bool:
        return (
            device.type == "cuda"
            and dtype.is_floating_point
            and current_platform.is_cuda()
            and current_platform.has_device_capability(75)
        )

    @classmethod
    def format_for(cls, bits: int, group_size: int | None) -> QuantFormat:
        size = (64 if bits < 8 else -1) if group_size is None else group_size
        if size != -1 and largest_group(size, _GROUPS) is None:
            raise ValueError(
                f"group_size {size} has no kernel on this GPU: use a multiple of 32, or -1"
            )
        return QuantFormat(bits, size, symmetric=bits == 8)

    @classmethod
    def refusal(cls, fmt: QuantFormat, rows: int, columns: int) -> str | None:
        if fmt.group_size != -1 and columns % fmt.group_size:
            return f"group_size {fmt.group_size} does not divide its {columns} columns"
        if fmt.group_size != -1 and largest_group(fmt.group_size, _GROUPS) is None:
            return f"its groups of {fmt.group_size} columns are no multiple of 32"
        if rows % 8 or columns % 8:
            return "both sizes must be multiples of 8, the codes of one packed word"
        return None

    @classmethod
    def estimate_nbytes(cls, fmt: QuantFormat, rows: int, columns: int) -> int:
        groups = 1 if fmt.group_size == -1 else columns // _kernel_group(fmt)
        zeros = 0 if fmt.symmetric or fmt.bits == 8 else rows * groups // 2
        return rows * columns * _container(fmt.bits) // 8 + rows * groups * 2 + zeros

    def _pack(self, weight: QuantizedWeight) -> None:
        bits = _container(weight.format.bits)
        if bits == 8 and not weight.format.symmetric:
            fmt = QuantFormat(8, weight.format.group_size, symmetric=True)
            weight = quantize(weight.dequantize(), fmt, "rtn", weight.scales.dtype)
        group = _kernel_group(weight.format)
        scales, zeros = weight.scales, weight.zeros
        if group != weight.format.group_size:
            scales, zeros = split_groups(weight, group)
        codes = weight.codes.to(torch.int32)
        symmetric = weight.format.symmetric
        if symmetric:
            # One shift for all: from this width's zero point to that of the container.
            codes += (1 << (bits - 1)) - (1 << (weight.format.bits - 1))
        self._compute = _compute_dtype(self.dtype)
        shape = (self.columns, self.rows)
        config = MPLinearLayerConfig(
            full_weight_shape=shape,
            partition_weight_shape=shape,
            weight_type=_scalar_type(bits, symmetric),
            act_type=self._compute,
            group_size=group,
            zero_points=not symmetric,
        )
        unsigned = _scalar_type(bits, False)
        packed = {"packed_factor": 32 // bits, "weight_loader": default_weight_loader}
        self.weight_packed = PackedvLLMParameter(
            data=pack_quantized_values_into_int32(codes, unsigned, 1).contiguous(),
            input_dim=1,
            output_dim=0,
            packed_dim=1,
            **packed,
        )
        self.weight_scale = GroupQuantScaleParameter(
            data=scales.to(self._compute).contiguous(),
            input_dim=1,
            output_dim=0,
            weight_loader=default_weight_loader,
        )
        if not symmetric:
            words = pack_quantized_values_into_int32(zeros.to(torch.int32), unsigned, 0)
            self.weight_zero_point = PackedvLLMParameter(
                data=words.contiguous(), input_dim=1, output_dim=0, packed_dim=0, **packed
            )
        self._kernel = choose_mp_linear_kernel(config)(
            config,
            w_q_param_name="weight_packed",
            w_s_param_name="weight_scale",
            w_zp_param_name="weight_zero_point",
        )
        # Marlin permutes a bias it finds here; ours arrives with each call.
        self.bias = None
        self._kernel.process_weights_after_loading(self)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        out: Tensor = self._kernel.apply_weights(self, x.to(self._compute))
        out = out.to(self.dtype)
        return out if bias is None else out.add_(bias)


def _container(bits: int) -> int:
    return 4 if bits <= 4 else 8


def _kernel_group(fmt: QuantFormat) -> int:
    if fmt.group_size == -1:
        return -1
    return largest_group(fmt.group_size, _GROUPS) or 0


def _scalar_type(bits: int, symmetric: bool) -> ScalarType:
    if symmetric:
        return {4: scalar_types.uint4b8, 8: scalar_types.uint8b128}[bits]
    return {4: scalar_types.uint4, 8: scalar_types.uint8}[bits]


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The kernels take 16-bit activations only; Turing has no bfloat16."""
    if dtype in (torch.float16, torch.bfloat16):
        return dtype
    turing = current_platform.is_cuda() and not current_platform.has_device_capability(80)
    return torch.float16 if turing else torch.bfloat16
