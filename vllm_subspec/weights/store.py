# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""The weight store: full-precision weights at rest in one checksummed file per model and rank.

A store appears under its name only when it is complete: it is written to a temporary file in the
same folder, made durable, and renamed. Writers of the same store take turns through a lock file, so
that a second process finds the first one's result instead of repeating its work.

Checksums are XXH3-64: 10 GB/s on one core (measured; CRC-32 from zlib 3.1, BLAKE3 4.3), so that a
full scan is limited by the disk, and the hash releases the interpreter's lock.
"""

import contextlib
import logging
import os
import queue
import stat
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import xxhash

from vllm_subspec.weights.direct_io import (
    READ_THREADS,
    BlockReader,
    DirectFile,
    Extent,
    aligned_buffer,
    bytes_of,
    for_each,
)
from vllm_subspec.weights.store_format import (
    PAGE,
    BlockLayout,
    Fingerprint,
    Header,
    ReadCancelledError,
    StoreCorruptError,
    StoreError,
    StoreForeignError,
    StoreMissingError,
    StoreReadError,
    StoreTruncatedError,
    StoreVersionError,
    StoreWriteError,
    TensorSpec,
    chunks,
    decode,
    decode_preamble,
)
from vllm_subspec.weights.store_writer import StoreWriter

__all__ = [
    "BlockLayout",
    "BlockReader",
    "ReadCancelledError",
    "StoreCorruptError",
    "StoreError",
    "StoreForeignError",
    "StoreMissingError",
    "StoreReadError",
    "StoreTruncatedError",
    "StoreVersionError",
    "StoreWriteError",
    "StoreWriter",
    "TensorSpec",
    "WeightStore",
    "aligned_buffer",
    "open_or_create",
]

logger = logging.getLogger(__name__)


class WeightStore:
    """A finished store, open for reading. It keeps its file even if the name is replaced."""

    def __init__(self, file: DirectFile, header: Header) -> None:
        self._file = file
        self._header = header
        self.path = file.path
        self.direct = file.direct
        self.blocks = header.blocks
        self.fingerprint = header.fingerprint

    @classmethod
    def open(
        cls, path: str, fingerprint: Fingerprint, blocks: Sequence[BlockLayout] | None = None
    ) -> "WeightStore":
        """Open the store at ``path``; reads its header only (``verify`` reads the rest).

        ``blocks``, when given, must be the store's layout. Raises a StoreError whose class and
        ``reason`` say what is wrong: missing, truncated, corrupted, unsupported version, foreign
        (the first differing key is named), or unreadable.
        """
        file = DirectFile(path)
        try:
            header = _read_header(file)
            _check_same(path, header.fingerprint, fingerprint)
            if blocks is not None and tuple(blocks) != header.blocks:
                raise StoreForeignError(f"{path} holds other tensors than this model", "blocks")
        except BaseException:
            file.close()
            raise
        return cls(file, header)

    def verify(self, cancel: threading.Event | None = None) -> None:
        """Compare every chunk of every block with its checksum, at the speed of the disk.

        Raises StoreCorruptError naming a block that differs, StoreReadError, or
        ReadCancelledError once ``cancel`` is set. Needs up to 64 MiB of memory.
        """
        header = self._header
        work = [
            (block.name, at + start, size, checksum)
            for block, at, sums in zip(header.blocks, header.offsets, header.checksums, strict=True)
            for (start, size), checksum in zip(chunks(block.nbytes), sums, strict=True)
        ]
        width = min(READ_THREADS, len(work))
        largest = max(size for _, _, size, _ in work)
        free: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        for _ in range(width):
            free.put(bytes_of(aligned_buffer(largest)))

        def check(item: tuple[str, int, int, int]) -> None:
            name, offset, size, checksum = item
            buffer = free.get()
            try:
                if self._file.read_into(buffer[:size], offset) < size:
                    raise StoreReadError(f"{self.path} was truncated while in use: block {name!r}")
                if xxhash.xxh3_64_intdigest(buffer[:size]) != checksum:
                    raise StoreCorruptError(
                        f"{self.path} is corrupted: block {name!r} does not match its checksum "
                        f"within the {size} bytes at {offset}"
                    )
            finally:
                free.put(buffer)

        def stopped() -> bool:
            return cancel is not None and cancel.is_set()

        with ThreadPoolExecutor(width, thread_name_prefix="weight-store-verify") as pool:
            if not for_each(pool, width, work, check, stopped):
                raise ReadCancelledError(f"checking {self.path} was cancelled")

    def open_reader(self) -> BlockReader:
        """A reader with its own descriptor; it outlives ``close``."""
        header = self._header
        extents = [
            Extent(block.name, offset, block.nbytes)
            for block, offset in zip(header.blocks, header.offsets, strict=True)
        ]
        return BlockReader(self._file.dup(), extents)

    def close(self) -> None:
        """Idempotent."""
        self._file.close()

    def __enter__(self) -> "WeightStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read_header(file: DirectFile) -> Header:
    def read(nbytes: int) -> bytes:
        page = bytes_of(aligned_buffer(nbytes))
        return bytes(page[: file.read_into(page, 0)])

    size = decode_preamble(read(PAGE), file.path)
    actual = file.size()
    if actual < size:
        raise StoreTruncatedError(f"{file.path} is truncated: its header ends at byte {actual}")
    header = decode(read(size), file.path)
    if actual < header.file_size:
        raise StoreTruncatedError(
            f"{file.path} is truncated: {actual} of {header.file_size} bytes are there"
        )
    if actual > header.file_size:
        raise StoreCorruptError(
            f"{file.path} is corrupted: {actual} bytes instead of {header.file_size}"
        )
    return header


def _check_same(path: str, found: Fingerprint, wanted: Fingerprint) -> None:
    for key in sorted({*found, *wanted}):
        if found.get(key) != wanted.get(key):
            raise StoreForeignError(
                f"{path} belongs to something else: its {key[:200]!r} is "
                f"{str(found.get(key))[:200]!r}, not {str(wanted.get(key))[:200]!r}",
                key,
            )


def open_or_create(
    path: str, fingerprint: Fingerprint, blocks: Sequence[BlockLayout]
) -> WeightStore | StoreWriter:
    """The verified store at ``path``, or a locked writer for it where there is none that is sound.

    Why an existing file is not used is logged as a warning. If another process is writing the
    store, waits and returns its result. Raises StoreReadError when the path cannot be read (it is
    then not ours to replace) and StoreWriteError when the folder cannot be written.
    """
    _warn_of_strangers(path)
    found = _sound(path, fingerprint, blocks)
    if isinstance(found, WeightStore):
        return found
    writer = StoreWriter(path, fingerprint, blocks)
    writer.lock()
    try:
        found = _sound(path, fingerprint, blocks)  # another process may have finished it meanwhile
    except BaseException:
        writer.abort()
        raise
    if isinstance(found, WeightStore):
        writer.abort()
        return found
    if not isinstance(found, StoreMissingError):
        logger.warning("The weight store will be rebuilt (%s): %s", found.reason, found)
    return writer


def _warn_of_strangers(path: str) -> None:
    """Checksums find accidents. Who can write a store can also make it say something else."""
    for place in (os.path.dirname(os.path.abspath(path)), path):
        with contextlib.suppress(OSError):  # it is not there yet
            if os.stat(place).st_mode & stat.S_IWOTH:
                logger.warning(
                    "Everyone on this machine can write %s, and so change what the model answers: "
                    "run chmod o-w on it, or choose another store_dir",
                    place,
                )


def _sound(
    path: str, fingerprint: Fingerprint, blocks: Sequence[BlockLayout]
) -> WeightStore | StoreError:
    """The verified store, or why it has to be written anew."""
    try:
        store = WeightStore.open(path, fingerprint, blocks)
        try:
            store.verify()
        except BaseException:
            store.close()
            raise
    except StoreReadError:
        raise
    except StoreError as error:
        return error
    return store
