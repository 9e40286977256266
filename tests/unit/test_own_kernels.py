# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Our own CPU kernels, at every level of instruction sets that this CPU has."""

import os
import re
import shutil
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from vllm.platforms import current_platform

from tests.unit.low_bit import (
    CPU,
    FLOATS,
    ROWS_OF_X,
    check,
    coded,
    error,
    int4_weights,
    int8_weights,
)
from vllm_subspec.machine import isa
from vllm_subspec.weights import kernels, plain_linear
from vllm_subspec.weights.kernels import SubstituteKernel, cpu_own, native
from vllm_subspec.weights.kernels.cpu_own import OwnInt4Kernel, OwnInt8Kernel
from vllm_subspec.weights.quantized_weight import QuantFormat, QuantizedWeight

current_platform.import_kernels()

LEVELS = [level.name for level in isa.levels() if level.name in native.levels()]
# Not whether they can be loaded: with a compiler a failure to build must fail the tests.
pytestmark = pytest.mark.skipif(
    not LEVELS
    or (shutil.which(os.environ.get("CXX", "g++")) is None and not native.SHIPPED.exists()),
    reason="this machine has no AVX2, or no C++ compiler",
)
INT8 = QuantFormat(8, -1, symmetric=True)
BOTH = pytest.mark.parametrize(
    ("kernel", "fmt"), [(OwnInt4Kernel, QuantFormat(4, 64)), (OwnInt8Kernel, INT8)]
)
TOKENS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 17, 33, 241)


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Kernels of a level, in use for a test."""
    best = native.load()
    native.use(request.param)
    yield request.param
    native.use(best)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("dtype", FLOATS)
@int4_weights
def test_int4_is_within_the_rounding_of_its_activations(
    rows: int, columns: int, fmt: QuantFormat, dtype: torch.dtype
) -> None:
    weight = coded(rows, columns, fmt)
    check(OwnInt4Kernel(weight, dtype), weight, dtype, 0.02)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("dtype", FLOATS)
@int8_weights
def test_int8_is_within_the_rounding_of_its_activations(
    rows: int, columns: int, dtype: torch.dtype
) -> None:
    weight = coded(rows, columns, INT8)
    check(OwnInt8Kernel(weight, dtype), weight, dtype, 0.02)


@pytest.mark.usefixtures("level")
@int4_weights
def test_int4_is_exact_where_activations_are(rows: int, columns: int, fmt: QuantFormat) -> None:
    """Whole numbers up to 127 with a 127 in each group of 32 are their own 8-bit codes."""
    weight = coded(rows, columns, fmt)
    kernel = OwnInt4Kernel(weight, torch.float32)
    for m in ROWS_OF_X:
        x = torch.randint(-127, 128, (m, columns)).float()
        x[:, ::32] = 127
        assert error(kernel(x), x, weight, None) < 1e-6


@pytest.mark.usefixtures("level")
@int8_weights
def test_int8_is_exact_where_activations_are(rows: int, columns: int) -> None:
    weight = coded(rows, columns, INT8, torch.float32)
    kernel = OwnInt8Kernel(weight, torch.float32)
    for m in ROWS_OF_X:
        x = torch.randint(-127, 128, (m, columns)).float()
        x[:, ::128] = 127
        assert error(kernel(x), x, weight, None) < 1e-6


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize(("bits", "most", "zero"), [(4, 15, 0), (8, 255, 128)])
def test_extreme_codes_do_not_saturate(bits: int, most: int, zero: int) -> None:
    """Sums of bytes' products saturate in 16 bits, and do not here."""
    kernel, fmt = (OwnInt4Kernel, QuantFormat(4, -1)) if bits == 4 else (OwnInt8Kernel, INT8)
    codes = torch.full((32, 4096), most, dtype=torch.uint8)
    zeros = torch.full((32, 1), zero, dtype=torch.uint8)
    codes[1] = 0
    if bits == 4:
        zeros[1] = 15
    packed = kernel(QuantizedWeight(codes, torch.ones(32, 1), zeros, fmt), torch.float32)
    for tokens in (1, 2, 5, 16):
        for sign in (1.0, -1.0):
            out = packed(torch.full((tokens, 4096), 1e30 * sign))
            high, low = most - zero, -int(zeros[1])
            torch.testing.assert_close(out[:, 0], torch.full((tokens,), high * 1e30 * 4096 * sign))
            torch.testing.assert_close(out[:, 1], torch.full((tokens,), low * 1e30 * 4096 * sign))


@BOTH
def test_a_token_depends_neither_on_its_batch_nor_on_the_level(
    kernel: type[SubstituteKernel], fmt: QuantFormat
) -> None:
    packed = kernel(coded(256, 512, fmt), torch.bfloat16)
    x = (torch.randn(70, 512) * torch.logspace(-2, 2, 70).unsqueeze(1)).bfloat16()
    x[3] = 0
    alone: Tensor | None = None
    for name in LEVELS:
        native.use(name)
        found = torch.cat([packed(row) for row in x.split(1)])
        assert not found[3].any()
        assert alone is None or torch.equal(found, alone), name
        alone = found
        for m in range(1, 71):
            assert torch.equal(packed(x[:m]), found[:m]), name
            assert torch.equal(packed(x[70 - m :]), found[70 - m :]), name
    native.use(native.load())


@BOTH
def test_low_bit_kernels_take_any_input(kernel: type[SubstituteKernel], fmt: QuantFormat) -> None:
    """Activations, bias and output of different dtypes; a view; no token at all."""
    native.load()
    packed = kernel(coded(70, 128, fmt), torch.bfloat16)
    x, bias = torch.randn(5, 256), torch.randn(70)
    half = x[:, 64:192]
    expected = packed(half.contiguous(), bias.bfloat16())
    assert torch.equal(packed(half, bias), expected)
    assert packed(x[:0, :128]).shape == (0, 70)
    with pytest.raises(RuntimeError, match="256 columns"):
        packed(x)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 64), (70, 128), (256, 1000), (100, 4096), (513, 2048), (33, 17)]
)
def test_full_linear_sums_in_float32_and_does_not_depend_on_the_batch(
    rows: int, columns: int, dtype: torch.dtype
) -> None:
    linear = torch.ops.vllm_subspec.linear
    generator = torch.Generator().manual_seed(rows * columns)
    weight = (torch.randn(rows, columns, generator=generator) / columns**0.5).to(dtype)
    bias = torch.randn(rows, generator=generator).to(dtype)
    x = torch.randn(300, columns, generator=generator).to(dtype)
    before = x.clone(), weight.clone()
    exact = x.double() @ weight.double().T
    together = {None: linear(x, weight, None), "bias": linear(x, weight, bias)}
    for name, whole in together.items():
        expected = exact + (bias.double() if name else 0)
        assert whole.dtype == dtype
        spread = float((whole.double() - expected).norm() / (expected.norm() + exact.norm()))
        assert spread < {torch.float32: 1e-6}.get(dtype, torch.finfo(dtype).eps)
        for m in TOKENS:
            assert torch.equal(linear(x[:m], weight, bias if name else None), whole[:m])
            assert torch.equal(linear(x[-m:], weight, bias if name else None), whole[-m:])
    assert torch.equal(x, before[0])
    assert torch.equal(weight, before[1])


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("dtype", FLOATS)
def test_full_linear_reads_nothing_beyond_its_operands(dtype: torch.dtype) -> None:
    """What lies around them may be anything, and does not reach a sum."""
    linear = torch.ops.vllm_subspec.linear
    for rows, columns in ((5, 70), (33, 1030)):
        around = torch.full((rows * columns + 256,), float("nan")).to(dtype)
        weight = around[64 : 64 + rows * columns].view(rows, columns)
        weight.copy_(torch.randn(rows, columns))
        wide = torch.full((9, columns + 64), float("nan")).to(dtype)
        x = wide[:, 32 : 32 + columns]
        x.copy_(torch.randn(9, columns))
        assert torch.equal(linear(x, weight, None), linear(x.clone(), weight.clone(), None))


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("dtype", FLOATS)
def test_full_linear_keeps_what_is_no_number(dtype: torch.dtype) -> None:
    linear = torch.ops.vllm_subspec.linear
    x, weight = torch.ones(3, 64, dtype=dtype), torch.ones(20, 64, dtype=dtype)
    x[1, 5], weight[7, 60] = float("nan"), float("inf")
    out = linear(x, weight, None)
    assert out[1].isnan().all()
    assert out[0, 7] == float("inf")
    assert torch.equal(out[0, :7], torch.full((7,), 64.0).to(dtype))
    assert linear(x[:0], weight, None).shape == (0, 20)


def test_full_linear_refuses_operands_that_do_not_fit() -> None:
    native.load()
    linear = torch.ops.vllm_subspec.linear
    with pytest.raises(RuntimeError, match=r"x \[M, K\] and w \[N, K\]"):
        linear(torch.ones(2, 3), torch.ones(2, 4), None)
    with pytest.raises(RuntimeError, match="one type"):
        linear(torch.ones(2, 4), torch.ones(2, 4).half(), None)
    with pytest.raises(RuntimeError, match="contiguous"):
        linear(torch.ones(2, 4), torch.ones(4, 2).t(), None)
    with pytest.raises(RuntimeError, match=r"bias \[N\]"):
        linear(torch.ones(2, 4), torch.ones(2, 4), torch.ones(3))


@pytest.mark.parametrize("dtype", FLOATS)
def test_full_linear_traces_as_one_graph(dtype: torch.dtype) -> None:
    weight = torch.randn(40, 64).to(dtype)
    linear = plain_linear.plain_linear(CPU, dtype)
    traced = torch.compile(
        lambda x: torch.relu(linear(x, weight, None)),
        backend="aot_eager",
        fullgraph=True,
        dynamic=True,
    )
    for m in (2, 5):
        x = torch.randn(m, 64).to(dtype)
        assert torch.equal(traced(x), torch.relu(linear(x, weight, None)))


def test_a_kernel_that_computes_wrong_is_named_and_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines: list[str] = []
    for module in (cpu_own, plain_linear):
        monkeypatch.setattr(module.logger, "warning", lambda text, *args: lines.append(text % args))
    monkeypatch.setattr(cpu_own, "_ready", cpu_own._ready.__wrapped__)
    monkeypatch.setattr(OwnInt4Kernel, "forward", lambda self, x: torch.zeros(len(x), self.rows))
    assert kernels.choose(4, None, CPU, torch.bfloat16)[0] is not OwnInt4Kernel
    assert len(lines) == 1
    assert re.search("'own W4A8'.*wrong results on this CPU", lines[0])
    monkeypatch.setattr(plain_linear, "_own", lambda x, w, bias: torch.zeros(len(x), len(w)))
    assert not plain_linear._own_is_right.__wrapped__(torch.float16)
    assert re.search("'own' linear for torch.float16.*wrong results", lines[1])
