# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""RTN and HQQ against a float64 reference, on drawn matrices and on the weights of a real model."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from vllm_subspec.weights.quantize import quantize
from vllm_subspec.weights.quantized_weight import QuantFormat, QuantizedWeight
from vllm_subspec.weights.scale_search import LP_NORM

MODEL = Path(__file__).parents[2] / "models" / "pystd-6m" / "model.safetensors"

formats = st.builds(
    QuantFormat,
    bits=st.sampled_from([2, 3, 4, 8]),
    group_size=st.sampled_from([-1, 1, 4, 32]),
    symmetric=st.booleans(),
)
dtypes = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])


def drawn_matrix(seed: int, rows: int, magnitude: float, dtype: torch.dtype) -> torch.Tensor:
    """Random matrix [rows, 64] with heavy tails, a shifted row and a group of zeros."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, 64, generator=generator)
    weight = weight * weight.abs().sqrt()
    weight[0] += 3.0
    weight[-1, :32] = 0.0
    return (weight * magnitude).to(dtype)


def reference_rtn(
    group: list[float], fmt: QuantFormat, scale: float
) -> tuple[float, int, list[float]]:
    """Unrounded scale, zero point and unrounded codes of one group, in Python's float64."""
    top = 2**fmt.bits - 1
    if fmt.symmetric:
        exact = 2 * max(abs(v) for v in group) / top
        zero = 2 ** (fmt.bits - 1)
    else:
        low, high = min(0.0, *group), max(0.0, *group)
        exact = (high - low) / top
        zero = min(max(round(-low / scale), 0), top)
    return exact, zero, [v / scale + zero for v in group]


def lp_errors(weight: torch.Tensor, q: QuantizedWeight) -> torch.Tensor:
    """float64 l_p error [N, G] of every group, computed from codes, scales and zeros alone."""
    rows, groups = q.scales.shape
    steps = q.codes.view(rows, groups, -1).double() - q.zeros.double().unsqueeze(-1)
    error = weight.double().view(rows, groups, -1) - steps * q.scales.double().unsqueeze(-1)
    return error.abs().pow(LP_NORM).sum(-1)


@settings(max_examples=60)
@given(formats, dtypes, dtypes, st.integers(0, 10**6), st.integers(1, 5), st.integers(-6, 3))
def test_rtn_is_the_reference(fmt, dtype, scale_dtype, seed, rows, exponent):
    weight = drawn_matrix(seed, rows, 10.0**exponent, dtype)
    q = quantize(weight, fmt, "rtn", scale_dtype)
    width = fmt.columns_per_group(64)
    tiny = torch.finfo(scale_dtype).tiny
    epsilon = torch.finfo(scale_dtype).eps
    restored = q.dequantize()
    for n in range(rows):
        for g in range(64 // width):
            part = slice(g * width, (g + 1) * width)
            group = weight[n, part].double().tolist()
            scale = q.scales[n, g].item()
            exact, zero, unrounded = reference_rtn(group, fmt, scale)
            assert abs(scale - max(exact, tiny)) <= epsilon * max(exact, tiny)
            if fmt.symmetric or min(abs(min(0.0, *group) / scale % 1 - 0.5), 1) > 1e-4:
                assert q.zeros[n, g].item() == zero
            zero = int(q.zeros[n, g])
            for value, code, back in zip(
                group, q.codes[n, part].tolist(), restored[n, part].tolist(), strict=True
            ):
                position = value / scale + zero
                if abs(position % 1 - 0.5) > 1e-4:
                    assert code == min(max(round(position), 0), 2**fmt.bits - 1)
                # Half a step, and what rounding the scale moved the ends of the range by.
                bound = scale * (0.5 + 2**fmt.bits * epsilon + 1e-4)
                assert abs(back - value) <= bound
            assert len(unrounded) == width


@settings(max_examples=40)
@given(formats, dtypes, st.integers(0, 10**6), st.integers(1, 5), st.integers(-6, 3))
def test_hqq_is_never_worse_than_rtn(fmt, dtype, seed, rows, exponent):
    weight = drawn_matrix(seed, rows, 10.0**exponent, dtype)
    hqq, rtn = quantize(weight, fmt, "hqq"), quantize(weight, fmt, "rtn")
    assert int(hqq.codes.max()) < 2**fmt.bits
    assert torch.equal(hqq.zeros, rtn.zeros)
    worst = lp_errors(weight, hqq) - lp_errors(weight, rtn) * (1 + 1e-4)
    assert float(worst.max()) <= 0.0


@pytest.fixture(scope="module")
def real_weights() -> dict[str, torch.Tensor]:
    with safe_open(MODEL, "pt") as file:
        names = [n for n in file.keys() if ".layers." in n and n.endswith("_proj.weight")]  # noqa: SIM118
        return {name: file.get_tensor(name) for name in names}


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_hqq_improves_a_real_model(real_weights, bits, symmetric):
    fmt = QuantFormat(bits, 64, symmetric)
    hqq_total = rtn_total = 0.0
    for weight in real_weights.values():
        hqq = lp_errors(weight, quantize(weight, fmt, "hqq"))
        rtn = lp_errors(weight, quantize(weight, fmt, "rtn"))
        assert bool((hqq <= rtn * (1 + 1e-4)).all())
        hqq_total += float(hqq.sum())
        rtn_total += float(rtn.sum())
    assert hqq_total < {2: 0.9, 3: 0.96, 4: 0.98}[bits] * rtn_total


def test_eight_bit_rows_for_int8_kernels(real_weights):
    weight = real_weights["model.layers.0.mlp.down_proj.weight"]
    q = quantize(weight, QuantFormat(8, -1, symmetric=True), "rtn", torch.float32)
    assert q.scales.shape == (weight.shape[0], 1)
    assert bool((q.zeros == 128).all())
    error = (q.dequantize() - weight.float()).norm() / weight.float().norm()
    assert float(error) < 0.012


@pytest.mark.parametrize("quantizer", ["rtn", "hqq"])
def test_the_result_does_not_depend_on_chunks_layout_or_run(quantizer, monkeypatch):
    weight = drawn_matrix(7, 300, 0.02, torch.bfloat16)
    fmt = QuantFormat(4, 32)
    whole = quantize(weight, fmt, quantizer)
    again = quantize(weight.t().contiguous().t(), fmt, quantizer)
    assert torch.equal(whole.codes, again.codes) and torch.equal(whole.scales, again.scales)
    monkeypatch.setattr("vllm_subspec.weights.quantize.CHUNK_ELEMENTS_PER_THREAD", 640)
    chunked = quantize(weight, fmt, quantizer)
    assert torch.equal(whole.codes, chunked.codes)
    assert torch.equal(whole.scales, chunked.scales)


@pytest.mark.parametrize("quantizer", ["rtn", "hqq"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_degenerate_groups(quantizer, bits):
    weight = torch.zeros(4, 32)
    weight[1] = 0.5
    weight[2] = -0.5
    weight[3] = 1e-42
    for symmetric in (False, True):
        q = quantize(weight, QuantFormat(bits, 16, symmetric), quantizer)
        restored = q.dequantize()
        assert bool(q.scales.isfinite().all()) and bool((q.scales > 0).all())
        assert bool((restored[0] == 0).all()) and bool((restored[3].abs() < 1e-37).all())
        bound = 0.5 * (0.51 if symmetric and bits == 2 else 0.34) if symmetric else 0.5 * 2**-8
        assert float((restored[1:3] - weight[1:3]).abs().max()) <= bound


def test_an_empty_weight_has_no_codes():
    q = quantize(torch.empty(0, 64), QuantFormat(4, 64))
    assert q.codes.shape == (0, 64) and q.scales.shape == (0, 1)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_weight_that_is_not_finite_is_refused(value):
    weight = torch.ones(2, 64)
    weight[1, 5] = value
    for symmetric in (False, True):
        with pytest.raises(ValueError, match="infinities or NaN"):
            quantize(weight, QuantFormat(4, 32, symmetric))


def test_parts_of_a_weight_are_the_weight_of_the_parts():
    weight = drawn_matrix(3, 12, 0.02, torch.bfloat16)
    for fmt in (QuantFormat(4, 16), QuantFormat(8, -1, symmetric=True)):
        q = quantize(weight, fmt)
        whole = q.dequantize()
        assert torch.equal(q.rows(2, 5).dequantize(), whole[2:7])
        assert torch.equal(q.columns(16, 32).dequantize(), whole[:, 16:48])
        joined = QuantizedWeight.concatenate([q.rows(0, 4), q.rows(4, 8)])
        assert joined.format == fmt and torch.equal(joined.dequantize(), whole)
    with pytest.raises(ValueError, match="cut through groups of 16"):
        quantize(weight, QuantFormat(4, 16)).columns(8, 16)
    parts = [quantize(weight, QuantFormat(4, group)) for group in (16, 32)]
    with pytest.raises(ValueError, match="cannot be joined"):
        QuantizedWeight.concatenate(parts)
    symmetric = quantize(weight, QuantFormat(4, 16, symmetric=True))
    mixed = QuantizedWeight.concatenate([symmetric, parts[0]])
    assert not mixed.format.symmetric
    assert torch.equal(mixed.dequantize()[:12], symmetric.dequantize())


def test_what_cannot_be_quantised_is_refused():
    with pytest.raises(ValueError, match="group_size 48 does not divide the 64 columns"):
        quantize(torch.ones(2, 64), QuantFormat(4, 48))
    with pytest.raises(ValueError, match="floating-point matrix"):
        quantize(torch.ones(2, 64, dtype=torch.int8), QuantFormat(4, 32))
    with pytest.raises(ValueError, match="quantizer must be one of"):
        quantize(torch.ones(2, 64), QuantFormat(4, 32), "gptq")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="too large for scales"):
        quantize(torch.full((2, 64), 1e30), QuantFormat(4, 32), "rtn", torch.float16)
    with pytest.raises(ValueError, match="bits must be one of"):
        QuantFormat(5, 32)
    with pytest.raises(ValueError, match="group_size must be"):
        QuantFormat(4, 0)
