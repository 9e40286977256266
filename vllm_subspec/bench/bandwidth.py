# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""How fast this machine moves weights, measured in about a second each. All rates are bytes/s."""

import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from vllm_subspec.machine.rates import largest_cache
from vllm_subspec.weights.direct_io import BlockReader, DirectFile, Extent, aligned_buffer

PROBE_BYTES = 256 << 20


def copy_rate(target: Tensor, source: Tensor, seconds: float = 0.5) -> float:
    """Bytes of ``source`` per second, of the fastest copy within ``seconds`` (at least three)."""
    fastest, begun = float("inf"), time.perf_counter()
    rounds = 0
    while rounds < 3 or time.perf_counter() - begun < seconds:
        start = time.perf_counter()
        target.copy_(source, non_blocking=True)
        if target.is_cuda:
            torch.cuda.synchronize(target.device)
        fastest = min(fastest, time.perf_counter() - start)
        rounds += 1
    return source.nbytes / fastest


def memory_rates() -> dict[str, float]:
    """Copies within host memory, and with a GPU to it and within its memory.

    A copy within one memory reads and writes each byte, and both are counted.
    """
    size = max(PROBE_BYTES, 4 * largest_cache())
    source, target = aligned_buffer(size).fill_(1), aligned_buffer(size).fill_(0)
    rates = {"host memory, read + write": 2 * copy_rate(target, source)}
    if torch.cuda.is_available():
        pinned = torch.ones(PROBE_BYTES, dtype=torch.uint8, pin_memory=True)
        first = torch.zeros(PROBE_BYTES, dtype=torch.uint8, device="cuda")
        second = torch.zeros_like(first)
        rates["pinned host to device"] = copy_rate(first, pinned)
        rates["device memory, read + write"] = 2 * copy_rate(second, first)
    return rates


def host_copy_rate() -> float:
    """From host memory to where the model computes: a GPU, or host memory itself."""
    rates = memory_rates()
    return rates.get("pinned host to device", rates["host memory, read + write"] / 2)


def direct_read_rate(folder: Path) -> tuple[float, bool]:
    """Reads a temporary file in ``folder`` as a weight store is read; it is removed again.

    Returns:
        The rate, and whether the file system allowed direct reads.

    Raises:
        OSError: the file cannot be written.
        StoreReadError: it cannot be read back.
    """
    with tempfile.NamedTemporaryFile(dir=folder, prefix="subspec-doctor-") as file:
        block = os.urandom(PROBE_BYTES // 16)  # random: some file systems compress
        for _ in range(16):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        buffer = aligned_buffer(PROBE_BYTES).fill_(0)  # its pages exist before the clock runs
        with BlockReader(DirectFile(file.name), [Extent("probe", 0, PROBE_BYTES)]) as reader:
            start = time.perf_counter()
            reader.read(0, buffer)
            return PROBE_BYTES / (time.perf_counter() - start), reader.direct


def store_read_rate(store: Path) -> float:
    """Plain O_DIRECT reads of a whole file, four of 8 MiB at a time: the most a disk gives."""
    size = store.stat().st_size // 4096 * 4096
    piece = 8 << 20
    fd = os.open(store, os.O_RDONLY | os.O_DIRECT)
    buffers = [aligned_buffer(piece) for _ in range(4)]

    def read(lane: int) -> None:
        view = memoryview(buffers[lane].numpy().data)
        for at in range(lane * piece, size, 4 * piece):
            os.preadv(fd, [view[: min(piece, size - at)]], at)

    try:
        began = time.perf_counter()
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(read, range(4)))
        return size / (time.perf_counter() - began)
    finally:
        os.close(fd)
