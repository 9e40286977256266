# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Writing a safetensors checkpoint as a stream, without ever holding one of its tensors.

A safetensors file is the length of its header (8 bytes, little-endian), the header (JSON that gives
every tensor's type, shape and place), and the tensors' bytes. With types and shapes known before
the first value is, every place in it is known too.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

SHARD_BYTES = 5 * 10**9  # As transformers cut checkpoints.

_TYPE_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Type and shape of every tensor, in the order in which they are to be written."""


def tensor_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * dtype.itemsize


def write_shards(
    folder: Path,
    layout: Layout,
    blocks: Callable[[str], Iterable[Tensor]],
    progress: Callable[[int], object] = lambda count: None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the tensors of `layout` as model-*.safetensors and their index into `folder`.

    Args:
        blocks: gives the values of a tensor, by its name, in parts that follow each other in
            memory. Called by several threads at once, each of which holds one part at a time.
        progress: called with the bytes of every tensor written.
        shard_bytes: most bytes of tensors in a file; a larger tensor gets a file of its own.

    Raises:
        ValueError: the parts of a tensor are not what `layout` says.
    """
    shards = _cut(layout, shard_bytes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        path = folder / f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(names, path.name)
        _write_shard(path, {name: layout[name] for name in names}, blocks, progress)
    total = sum(tensor_bytes(*entry) for entry in layout.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write_shard(
    path: Path,
    layout: Layout,
    blocks: Callable[[str], Iterable[Tensor]],
    progress: Callable[[int], object],
) -> None:
    with path.open("wb") as file, ThreadPoolExecutor(_threads()) as pool:
        file.write(header := _header(layout))
        file.flush()
        place, writes = len(header), []
        for name, (dtype, shape) in layout.items():
            writes.append(
                pool.submit(_write_tensor, file.fileno(), place, name, dtype, shape, blocks)
            )
            place += tensor_bytes(dtype, shape)
        try:
            for write in writes:
                progress(write.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _threads() -> int:
    """Of which each makes a tensor: few, as each holds a part of it."""
    return min(4, len(os.sched_getaffinity(0)))


def _cut(layout: Layout, shard_bytes: int) -> list[list[str]]:
    """The names of every shard's tensors."""
    shards: list[list[str]] = []
    room = 0
    for name, entry in layout.items():
        size = tensor_bytes(*entry)
        if not shards or size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    return shards


def _header(layout: Layout) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, (dtype, shape) in layout.items():
        end = start + tensor_bytes(dtype, shape)
        entries[name] = {
            "dtype": _TYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # The tensors begin aligned.
    return struct.pack("<Q", len(text)) + text


def _write_tensor(
    file: int,
    place: int,
    name: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    blocks: Callable[[str], Iterable[Tensor]],
) -> int:
    """Write a tensor's bytes at `place` of the open `file`; returns their number."""
    size = tensor_bytes(dtype, shape)
    written = 0
    for block in blocks(name):
        if block.dtype != dtype or written + block.nbytes > size:
            raise ValueError(f"a part of {name} is not of a {dtype} of shape {shape}")
        view = block.contiguous().view(-1).view(torch.uint8).numpy().data
        while view:
            count = os.pwrite(file, view, place + written)
            written += count
            view = view[count:]
    if written != size:
        raise ValueError(f"the parts of {name} are fewer than a {dtype} of shape {shape} has")
    return size
