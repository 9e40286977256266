# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""4-bit weights on x86 CPUs with AVX512-VNNI: our own matrix product, compiled at first use."""

import functools
from pathlib import Path

import torch
import vllm.envs as envs
from torch import Tensor
from torch.nn.functional import pad
from vllm.logger import init_logger

from vllm_subspec.weights.kernels import native
from vllm_subspec.weights.kernels.base import split_groups
from vllm_subspec.weights.kernels.cpu_int4 import CpuInt4Kernel
from vllm_subspec.weights.quantized_weight import QuantFormat, QuantizedWeight

logger = init_logger(__name__)

SOURCE = Path(__file__).parent / "csrc" / "cpu_int4_vnni.cpp"
# torch's name of each instruction set that the source uses, and the compiler's flag.
_INSTRUCTIONS = {
    "avx512_f": "-mavx512f",
    "avx512_bw": "-mavx512bw",
    "avx512_dq": "-mavx512dq",
    "avx512_vl": "-mavx512vl",
    "avx512_vnni": "-mavx512vnni",
    "fma3": "-mfma",
    "f16c": "-mf16c",
}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ROWS = 16  # the packed layout's block of output rows
_COLUMNS = 8  # of each row in 64 packed bytes


class Int4VnniKernel(CpuInt4Kernel):
    """W4A8: exact codes and zero points, activations quantised per token and group as they come.

    A token's result does not depend on the other tokens of the batch. Scales are kept in bfloat16.
    The layout of the packed weight is described in the C++ source.
    """

    name = "own int4 VNNI"
    # Larger groups are split: activations share the groups, and one outlier costs its whole group
    # precision.
    groups = (128, 64, 32)
    codes: Tensor
    scales: Tensor
    zeros: Tensor

    @classmethod
    def available(cls, device: torch.device, dtype: torch.dtype) -> bool:
        return device.type == "cpu" and dtype in _DTYPES and cls.has_instructions() and _ready()

    @staticmethod
    def has_instructions() -> bool:
        """Whether this CPU can run it."""
        capabilities = torch.cpu.get_capabilities()
        return all(capabilities.get(name) for name in _INSTRUCTIONS)

    @classmethod
    def estimate_nbytes(cls, fmt: QuantFormat, rows: int, columns: int) -> int:
        group = cls.kernel_group(fmt, columns)
        rows += -rows % _ROWS
        per_group = torch.bfloat16.itemsize + torch.uint8.itemsize
        return rows * columns // 2 + rows * (columns // group) * per_group

    def _pack(self, weight: QuantizedWeight) -> None:
        group = self.kernel_group(weight.format, self.columns)
        scales, zeros = split_groups(weight, group)
        self.register_buffer("codes", _pack_codes(weight.codes), persistent=False)
        self.register_buffer("scales", _by_block(scales.bfloat16()), persistent=False)
        self.register_buffer("zeros", _by_block(zeros), persistent=False)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return torch.ops.vllm_subspec.int4_vnni_linear.default(
            x, self.codes, self.scales, self.zeros, bias, self.rows, self.dtype
        )


def _by_block(values: Tensor) -> Tensor:
    """[N, J] -> [blocks, J, 16], rows padded with zeros."""
    padded = pad(values, (0, 0, 0, -values.shape[0] % _ROWS))
    return padded.view(-1, _ROWS, values.shape[1]).transpose(1, 2).contiguous()


def _pack_codes(codes: Tensor) -> Tensor:
    """Codes [N, K] -> bytes [blocks, K / 8, 64]: of 8 columns the first 4 in the low nibbles."""
    if missing := -codes.shape[0] % _ROWS:
        codes = pad(codes, (0, 0, 0, missing))
    # Four columns at once, as a word: a shifted code does not leave its byte.
    words = codes.contiguous().view(torch.int32).view(-1, _ROWS, codes.shape[1] // _COLUMNS, 2)
    packed = words[..., 1].bitwise_left_shift(4).bitwise_or_(words[..., 0])
    return packed.transpose(1, 2).contiguous().view(torch.uint8)


@functools.cache
def _ready() -> bool:
    """Compile, load and check the operation once per process; log why if that fails."""
    try:
        folder = Path(envs.VLLM_CACHE_ROOT) / "subspec" / "kernels"
        native.load(SOURCE, folder, tuple(_INSTRUCTIONS.values()))
        _check()
    except native.BuildError as error:
        logger.warning(
            "No %s kernel, so 4-bit substitutes use torch int4pack at about half the speed: %s",
            Int4VnniKernel.name,
            error,
        )
        return False
    return True


def _check() -> None:
    """Compare with float64 on activations that quantise without error; BuildError if it differs."""
    generator = torch.Generator().manual_seed(0)
    rows, columns, group = 40, 192, 64
    draw = functools.partial(torch.randint, generator=generator, device="cpu")
    weight = QuantizedWeight(
        draw(0, 16, (rows, columns), dtype=torch.uint8),
        draw(1, 9, (rows, columns // group), dtype=torch.int32).float() / 64,
        draw(0, 16, (rows, columns // group), dtype=torch.uint8),
        QuantFormat(4, group),
    )
    kernel = Int4VnniKernel(weight, torch.float32)
    for tokens in (1, 6, 17):
        x = draw(-127, 128, (tokens, columns), dtype=torch.int32).float()
        x[:, ::group] = 127
        expected = (x.double() @ weight.dequantize(torch.float64).T).float()
        if not torch.allclose(kernel(x), expected, rtol=1e-4, atol=1e-2):
            raise native.BuildError("it computes wrong results on this CPU")
