# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Writing a weight store: all of it appears under its name, durable, or nothing does."""

import contextlib
import errno
import fcntl
import glob
import logging
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType

import torch
import xxhash
from torch import Tensor

from vllm_subspec.weights.direct_io import aligned_buffer, bytes_of, open_direct
from vllm_subspec.weights.store_format import (
    CHUNK,
    PAGE,
    BlockLayout,
    Fingerprint,
    StoreWriteError,
    chunks,
    encode,
    place,
)

logger = logging.getLogger(__name__)


class StoreWriter:
    """Writes a store; a context manager that commits on a clean exit and leaves nothing otherwise.

    Entering waits for other writers of the same path, removes what killed ones left behind, and
    reserves the whole file, so that a full disk is reported at once (StoreWriteError). One thread
    at a time; never two writers of one path in one thread, the second would wait for ever.
    """

    def __init__(self, path: str, fingerprint: Fingerprint, blocks: Sequence[BlockLayout]) -> None:
        self.path = os.path.abspath(path)
        self.fingerprint = dict(fingerprint)
        self.blocks = tuple(blocks)
        header = encode(self.fingerprint, self.blocks)  # ValueError before anything is touched
        self._header_size = len(header)
        self._offsets, self.file_size = place(self.blocks, len(header))
        self._checksums: list[list[int] | None] = [None] * len(self.blocks)
        self._lock_fd = -1
        self._fd = -1
        self._partial = ""

    def lock(self) -> None:
        """Become the path's only writer, after the one there is. Entering does it by itself."""
        if self._lock_fd >= 0:
            return
        with _explained(self.path):
            os.makedirs(os.path.dirname(self.path), mode=0o700, exist_ok=True)
            # The lock file stays: removing it would let a third process lock a new one.
            fd = os.open(f"{self.path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    logger.info("Waiting for another process to finish writing %s", self.path)
                    fcntl.flock(fd, fcntl.LOCK_EX)
            except BaseException:
                os.close(fd)
                raise
        self._lock_fd = fd

    def __enter__(self) -> "StoreWriter":
        self.lock()
        folder, name = os.path.split(self.path)
        try:
            with _explained(self.path, self.file_size):
                # We hold the lock, so whoever wrote these is dead (a process id could be reused).
                for stale in glob.glob(f"{glob.escape(self.path)}.*.partial"):
                    logger.warning("Removing %s, left by a writer that was killed", stale)
                    os.unlink(stale)
                self._partial = f"{self.path}.{os.getpid()}-{secrets.token_hex(4)}.partial"
                # Reserved through an ordinary descriptor: where the file system cannot reserve, the
                # C library does it with one-byte writes, which a direct descriptor refuses.
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                self._fd = os.open(self._partial, flags, 0o600)
                os.posix_fallocate(self._fd, 0, self.file_size)
                os.close(self._fd)
                self._fd = -1
                self._fd, self._direct = open_direct(self._partial, os.O_RDWR)
                self._staging = aligned_buffer(min(CHUNK, max(b.nbytes for b in self.blocks)))
        except BaseException:
            self.abort()
            raise
        return self

    def write_block(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Write block ``index``, in any order, once each; tensors may lie on any device.

        Raises ValueError when it was written before or the tensors are not those of the layout,
        StoreWriteError when the disk refuses.
        """
        if not 0 <= index < len(self.blocks):
            raise IndexError(f"block {index} of {len(self.blocks)}")
        block, offset = self.blocks[index], self._offsets[index]
        if self._fd < 0:
            raise ValueError(f"the writer of {self.path} is not open")
        if self._checksums[index] is not None:
            raise ValueError(f"block {block.name!r} is written twice")
        if tensors.keys() != {spec.name for spec in block.tensors}:
            raise ValueError(
                f"block {block.name!r} holds {[spec.name for spec in block.tensors]}, "
                f"got {list(tensors)}"
            )
        for spec in block.tensors:
            tensor = tensors[spec.name]
            if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
                raise ValueError(
                    f"{block.name!r}.{spec.name!r} is {spec.dtype} {spec.shape} in the layout, "
                    f"got {tensor.dtype} {tuple(tensor.shape)}"
                )
        flat = [
            tensors[spec.name].detach().contiguous().flatten().view(torch.uint8)
            for spec in block.tensors
        ]
        sums = []
        for start, size in chunks(block.nbytes):  # so that only 16 MiB are ever staged
            filled = 0
            for data, at in zip(flat, block.offsets, strict=True):
                low, high = max(at, start), min(at + data.numel(), start + size)
                if low < high:
                    self._staging[filled : low - start].zero_()
                    filled = high - start
                    self._staging[low - start : filled].copy_(data[low - at : high - at])
            self._staging[filled:size].zero_()
            piece = bytes_of(self._staging)[:size]
            sums.append(xxhash.xxh3_64_intdigest(piece))
            self._write(piece, offset + start)
        self._checksums[index] = sums

    def _write(self, data: memoryview, offset: int) -> None:
        with _explained(self.path, self.file_size):
            while data:
                n = os.pwritev(self._fd, [data], offset)
                n -= n % PAGE if n < len(data) else 0  # a direct write may be split at any sector
                if n == 0:
                    raise OSError(errno.EIO, "the file system accepts no more data")
                data, offset = data[n:], offset + n

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            self.abort()

    def _commit(self) -> None:
        sums = [s for s in self._checksums if s is not None]
        if len(sums) < len(self.blocks):
            missing = self._checksums.index(None)
            raise ValueError(
                f"{len(self.blocks) - len(sums)} blocks were not written, the first is "
                f"{self.blocks[missing].name!r}"
            )
        header = aligned_buffer(self._header_size)
        bytes_of(header)[:] = encode(self.fingerprint, self.blocks, sums)
        self._write(bytes_of(header), 0)
        with _explained(self.path, self.file_size):
            os.fsync(self._fd)
            if not self._direct:
                os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.rename(self._partial, self.path)
            self._partial = ""
            folder = os.open(os.path.dirname(self.path), os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def abort(self) -> None:
        """Remove what is not committed and let the next writer in. Idempotent."""
        fd, self._fd = self._fd, -1
        partial, self._partial = self._partial, ""
        lock_fd, self._lock_fd = self._lock_fd, -1
        try:
            if partial:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(partial)
            if fd >= 0:
                os.close(fd)
        finally:
            if lock_fd >= 0:
                fcntl.flock(lock_fd, fcntl.LOCK_UN)  # a forked child may hold a copy of lock_fd
                os.close(lock_fd)


@contextlib.contextmanager
def _explained(path: str, needed: int = 0) -> Iterator[None]:
    """Turn an OSError into a StoreWriteError that says what to do."""
    try:
        yield
    except OSError as error:
        folder = os.path.dirname(path)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StoreWriteError(
                f"no room for the weight store in {folder}: it needs {needed} bytes, "
                f"{shutil.disk_usage(folder).free} are free ({error.strerror}); free some or "
                "choose another store_dir"
            ) from error
        raise StoreWriteError(
            f"cannot write {path}: {error.strerror}; choose another store_dir"
        ) from error
