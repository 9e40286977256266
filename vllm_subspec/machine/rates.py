# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""What this CPU is, and how fast it multiplies."""

import time
from collections.abc import Callable
from pathlib import Path

import torch

_TRIES = 6
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


def float32_rate() -> float:
    """Operations per second of a large float32 matrix product with torch's threads; two for each
    multiplication. The best of several tries: whatever else runs only ever makes it lower."""
    square = torch.ones(_SQUARE, _SQUARE)
    return float(2 * _SQUARE**3 / fastest(lambda: square @ square))
