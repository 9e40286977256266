# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Weights and a check that the tests of low-bit kernels share."""

import pytest
import torch
from torch import Tensor

from vllm_subspec.weights.kernels import SubstituteKernel
from vllm_subspec.weights.quantize import quantize
from vllm_subspec.weights.quantized_weight import QuantFormat, QuantizedWeight

CPU = torch.device("cpu")
FLOATS = (torch.bfloat16, torch.float32, torch.float16)
ROWS_OF_X = (1, 2, 3, 4, 7, 16, 17, 33, 65)

int4_weights = pytest.mark.parametrize(
    ("rows", "columns", "fmt"),
    [
        (64, 64, QuantFormat(4, 32)),
        (208, 192, QuantFormat(4, 64)),
        (96, 512, QuantFormat(4, 128)),
        (48, 512, QuantFormat(4, 512)),
        (64, 320, QuantFormat(4, -1)),
        (70, 128, QuantFormat(4, 64)),
        (1, 64, QuantFormat(4, 64)),
        (64, 256, QuantFormat(3, 64)),
        (64, 256, QuantFormat(2, 64)),
        (64, 256, QuantFormat(4, 64, symmetric=True)),
        (64, 256, QuantFormat(3, 64, symmetric=True)),
    ],
    ids=str,
)

int8_weights = pytest.mark.parametrize(
    ("rows", "columns"), [(64, 64), (70, 100), (1, 512), (200, 2048), (33, 7)]
)


def coded(
    rows: int, columns: int, fmt: QuantFormat, scale_dtype: torch.dtype = torch.bfloat16
) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(rows * 10007 + columns)
    # Off-centre, so that asymmetric zero points are far from the middle code.
    shift = torch.linspace(-1, 1, rows).unsqueeze(1)
    weight = (torch.randn(rows, columns, generator=generator) + shift) / columns**0.5
    return quantize(weight, fmt, "rtn", scale_dtype)


def error(got: Tensor, x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> float:
    """Distance from the float64 product, relative to the size of its terms (which may cancel)."""
    wide = weight.dequantize(torch.float64)
    expected = x.double() @ wide.T
    terms = x.double().square() @ wide.square().T
    if bias is not None:
        expected += bias.double()
        terms += bias.double().square()
    return float((got.double() - expected).norm() / terms.sum().sqrt())


def check(
    kernel: SubstituteKernel, weight: QuantizedWeight, dtype: torch.dtype, limit: float
) -> None:
    rows, columns = weight.codes.shape
    generator = torch.Generator().manual_seed(1)
    for bias in (None, torch.randn(rows, generator=generator).to(dtype)):
        for m in ROWS_OF_X:
            x = torch.randn(m, columns, generator=generator).to(dtype)
            before = x.clone()
            got = kernel(x, bias)
            assert got.dtype == dtype
            assert got.shape == (m, rows)
            assert got.is_contiguous()
            assert error(got, x, weight, bias) < limit
            assert torch.equal(x, before)
