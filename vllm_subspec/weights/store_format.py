# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""The weight store's file format: block layouts, the header, and the errors of reading them.

    offset 0    magic (8) | version u32 | JSON length u32 | XXH3-64 of the rest of the header u64
    offset 24   JSON: fingerprint, chunk size, blocks (name, offset, nbytes, tensors, checksums)
                zeros up to the next multiple of 4096
    then        the blocks, each a multiple of 4096 bytes, in table order, without gaps

All integers are little-endian. Every byte of the file is covered by a checksum: the header by its
own, a block (padding included) by one XXH3-64 per chunk. The JSON's length depends only on the
layout, so the writer reserves its place and fills it in last. XXH3 finds accidents, not attacks;
therefore every field of the header is also checked for range and for agreement with the others.
"""

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
import xxhash
from torch import Tensor

PAGE = 4096  # alignment of blocks in the file and in memory; the largest O_DIRECT commonly needs
TENSOR_ALIGN = 64  # alignment of a tensor inside its block: one cache line, one AVX-512 load
CHUNK = 16 << 20  # bytes under one checksum
MAGIC = b"VSUBSPEC"
VERSION = 1
PREAMBLE = struct.Struct("<8sIIQ")
MAX_JSON = 16 << 20
MAX_NAME = 1024
MAX_DIM = 1 << 48
MAX_NDIM = 16
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16,
        torch.float8_e4m3fn, torch.float8_e5m2,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Fingerprint = Mapping[str, str | int]


class StoreError(Exception):
    """A weight store cannot be used. ``reason`` is one word or two for logs and metrics."""

    reason: ClassVar[str] = "unusable"


class StoreMissingError(StoreError):
    reason = "missing"


class StoreTruncatedError(StoreError):
    reason = "truncated"


class StoreForeignError(StoreError):
    """The store belongs to something else; ``key`` names the fingerprint entry that differs."""

    reason = "foreign"

    def __init__(self, message: str, key: str) -> None:
        super().__init__(message)
        self.key = key


class StoreCorruptError(StoreError):
    reason = "corrupted"


class StoreVersionError(StoreError):
    reason = "unsupported version"


class StoreReadError(StoreError):
    reason = "unreadable"


class ReadCancelledError(StoreError):
    """A read was abandoned on request; the buffer's content is undefined."""

    reason = "cancelled"


class StoreWriteError(StoreError):
    reason = "unwritable"


def align(n: int, to: int) -> int:
    return -(-n // to) * to


def check_name(name: object) -> None:
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME:
        raise ValueError(f"a name must be a string of 1 to {MAX_NAME} characters")


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a block. Raises ValueError for a shape or dtype that the store cannot hold."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __post_init__(self) -> None:
        check_name(self.name)
        if len(self.shape) > MAX_NDIM or not all(
            type(d) is int and 0 <= d < MAX_DIM for d in self.shape
        ):
            raise ValueError(f"tensor {self.name!r} has an impossible shape")
        if self.dtype not in DTYPE_NAMES:
            raise ValueError(f"tensor {self.name!r}: the store holds no {self.dtype}")

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class BlockLayout:
    """A block: its tensors one after the other, each 64-byte aligned, zero-padded to 4096 bytes."""

    name: str
    tensors: tuple[TensorSpec, ...]

    def __post_init__(self) -> None:
        check_name(self.name)
        if len({t.name for t in self.tensors}) != len(self.tensors):
            raise ValueError(f"block {self.name!r} names a tensor twice")
        if self.nbytes == 0:
            raise ValueError(f"block {self.name!r} holds no bytes")

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Byte offset of each tensor in the block."""
        offsets, end = [], 0
        for spec in self.tensors:
            start = align(end, TENSOR_ALIGN)
            offsets.append(start)
            end = start + spec.nbytes
        return tuple(offsets)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the block in the file and in a buffer: a multiple of 4096."""
        if not self.tensors:
            return 0
        return align(self.offsets[-1] + self.tensors[-1].nbytes, PAGE)

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """The block's tensors as views into ``buffer`` (uint8 [>= nbytes], 64-byte aligned)."""
        if buffer.dtype != torch.uint8 or buffer.dim() != 1 or not buffer.is_contiguous():
            raise ValueError(f"block {self.name!r} needs a contiguous uint8 vector as its buffer")
        if buffer.numel() < self.nbytes or buffer.data_ptr() % TENSOR_ALIGN:
            raise ValueError(
                f"block {self.name!r} needs a {TENSOR_ALIGN}-byte aligned buffer of at least "
                f"{self.nbytes} bytes, got {buffer.numel()} at {buffer.data_ptr():#x}"
            )
        return {
            spec.name: buffer[start : start + spec.nbytes].view(spec.dtype).view(spec.shape)
            for spec, start in zip(self.tensors, self.offsets, strict=True)
        }


@dataclass(frozen=True)
class Header:
    """What a store says about itself. ``checksums[i][j]``: XXH3-64 of chunk j of block i."""

    fingerprint: dict[str, str | int]
    blocks: tuple[BlockLayout, ...]
    checksums: tuple[tuple[int, ...], ...]
    offsets: tuple[int, ...]
    file_size: int


def chunks(nbytes: int) -> list[tuple[int, int]]:
    """(offset, size) of each checksummed chunk of a block of ``nbytes``."""
    return [(start, min(CHUNK, nbytes - start)) for start in range(0, nbytes, CHUNK)]


def check_fingerprint(fingerprint: Mapping[Any, Any]) -> None:
    """ValueError unless every key is a string and every value a string or a 64-bit integer."""
    for key, value in fingerprint.items():
        in_range = type(value) is str or (type(value) is int and abs(value) < 1 << 63)
        if not isinstance(key, str) or not in_range:
            raise ValueError(
                f"fingerprint entry {str(key)[:200]!r} must be a string or a 64-bit integer"
            )


def check_blocks(blocks: Sequence[BlockLayout]) -> None:
    """ValueError unless there is at least one block and no two share a name."""
    if not blocks or len({b.name for b in blocks}) != len(blocks):
        raise ValueError("a store needs at least one block, and each block a name of its own")


def place(blocks: Sequence[BlockLayout], header_size: int) -> tuple[tuple[int, ...], int]:
    """File offset of each block, and the file's size, behind a header of ``header_size`` bytes."""
    offsets, end = [], header_size
    for block in blocks:
        offsets.append(end)
        end += block.nbytes
    return tuple(offsets), end


def header_size(json_size: int) -> int:
    return align(PREAMBLE.size + json_size, PAGE)


def encode(
    fingerprint: Fingerprint,
    blocks: Sequence[BlockLayout],
    checksums: Sequence[Sequence[int]] | None = None,
) -> bytes:
    """The header, a multiple of 4096 bytes. Its size does not depend on ``checksums`` (None: 0).

    Raises ValueError when the fingerprint or the layout cannot be written.
    """
    check_fingerprint(fingerprint)
    check_blocks(blocks)
    if checksums is None:
        checksums = [[0] * len(chunks(b.nbytes)) for b in blocks]
    if [len(sums) for sums in checksums] != [-(-b.nbytes // CHUNK) for b in blocks]:
        raise ValueError("a store needs one checksum for each chunk of each block")
    offsets, _ = place(blocks, 0)  # relative to the first block, so that they do not move
    table = [
        {
            "name": block.name,
            "offset": offset,
            "nbytes": block.nbytes,
            "tensors": [[t.name, list(t.shape), DTYPE_NAMES[t.dtype]] for t in block.tensors],
            "checksums": [f"{value:016x}" for value in sums],
        }
        for block, offset, sums in zip(blocks, offsets, checksums, strict=True)
    ]
    body = {"fingerprint": dict(fingerprint), "chunk": CHUNK, "blocks": table}
    text = json.dumps(body, separators=(",", ":"), sort_keys=True).encode("ascii")
    if len(text) > MAX_JSON:
        raise ValueError(f"the store's header needs {len(text)} bytes, more than {MAX_JSON}")
    size = header_size(len(text))
    rest = text.ljust(size - PREAMBLE.size, b"\0")
    checksum = header_checksum(MAGIC, VERSION, len(text), rest)
    return PREAMBLE.pack(MAGIC, VERSION, len(text), checksum) + rest


def header_checksum(magic: bytes, version: int, json_size: int, rest: bytes) -> int:
    start = PREAMBLE.pack(magic, version, json_size, 0)
    return xxhash.xxh3_64_intdigest(start + rest)


def decode_preamble(page: bytes, path: str) -> int:
    """The header's size in bytes, from the file's first bytes. Allocates nothing."""
    if len(page) < PREAMBLE.size:
        raise StoreTruncatedError(f"{path} is truncated: it has no header")
    magic, version, json_size, _ = PREAMBLE.unpack_from(page)
    if magic != MAGIC:
        raise StoreCorruptError(f"{path} is corrupted or not a weight store (wrong magic)")
    if version != VERSION:
        raise StoreVersionError(
            f"{path} has format version {version}, this release reads {VERSION}"
        )
    if json_size > MAX_JSON:
        raise StoreCorruptError(f"{path} is corrupted: its header claims {json_size} bytes")
    return header_size(json_size)


def decode(raw: bytes, path: str) -> Header:
    """The header from its ``raw`` bytes (as many as ``decode_preamble`` said).

    Raises StoreCorruptError for anything that ``encode`` would not have written.
    """
    magic, version, json_size, checksum = PREAMBLE.unpack_from(raw)
    rest = raw[PREAMBLE.size :]
    if header_checksum(magic, version, json_size, rest) != checksum:
        raise StoreCorruptError(f"{path} is corrupted: its header does not match its checksum")
    try:
        body = json.loads(rest[:json_size])
        fingerprint, table = body["fingerprint"], body["blocks"]
        blocks = tuple(
            BlockLayout(
                entry["name"],
                tuple(TensorSpec(name, tuple(shape), DTYPES[dtype])
                      for name, shape, dtype in entry["tensors"]),
            )
            for entry in table
        )  # fmt: skip
        checksums = tuple(tuple(int(value, 16) for value in entry["checksums"]) for entry in table)
        expected = encode(fingerprint, blocks, checksums)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        # Not chained into the message: a hostile header chooses the text of these errors.
        raise StoreCorruptError(f"{path} is corrupted: its header is malformed") from error
    # One writer, one encoding: re-encoding what was understood catches every contradiction
    # (offsets, sizes, chunk counts, unknown keys) without a check for each.
    if expected != raw:
        raise StoreCorruptError(f"{path} is corrupted: its header contradicts itself")
    offsets, file_size = place(blocks, len(raw))
    return Header(fingerprint, blocks, checksums, offsets, file_size)
