# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from vllm_subspec.weights.quantize import quantize
from vllm_subspec.weights.quantized_weight import QuantFormat, QuantizedWeight
from vllm_subspec.weights.substitute_store import SubstituteStore

IDENTITY: dict[str, str | int] = {"model": "m", "quantizer": "hqq"}
SHAPES = {"layers.0.weight": (6, 32), "layers.1.weight": (3, 16)}


def make(fmt: QuantFormat) -> dict[str, QuantizedWeight]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: quantize(torch.randn(shape, generator=generator), fmt)
        for name, shape in SHAPES.items()
    }


def never() -> NoReturn:
    raise AssertionError("quantized although it was kept")


def give(weight: QuantizedWeight) -> Callable[[], QuantizedWeight]:
    return lambda: weight


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "m.4bit.substitutes"


def opened(path: Path, fmt: QuantFormat, **identity: str | int) -> SubstituteStore:
    return SubstituteStore(str(path), {**IDENTITY, **identity}, SHAPES, fmt)


def keep(path: Path, fmt: QuantFormat) -> dict[str, QuantizedWeight]:
    """What was made and kept at ``path``."""
    made = make(fmt)
    store = opened(path, fmt)
    assert not store.complete
    for name, weight in made.items():
        assert store.weight(name, give(weight)) is weight
    store.finish()
    return made


@pytest.mark.parametrize("fmt", [QuantFormat(b, 8) for b in (2, 3, 4, 8)] + [QuantFormat(4, -1)])
def test_what_is_kept_is_what_was_made(path: Path, fmt: QuantFormat):
    made = keep(path, fmt)
    again = opened(path, fmt)
    assert again.complete
    for name in reversed(SHAPES):
        kept = again.weight(name, never)
        assert kept.format == fmt
        for field in ("codes", "scales", "zeros"):
            one, other = getattr(kept, field), getattr(made[name], field)
            assert one.dtype == other.dtype
            assert torch.equal(one, other), field
    again.finish()


def test_odd_numbers_of_codes_are_not_paired(tmp_path: Path):
    fmt, shape = QuantFormat(4, -1), (3, 5)
    made = quantize(torch.randn(shape), fmt)
    for _ in range(2):
        store = SubstituteStore(str(tmp_path / "odd"), IDENTITY, {"w": shape}, fmt)
        assert torch.equal(store.weight("w", give(made)).codes, made.codes)
        store.finish()
    assert store.complete


def test_codes_of_four_bits_take_four(tmp_path: Path):
    fmt, shape = QuantFormat(4, -1), (256, 4096)
    store = SubstituteStore(str(tmp_path / "s"), IDENTITY, {"w": shape}, fmt)
    store.weight("w", give(quantize(torch.randn(shape), fmt, "rtn")))
    store.finish()
    assert (tmp_path / "s").stat().st_size < 1.02 * 256 * 4096 / 2


def test_nothing_is_kept_of_a_start_that_failed(path: Path):
    fmt = QuantFormat(4, 8)
    store = opened(path, fmt)
    name, weight = next(iter(make(fmt).items()))
    store.weight(name, give(weight))
    store.abort()
    assert [file.name for file in path.parent.iterdir()] == [f"{path.name}.lock"]
    assert not opened(path, fmt).complete


def test_a_matrix_that_nobody_asked_for_is_missed(path: Path):
    fmt = QuantFormat(4, 8)
    store = opened(path, fmt)
    store.weight("layers.0.weight", give(make(fmt)["layers.0.weight"]))
    with pytest.raises(ValueError, match=r"1 blocks were not written, .*layers\.1\.weight"):
        store.finish()
    assert not path.exists()


def test_of_other_options_or_damaged_it_is_made_anew(path: Path, caplog: pytest.LogCaptureFixture):
    fmt = QuantFormat(4, 8)
    keep(path, fmt)
    caplog.set_level(logging.WARNING)
    for other, quantizer in ((fmt, "other"), (QuantFormat(4, 16), "hqq")):
        store = opened(path, other, quantizer=quantizer)
        assert not store.complete
        assert ("belongs to something else" if other is fmt else "other tensors") in caplog.text
        store.abort()
        caplog.clear()
    with path.open("r+b") as file:
        file.seek(os.path.getsize(path) - 4096)
        file.write(b"\xff" * 8)
    store = opened(path, QuantFormat(4, 8))
    assert not store.complete and "corrupted" in caplog.text
    store.abort()
