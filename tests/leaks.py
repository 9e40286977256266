# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""What a process that serves for long must not gather: memory, open files, threads."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import psutil

MB_PER_MINUTE = 1.0
"""Growth of the resident memory that is no leak: allocators and caches settle slowly."""
LEAST_MB = 16.0
"""Growth that says nothing, however short the time."""
LEAST_MINUTES = 2.0
"""In a shorter time memory and threads are still being taken for the first time."""


class Sample(NamedTuple):
    minutes: float
    resident_mb: list[float]
    """Of each process."""
    files: int
    threads: int


@dataclass
class Leaks:
    """Samples of processes, all of them together.

    Args:
        warm_up: share of the samples that are not looked at, as everything is used for the first
            time meanwhile.
    """

    processes: Sequence[psutil.Process] = field(default_factory=lambda: [psutil.Process()])
    warm_up: float = 0.4
    samples: list[Sample] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._begin = time.monotonic()
        self._names = [process.name() for process in self.processes]

    def sample(self) -> None:
        minutes = (time.monotonic() - self._begin) / 60
        resident = [process.memory_info().rss / 1e6 for process in self.processes]
        files = sum(process.num_fds() for process in self.processes)
        threads = sum(process.num_threads() for process in self.processes)
        self.samples.append(Sample(minutes, resident, files, threads))

    def __str__(self) -> str:
        if len(self.warm) < 2:
            return "too short a time to see what grows"
        each = ", ".join(
            f"{name} {slope:+.2f}" for name, slope in zip(self._names, self._slopes(), strict=True)
        )
        return (
            f"{self.mb_per_minute:+.2f} MB/min over the last {self.minutes:.1f} minutes ({each}), "
            f"{self.samples[-1].files} files, {self.samples[-1].threads} threads"
        )

    @property
    def warm(self) -> list[Sample]:
        return self.samples[int(self.warm_up * len(self.samples)) :]

    @property
    def minutes(self) -> float:
        """Of the samples that count."""
        return self.warm[-1].minutes - self.warm[0].minutes

    @property
    def mb_per_minute(self) -> float:
        """Slope of the resident memory of all processes."""
        return sum(self._slopes())

    def _slopes(self) -> list[float]:
        """[processes] MB a minute, by least squares."""
        times = [sample.minutes for sample in self.warm]
        sizes = [sample.resident_mb for sample in self.warm]
        slopes: list[float] = np.polyfit(times, sizes, 1)[0].tolist()
        return slopes

    def found(self) -> list[str]:
        """What grew, a sentence each."""
        sentences: list[str] = []
        if len(self.warm) < 2:
            return sentences
        begin, end = self.warm[0], self.warm[-1]
        if end.files > begin.files:
            sentences.append(f"{end.files} open files, {begin.files} after the warm-up")
        if self.minutes < LEAST_MINUTES:
            return sentences
        if end.threads > begin.threads:
            sentences.append(f"{end.threads} threads, {begin.threads} after the warm-up")
        if self.mb_per_minute * self.minutes > max(MB_PER_MINUTE * self.minutes, LEAST_MB):
            sentences.append(
                f"the resident memory grew by {self.mb_per_minute:.2f} MB/min over "
                f"{self.minutes:.1f} minutes"
            )
        return sentences
