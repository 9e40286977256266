# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Checkpoints written as a stream are what the safetensors library reads, and bounded in size."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from benchmarks.upscale.shards import Layout, write_shards

DTYPES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])
SHAPES = st.lists(st.integers(1, 5), max_size=3).map(tuple)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
LAYOUTS = st.dictionaries(
    NAMES.filter(lambda name: name != "__metadata__"), st.tuples(DTYPES, SHAPES), min_size=1
)


def written(folder: Path, tensors: dict[str, Tensor], step: int, shard_bytes: int) -> Layout:
    """Write `tensors` in parts of `step` elements."""
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}

    def blocks(name: str) -> Iterator[Tensor]:
        yield from tensors[name].flatten().split(step)

    write_shards(folder, layout, blocks, shard_bytes=shard_bytes)
    return layout


@settings(max_examples=60)
@given(LAYOUTS, st.integers(1, 7), st.integers(1, 400))
def test_round_trip(layout: Layout, step: int, shard_bytes: int) -> None:
    tensors = {name: torch.randn(shape).to(dtype) for name, (dtype, shape) in layout.items()}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        written(folder, tensors, step, shard_bytes)
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
        assert set(index["weight_map"]) == set(tensors)
        for path in folder.glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                names = [name for name, where in index["weight_map"].items() if where == path.name]
                assert set(file.keys()) == set(names)
                assert len(names) == 1 or sum(tensors[n].nbytes for n in names) <= shard_bytes
                for name in names:
                    read = file.get_tensor(name)
                    assert read.dtype == tensors[name].dtype
                    assert torch.equal(read, tensors[name])


def test_shards_are_numbered_and_filled_in_order(tmp_path: Path) -> None:
    written(tmp_path, {name: torch.zeros(25) for name in "abcde"}, 10, shard_bytes=250)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    parts = [f"model-0000{number}-of-00003.safetensors" for number in (1, 1, 2, 2, 3)]
    assert index["weight_map"] == dict(zip("abcde", parts, strict=True))


@pytest.mark.parametrize(
    "parts", [[torch.zeros(4)], [torch.zeros(4)] * 3, [torch.zeros(8).half()], []]
)
def test_parts_that_do_not_make_the_tensor(tmp_path: Path, parts: list[Tensor]) -> None:
    with pytest.raises(ValueError, match=r"weight.* torch.float32 of shape \(2, 4\)"):
        write_shards(tmp_path, {"weight": (torch.float32, (2, 4))}, lambda name: parts)
