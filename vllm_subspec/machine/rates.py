# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""How fast this CPU reads memory and multiplies, with the threads that torch has here.

Each figure is the best of several tries: whatever else runs only ever makes it lower.
"""

import time
from collections.abc import Callable
from pathlib import Path

import torch

_TRIES = 6
_LEAST_BYTES = 128 << 20  # of memory to read
_SQUARE = 1536  # rows and columns of the matrices to multiply


def cpu_name(cpuinfo: str | None = None) -> str:
    """The CPU's model, as /proc/cpuinfo (or the text given) names it; "" where it does not."""
    text = Path("/proc/cpuinfo").read_text() if cpuinfo is None else cpuinfo
    lines = (line.partition(":") for line in text.splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() == "model name"), "")


def largest_cache() -> int:
    """Bytes of the CPU's largest cache; 0 where the kernel does not tell it."""
    folder = Path("/sys/devices/system/cpu/cpu0/cache")
    sizes = [path.read_text().strip() for path in folder.glob("index*/size")]
    return max((int(size.removesuffix("K")) << 10 for size in sizes), default=0)


def fastest(call: Callable[[], object], tries: int = _TRIES) -> float:
    """Seconds of the fastest of some calls; one more comes before them."""
    call()
    best = float("inf")
    for _ in range(tries):
        began = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - began)
    return best


def read_rate() -> float:
    """Bytes of memory read per second, without writing: the best of torch's own reductions."""
    memory = torch.ones(max(_LEAST_BYTES, 4 * largest_cache()) // 8, dtype=torch.int64)
    wide = memory.view(torch.float64)
    return memory.nbytes / min(fastest(memory.sum), fastest(memory.amax), fastest(wide.sum))


def float32_rate() -> float:
    """Operations per second of a large float32 matrix product; two for each multiplication."""
    square = torch.ones(_SQUARE, _SQUARE)
    return float(2 * _SQUARE**3 / fastest(lambda: square @ square))
