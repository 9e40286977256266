# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""How fast this CPU's kernels compute with all threads, beside what the machine can do at most.

Few tokens are bound by reading the weights, many by arithmetic: a rate is told as a share of both.
"""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vllm_subspec.machine import rates
from vllm_subspec.weights import plain_linear
from vllm_subspec.weights.kernels import choice, choose, measured

SHAPE = (4096, 4096)
SHOWN = (1, 8, 32)
"""Tokens."""
_SECONDS = 0.15  # for each kernel and number of tokens, unless few turns take longer
_LEAST_TURNS = 5


@dataclass(frozen=True)
class Machine:
    read: float  # bytes/s
    float32: float  # operations/s


@dataclass(frozen=True)
class Rate:
    """Of products of one shape with one kernel."""

    tokens: int
    best: float  # seconds
    median: float  # seconds
    nbytes: int  # of the weight
    operations: int  # two for each multiplication

    def share_of_reading(self, machine: Machine) -> float:
        return self.nbytes / self.best / machine.read

    def share_of_arithmetic(self, machine: Machine) -> float:
        return self.operations / self.best / machine.float32

    def to_json_dict(self, machine: Machine) -> dict[str, Any]:
        return {
            "best_us": round(self.best * 1e6, 1),
            "median_us": round(self.median * 1e6, 1),
            "gb_per_s": round(self.nbytes / self.best / 1e9, 2),
            "share_of_reading": round(self.share_of_reading(machine), 3),
            "share_of_float32_rate": round(self.share_of_arithmetic(machine), 3),
        }


def machine() -> Machine:
    """Measured now."""
    return Machine(rates.read_rate(), rates.float32_rate())


def alternate(
    candidates: Mapping[str, measured.Candidate],
    dtype: torch.dtype,
    shape: tuple[int, int] = SHAPE,
    tokens: tuple[int, ...] = SHOWN,
    seconds: float = _SECONDS,
) -> dict[str, list[Rate]]:
    """Of every candidate that can compute, by tokens; all in turns, on weights out of cache.

    Args:
        shape: of the candidates' weights.
        seconds: of each candidate and number of tokens.
    """
    out_of_cache = max(1, 2 * rates.largest_cache())
    copies: dict[str, list[measured.Product]] = {}
    for name, candidate in candidates.items():
        made = [candidate.make() for _ in range(max(2, -(-out_of_cache // candidate.nbytes)))]
        try:
            made[0](torch.zeros(1, shape[1], dtype=dtype))
        except RuntimeError:  # such a product is not to be had on this CPU
            continue
        copies[name] = made
    found: dict[str, list[Rate]] = {name: [] for name in copies}
    for m in tokens:
        x = torch.randn(m, shape[1]).to(dtype)
        times: dict[str, list[float]] = {name: [] for name in copies}
        end, turn = time.perf_counter() + seconds * len(copies), 0
        while turn < _LEAST_TURNS or time.perf_counter() < end:
            for name, products in copies.items():
                began = time.perf_counter()
                products[turn % len(products)](x)
                times[name].append(time.perf_counter() - began)
            turn += 1
        for name, taken in times.items():
            operations = 2 * m * shape[0] * shape[1]
            nbytes = candidates[name].nbytes
            median = statistics.median(taken)
            found[name].append(Rate(m, min(taken), median, nbytes, operations))
    return found


def chosen(dtype: torch.dtype = torch.bfloat16) -> dict[str, list[Rate]]:
    """Of the kernels that an engine would take here, by what they compute."""
    found: dict[str, list[Rate]] = {}
    for bits in (4, 8):
        kernel, _ = choose(bits, None, torch.device("cpu"), dtype)
        candidate = choice.candidates(bits, dtype, SHAPE)[kernel.name]
        what = f"{bits} bits ({kernel.name})"
        found[what] = alternate({what: candidate}, dtype)[what]
    by_tokens = alternate(plain_linear.candidates(dtype, SHAPE), dtype)
    steps = plain_linear.choice(dtype)
    what = f"full precision ({', '.join(dict.fromkeys(name for _, name in steps))})"
    found[what] = [
        by_tokens[next(n for t, n in reversed(steps) if t <= m)][i] for i, m in enumerate(SHOWN)
    ]
    return found
