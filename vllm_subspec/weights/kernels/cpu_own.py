# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Low-bit weights on x86 CPUs from AVX2 up: our own matrix products (csrc/low_bit_linear.h).

Activations are quantized to 8 bits per token and group of columns as they come. A token's result
depends neither on the other tokens of its batch nor on the CPU.
"""

import functools

import torch
from torch import Tensor
from torch.nn.functional import pad
from vllm.logger import init_logger

from vllm_subspec.weights.kernels import native
from vllm_subspec.weights.kernels.base import SubstituteKernel, split_groups
from vllm_subspec.weights.kernels.compiler import BuildError
from vllm_subspec.weights.kernels.cpu_int4 import CpuInt4Kernel
from vllm_subspec.weights.kernels.cpu_int8 import CpuInt8Kernel
from vllm_subspec.weights.quantized_weight import QuantFormat, QuantizedWeight

logger = init_logger(__name__)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ROWS = 16  # the packed layout's block of output rows
_COLUMNS = 16  # of a step of the kernels


class OwnInt4Kernel(CpuInt4Kernel):
    """W4A8: exact codes and zero points; scales are kept in bfloat16."""

    name = "own W4A8"
    # Larger groups are split: activations share the groups, and one outlier costs its whole group
    # precision.
    groups = (128, 64, 32)
    codes: Tensor
    scales: Tensor
    zeros: Tensor

    @classmethod
    def available(cls, device: torch.device, dtype: torch.dtype) -> bool:
        return device.type == "cpu" and dtype in _DTYPES and _ready(cls, QuantFormat(4, 64))

    @classmethod
    def estimate_nbytes(cls, fmt: QuantFormat, rows: int, columns: int) -> int:
        group = cls.kernel_group(fmt, columns)
        rows += -rows % _ROWS
        per_group = torch.bfloat16.itemsize + torch.uint8.itemsize
        return rows * columns // 2 + rows * (columns // group) * per_group

    def _pack(self, weight: QuantizedWeight) -> None:
        group = self.kernel_group(weight.format, self.columns)
        scales, zeros = split_groups(weight, group)
        self.register_buffer("codes", _pack_nibbles(weight.codes), persistent=False)
        self.register_buffer("scales", _by_block(scales.bfloat16()), persistent=False)
        self.register_buffer("zeros", _by_block(zeros), persistent=False)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return torch.ops.vllm_subspec.low_bit_linear.default(
            x, self.codes, self.scales, self.zeros, bias, self.rows, 4, self.dtype
        )


class OwnInt8Kernel(CpuInt8Kernel):
    """W8A8: exact codes and row scales."""

    name = "own W8A8"
    codes: Tensor
    scales: Tensor

    @classmethod
    def available(cls, device: torch.device, dtype: torch.dtype) -> bool:
        return device.type == "cpu" and dtype in _DTYPES and _ready(cls, cls.format)

    @classmethod
    def estimate_nbytes(cls, fmt: QuantFormat, rows: int, columns: int) -> int:
        rows += -rows % _ROWS
        return rows * (columns + -columns % _COLUMNS + torch.float32.itemsize)

    def _pack_rows(self, codes: Tensor, scales: Tensor) -> None:
        self.register_buffer("codes", _pack_bytes(codes), persistent=False)
        self.register_buffer("scales", _by_block(scales.float()), persistent=False)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return torch.ops.vllm_subspec.low_bit_linear.default(
            x, self.codes, self.scales, None, bias, self.rows, 8, self.dtype
        )


def _by_block(values: Tensor) -> Tensor:
    """[N, J] -> [blocks, J, 16], rows filled up with zeros."""
    padded = pad(values, (0, 0, 0, -values.shape[0] % _ROWS))
    return padded.view(-1, _ROWS, values.shape[1]).transpose(1, 2).contiguous()


def _pack_nibbles(codes: Tensor) -> Tensor:
    """4-bit codes [N, K] -> bytes [blocks, K / 8, 64]: of 8 columns the first 4 are low nibbles."""
    codes = pad(codes, (0, 0, 0, -codes.shape[0] % _ROWS))
    # Four columns at once, as a word: a shifted code does not leave its byte.
    words = codes.contiguous().view(torch.int32).view(-1, _ROWS, codes.shape[1] // 8, 2)
    packed = words[..., 1].bitwise_left_shift(4).bitwise_or_(words[..., 0])
    return packed.transpose(1, 2).contiguous().view(torch.uint8)


def _pack_bytes(codes: Tensor) -> Tensor:
    """8-bit codes [N, K] -> bytes [blocks, K / 4, 64], columns filled up to whole steps."""
    codes = pad(codes, (0, -codes.shape[1] % _COLUMNS, 0, -codes.shape[0] % _ROWS), value=128)
    words = codes.contiguous().view(torch.int32).view(-1, _ROWS, codes.shape[1] // 4)
    return words.transpose(1, 2).contiguous().view(torch.uint8)


@functools.cache
def _ready(kernel: type[SubstituteKernel], fmt: QuantFormat) -> bool:
    """Load and check a kernel once per process; log why if that fails."""
    try:
        native.load()
        _check(kernel, fmt)
    except BuildError as error:
        logger.warning("No kernel %r, so slower ones are used: %s", kernel.name, error)
        return False
    return True


def _check(kernel: type[SubstituteKernel], fmt: QuantFormat) -> None:
    """Compare with float64 on activations that quantize without error; BuildError if it differs."""
    generator = torch.Generator().manual_seed(0)
    rows, columns, group = 40, 192, 64
    draw = functools.partial(torch.randint, generator=generator, device="cpu")
    groups = columns // fmt.columns_per_group(columns)
    zeros = draw(0, 16, (rows, groups), dtype=torch.uint8)
    weight = QuantizedWeight(
        draw(0, fmt.max_code + 1, (rows, columns), dtype=torch.uint8),
        draw(1, 9, (rows, groups), dtype=torch.int32).float() / 64,
        torch.full_like(zeros, 128) if fmt.symmetric else zeros,
        fmt,
    )
    packed = kernel(weight, torch.float32)
    for tokens in (1, 6, 17):
        x = draw(-127, 128, (tokens, columns), dtype=torch.int32).float()
        x[:, ::group] = 127
        expected = (x.double() @ weight.dequantize(torch.float64).T).float()
        if not torch.allclose(packed(x), expected, rtol=1e-4, atol=1e-1):
            raise BuildError("it computes wrong results on this CPU")
