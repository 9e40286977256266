# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Direct reading: against real files, a real failing device file, real truncation and signals."""

import logging
import mmap
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_subspec.weights import direct_io
from vllm_subspec.weights.direct_io import BlockReader, DirectFile, Extent, aligned_buffer
from vllm_subspec.weights.store_format import (
    PAGE,
    ReadCancelledError,
    StoreMissingError,
    StoreReadError,
)

SLOW_READ = 128 << 20  # bytes that take 32768 requests of one page: long enough to interrupt


class CancelAfter(threading.Event):
    """An event that is set by being asked ``checks`` times, so that a test needs no timing."""

    def __init__(self, checks: int) -> None:
        super().__init__()
        self.left = checks

    def is_set(self) -> bool:
        self.left -= 1
        return self.left < 0


class Started(threading.Event):
    """Never set; tells when a read is under way."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = threading.Event()

    def is_set(self) -> bool:
        self.asked.set()
        return False


@pytest.fixture
def data(tmp_path: Path) -> tuple[str, bytes]:
    content = os.urandom(40 * PAGE)
    path = tmp_path / "data"
    path.write_bytes(content)
    return str(path), content


@pytest.fixture
def slow(tmp_path: Path) -> BlockReader:
    """A reader of zeros, one page per request."""
    path = tmp_path / "holes"
    path.touch()
    os.truncate(path, SLOW_READ)
    return BlockReader(DirectFile(str(path)), [Extent("all", 0, SLOW_READ)], threads=1, size=PAGE)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@given(st.integers(1, 1 << 22))
@settings(max_examples=30)
def test_aligned_buffer_is_exact_aligned_and_zeroed(nbytes: int) -> None:
    buffer = aligned_buffer(nbytes)
    assert buffer.dtype == torch.uint8 and buffer.shape == (nbytes,)
    assert buffer.data_ptr() % PAGE == 0
    assert not buffer.any()
    buffer.fill_(255)


def test_aligned_buffer_memory_is_returned_when_the_last_view_dies() -> None:
    size = 64 << 20
    before = resident_bytes()
    buffer = aligned_buffer(size)
    buffer.fill_(1)
    view = buffer[size // 2 :].view(torch.float32)
    del buffer
    assert resident_bytes() > before + size * 0.9
    assert view[0].item() == view[-1].item()
    del view
    assert resident_bytes() < before + size * 0.1


@pytest.mark.parametrize("nbytes", [0, -1])
def test_aligned_buffer_refuses_nothing(nbytes: int) -> None:
    with pytest.raises(ValueError, match="at least one byte"):
        aligned_buffer(nbytes)


def test_aligned_buffer_says_when_memory_is_refused() -> None:
    with pytest.raises(MemoryError, match=str(1 << 62)):
        aligned_buffer(1 << 62)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("size", [PAGE, 3 * PAGE, 64 * PAGE])
def test_blocks_arrive_whole(data: tuple[str, bytes], threads: int, size: int) -> None:
    path, content = data
    extents = [Extent("a", 0, 7 * PAGE), Extent("b", 7 * PAGE, PAGE), Extent("c", PAGE, 39 * PAGE)]
    with BlockReader(DirectFile(path), extents, threads=threads, size=size) as reader:
        for index, extent in enumerate(extents):
            out = aligned_buffer(extent.nbytes + PAGE).fill_(7)
            reader.read(index, out)
            expected = content[extent.offset : extent.offset + extent.nbytes]
            assert bytes(out[: extent.nbytes].numpy()) == expected
            assert (out[extent.nbytes :] == 7).all()


def test_several_threads_share_a_reader(data: tuple[str, bytes]) -> None:
    path, content = data
    extents = [Extent(str(i), i * PAGE, 8 * PAGE) for i in range(32)]
    with BlockReader(DirectFile(path), extents, size=PAGE) as reader, ThreadPoolExecutor(6) as pool:

        def read(index: int) -> bytes:
            out = aligned_buffer(8 * PAGE)
            reader.read(index, out)
            return bytes(out.numpy())

        for index, got in enumerate(pool.map(read, range(32))):
            assert got == content[index * PAGE : (index + 8) * PAGE]


def test_wrong_buffers_and_indices_are_refused(data: tuple[str, bytes]) -> None:
    good = aligned_buffer(4 * PAGE)
    with BlockReader(DirectFile(data[0]), [Extent("a", 0, 2 * PAGE)]) as reader:
        for bad in (
            good[64:],  # not aligned
            good[:PAGE],  # too small
            good[::2],  # not contiguous
            good.view(2, -1),
            good.view(torch.int32),
        ):
            with pytest.raises(ValueError, match="vector|aligned"):
                reader.read(0, bad)
        for index in (-1, 1):
            with pytest.raises(IndexError):
                reader.read(index, good)


def test_short_file_is_an_error_at_any_length(data: tuple[str, bytes]) -> None:
    path, content = data
    with BlockReader(DirectFile(path), [Extent("a", PAGE, 39 * PAGE)], size=8 * PAGE) as reader:
        out = aligned_buffer(39 * PAGE)
        reader.read(0, out)  # while the file is whole
        for length in (40 * PAGE - 1, 30 * PAGE, 20 * PAGE + 512, 10000, PAGE, 0):
            os.truncate(path, length)
            with pytest.raises(StoreReadError, match="truncated while in use: block 'a'"):
                reader.read(0, out)
    # The ragged end itself is read correctly.
    Path(path).write_bytes(content[:10000])
    file, out = DirectFile(path), aligned_buffer(5 * PAGE)
    assert file.read_into(direct_io.bytes_of(out), 0) == 10000
    assert bytes(out[:10000].numpy()) == content[:10000]
    file.close()


def test_a_deleted_or_replaced_file_stays_readable(data: tuple[str, bytes]) -> None:
    path, content = data
    with BlockReader(DirectFile(path), [Extent("a", 0, 40 * PAGE)]) as reader:
        os.unlink(path)
        Path(path).write_bytes(bytes(40 * PAGE))
        out = aligned_buffer(40 * PAGE)
        reader.read(0, out)
        assert bytes(out.numpy()) == content


def test_device_error_is_reported_and_the_reader_survives_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    # The kernel's own file: reading an address that is not mapped fails with EIO, reading a mapped
    # one succeeds; and it has no O_DIRECT, so that the buffered path is used.
    direct_io._warn_buffered.cache_clear()
    source = aligned_buffer(9 * PAGE)
    source.random_(256)
    extents = [Extent("hole", 0, PAGE), Extent("memory", source.data_ptr(), 9 * PAGE)]
    with caplog.at_level(logging.WARNING):
        reader = BlockReader(DirectFile("/proc/self/mem"), extents, size=PAGE)
        DirectFile("/proc/self/mem").close()
    assert not reader.direct
    assert [r.getMessage() for r in caplog.records if "no O_DIRECT" in r.getMessage()] == [
        "The file system of /proc/self has no O_DIRECT: weights pass through the page cache, which "
        "is slower and takes memory. Put the weight store on a local disk to avoid this."
    ]
    out = aligned_buffer(9 * PAGE)
    with pytest.raises(StoreReadError, match="/proc/self/mem at byte 0 failed: Input/output error"):
        reader.read(0, out)
    reader.read(1, out)
    assert torch.equal(out, source)
    reader.close()


def test_what_cannot_be_opened_says_why(tmp_path: Path) -> None:
    with pytest.raises(StoreMissingError, match="no weight store at"):
        DirectFile(str(tmp_path / "absent"))
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", ""):
        with pytest.raises(StoreReadError, match="not a regular file"):
            DirectFile(str(tmp_path / name))
    (tmp_path / "file").touch()
    with pytest.raises(StoreReadError, match="Not a directory"):
        DirectFile(str(tmp_path / "file" / "x"))


@pytest.mark.parametrize("checks", [0, 3])
def test_cancelling_stops_after_the_requests_in_flight(
    data: tuple[str, bytes], checks: int
) -> None:
    path, content = data
    extents = [Extent("a", 0, 40 * PAGE)]
    with BlockReader(DirectFile(path), extents, threads=1, size=PAGE) as reader:
        out = aligned_buffer(40 * PAGE)
        with pytest.raises(ReadCancelledError, match="'a'"):
            reader.read(0, out, CancelAfter(checks))
        assert bytes(out[: checks * PAGE].numpy()) == content[: checks * PAGE]
        assert not out[checks * PAGE :].any()
        reader.read(0, out, threading.Event())
        assert bytes(out.numpy()) == content


def test_closing_cancels_a_read_and_is_idempotent(slow: BlockReader) -> None:
    started = Started()
    with ThreadPoolExecutor(1) as pool:
        task = pool.submit(slow.read, 0, aligned_buffer(SLOW_READ), started)
        started.asked.wait()
        slow.close()
        with pytest.raises(ReadCancelledError):
            task.result()
    slow.close()
    with pytest.raises(StoreReadError, match="closed"):
        slow.read(0, aligned_buffer(SLOW_READ))


def test_an_interrupted_read_writes_no_more_into_the_buffer(slow: BlockReader) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    out = aligned_buffer(SLOW_READ).fill_(1)
    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 0.02)
            slow.read(0, out)
        left = int(out[::PAGE].sum())
        time.sleep(0.02)
        assert 0 < left == int(out[::PAGE].sum())
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        slow.close()
