# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Reading large blocks past the page cache (O_DIRECT), several requests at a time.

Streamed weights are read once per pass and are larger than memory, so caching them would only evict
what is useful and cost a copy. On the NVMe-class disk this was tuned on (2 cores, 2 GiB file), one
16 MiB request at a time into ordinary pages reads 1.4 GB/s for 0.03 CPU-seconds per GB; four 4 MiB
requests into huge pages 1.9 GB/s for 0.013: with 4 KiB pages the kernel pins and maps 512 times as
many.
"""

import errno
import functools
import logging
import mmap
import os
import stat
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from vllm_subspec.weights.store_format import (
    PAGE,
    ReadCancelledError,
    StoreMissingError,
    StoreReadError,
)

logger = logging.getLogger(__name__)

READ_THREADS = 4
READ_SIZE = 4 << 20
T = TypeVar("T")


def aligned_buffer(nbytes: int) -> Tensor:
    """A zeroed uint8 [nbytes] tensor at a 4096-byte boundary, on huge pages where the kernel can.

    The memory is an anonymous mapping, not from torch's allocator, which rounds sizes up. It is
    returned to the system when the last tensor that views it dies. Raises ValueError for
    ``nbytes`` < 1 and MemoryError when the system refuses.
    """
    if nbytes < 1:
        raise ValueError(f"a buffer needs at least one byte, not {nbytes}")
    try:
        # Private, because huge pages for shared mappings are off on most systems.
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise MemoryError(f"cannot allocate a buffer of {nbytes} bytes: {error}") from error
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a kernel built without huge pages
            raise
    return torch.frombuffer(memory, dtype=torch.uint8)


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous uint8 vector, which stays alive with the view."""
    view: memoryview = tensor.numpy().data
    return view


def open_direct(path: str, flags: int) -> tuple[int, bool]:
    """A descriptor with O_DIRECT and True, or without it and False where there is no O_DIRECT.

    ``flags`` must allow reading and ``path`` exist: some file systems accept the flag at first and
    refuse the first request, so one is made here. Raises OSError.
    """
    flags |= os.O_CLOEXEC
    fd = -1
    try:
        fd = os.open(path, flags | os.O_DIRECT)
        os.preadv(fd, [mmap.mmap(-1, PAGE)], 0)
        return fd, True
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        if error.errno != errno.EINVAL:
            raise
    _warn_buffered(os.path.dirname(os.path.abspath(path)))
    return os.open(path, flags), False


@functools.cache  # once per folder
def _warn_buffered(folder: str) -> None:
    logger.warning(
        "The file system of %s has no O_DIRECT: weights pass through the page cache, which is "
        "slower and takes memory. Put the weight store on a local disk to avoid this.",
        folder,
    )


@dataclass(frozen=True)
class Extent:
    """A named range of a file: ``offset`` and ``nbytes`` are multiples of 4096."""

    name: str
    offset: int
    nbytes: int


class DirectFile:
    """A file open for direct reading. ``direct`` is False where only buffered reads are possible.

    Raises StoreMissingError or StoreReadError when ``path`` cannot be opened as a regular file.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):  # first: opening a pipe would block
                raise StoreReadError(f"{path} is not a regular file")
            self._fd, self.direct = open_direct(path, os.O_RDONLY)
        except FileNotFoundError as error:
            raise StoreMissingError(f"there is no weight store at {path}") from error
        except OSError as error:
            raise StoreReadError(
                f"cannot open {path}: {error.strerror}; choose another store_dir"
            ) from error

    def dup(self) -> "DirectFile":
        """A second descriptor of the same file, whatever ``path`` names by now."""
        other = object.__new__(DirectFile)
        other.path, other.direct = self.path, self.direct
        try:
            other._fd = os.dup(self._fd)
        except OSError as error:
            raise StoreReadError(f"cannot open {self.path} again: {error.strerror}") from error
        return other

    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Fill ``buffer`` from ``offset`` (both aligned); returns the bytes read, fewer at the end.

        The interpreter repeats calls that a signal interrupts. Raises StoreReadError.
        """
        done = 0
        try:
            while done < len(buffer):
                n = os.preadv(self._fd, [buffer[done:]], offset + done)
                # A direct read may be split at any sector; go on from an aligned position.
                step = n if not self.direct or done + n == len(buffer) else n - n % PAGE
                if step == 0:
                    return done + n
                done += step
        except OSError as error:
            raise StoreReadError(
                f"reading {self.path} at byte {offset + done} failed: {error.strerror}"
            ) from error
        if not self.direct:
            os.posix_fadvise(self._fd, offset, done, os.POSIX_FADV_DONTNEED)
        return done

    def close(self) -> None:
        """Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def for_each(
    pool: ThreadPoolExecutor,
    width: int,
    items: Iterable[T],
    work: Callable[[T], None],
    stopped: Callable[[], bool],
) -> bool:
    """Run ``work`` on every item, ``width`` at a time; False if ``stopped()`` cut it short.

    Returns or raises (the first error) only when no item is being worked on any more.
    """
    queue, lock, failed = iter(items), threading.Lock(), threading.Event()

    def drain() -> bool:
        while not failed.is_set():
            with lock:
                item = next(queue, None)
            if item is None:
                return True
            if stopped():
                return False
            try:
                work(item)
            except BaseException:
                failed.set()
                raise
        return True

    tasks = [pool.submit(drain) for _ in range(width)]
    try:
        wait(tasks)
    except BaseException:  # KeyboardInterrupt: the workers still write into the caller's buffer
        failed.set()
        wait(tasks)
        raise
    return all(task.result() for task in tasks)


class BlockReader:
    """Reads blocks of a file into the caller's buffers. Safe to use from several threads.

    Each ``read`` keeps up to ``threads`` requests of ``size`` bytes in flight; reads that overlap
    share the same threads.
    """

    def __init__(
        self,
        file: DirectFile,
        extents: Sequence[Extent],
        threads: int = READ_THREADS,
        size: int = READ_SIZE,
    ) -> None:
        self.direct = file.direct
        self._file = file
        self._extents = tuple(extents)
        self._threads = threads
        self._size = size
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="weight-store-read")
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._reads = 0
        self._idle = threading.Condition(self._lock)

    def read(self, index: int, out: Tensor, cancel: threading.Event | None = None) -> None:
        """Fill the first bytes of ``out`` (uint8 vector, 4096-aligned, CPU) with block ``index``.

        Once ``cancel`` is set, or the reader is closed, raises ReadCancelledError as soon as the
        requests in flight are done (a request cannot be recalled from the disk). Raises
        StoreReadError when the disk fails or the file has become shorter; ValueError and
        IndexError for a wrong ``out`` or ``index``. After any of them ``out`` is undefined.
        """
        if not 0 <= index < len(self._extents):
            raise IndexError(f"block {index} of {len(self._extents)}")
        extent = self._extents[index]
        if out.dtype != torch.uint8 or out.dim() != 1 or not out.is_contiguous() or out.is_cuda:
            raise ValueError("blocks are read into contiguous uint8 vectors in host memory")
        if out.numel() < extent.nbytes or out.data_ptr() % PAGE:
            raise ValueError(
                f"block {extent.name!r} needs a {PAGE}-aligned buffer of {extent.nbytes} bytes, "
                f"got {out.numel()} at {out.data_ptr():#x}"
            )
        target = bytes_of(out)

        def fetch(start: int) -> None:
            piece = target[start : min(start + self._size, extent.nbytes)]
            got = self._file.read_into(piece, extent.offset + start)
            if got < len(piece):
                raise StoreReadError(
                    f"{self._file.path} was truncated while in use: block {extent.name!r} ends "
                    f"{len(piece) - got} bytes too early"
                )

        def stopped() -> bool:
            return self._closing.is_set() or (cancel is not None and cancel.is_set())

        starts = range(0, extent.nbytes, self._size)
        with self._lock:
            if self._closing.is_set():
                raise StoreReadError(f"the reader of {self._file.path} is closed")
            self._reads += 1
        try:
            width = min(self._threads, len(starts))
            if not for_each(self._pool, width, starts, fetch, stopped):
                raise ReadCancelledError(f"reading block {extent.name!r} was cancelled")
        finally:
            with self._lock:
                self._reads -= 1
                self._idle.notify_all()

    def close(self) -> None:
        """Cancel reads in progress, wait for them, release the file. Idempotent."""
        with self._lock:
            self._closing.set()
            self._idle.wait_for(lambda: self._reads == 0)
        self._pool.shutdown()
        self._file.close()

    def __enter__(self) -> "BlockReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
