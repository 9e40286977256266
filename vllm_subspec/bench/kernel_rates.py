# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""How fast this CPU's kernels compute with all threads, beside what the machine can do at most.

Few tokens are bound by reading the weights, many by arithmetic: a rate is told as a share of both.
What memory gives changes from second to second on a machine that others use as well, so memory is
read in turns with the kernels, and the median of one is told as a share of that of the other.
"""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from vllm_subspec.machine import rates
from vllm_subspec.weights import plain_linear
from vllm_subspec.weights.kernels import choice, choose, measured

SHAPE = (4096, 4096)
SHOWN = (1, 8, 32)
"""Tokens."""
_SECONDS = 0.15  # for each kernel and number of tokens, unless few turns take longer
_LEAST_TURNS = 5
_READ_BYTES = 128 << 20  # of memory, at least and in a turn


@dataclass(frozen=True)
class Rate:
    """How fast products of one shape are with one kernel."""

    tokens: int
    best: float  # seconds
    median: float  # seconds
    nbytes: int  # of the weight
    operations: int  # two for each multiplication
    memory: float  # bytes/s that were read meanwhile, in turns with the products; a median

    @property
    def share_of_reading(self) -> float:
        return self.nbytes / self.median / self.memory

    def share_of_arithmetic(self, float32: float) -> float:
        """Share of the operations/s of a float32 product."""
        return self.operations / self.best / float32

    def to_json_dict(self, float32: float) -> dict[str, float]:
        return {
            "best_us": round(self.best * 1e6, 1),
            "median_us": round(self.median * 1e6, 1),
            "gb_per_s": round(self.nbytes / self.median / 1e9, 2),
            "memory_gb_per_s": round(self.memory / 1e9, 2),
            "share_of_reading": round(self.share_of_reading, 3),
            "share_of_float32_rate": round(self.share_of_arithmetic(float32), 3),
        }


def alternate(
    candidates: Mapping[str, measured.Candidate],
    dtype: torch.dtype,
    shape: tuple[int, int] = SHAPE,
    tokens: tuple[int, ...] = SHOWN,
    seconds: float = _SECONDS,
) -> dict[str, list[Rate]]:
    """Rates of every candidate that can compute, by tokens; all take turns, out of cache.

    Args:
        shape: of the candidates' weights.
        seconds: of each candidate and number of tokens.
    """
    cache = rates.largest_cache()
    copies: dict[str, list[measured.Product]] = {}
    for name, candidate in candidates.items():
        made = [candidate.make() for _ in range(max(2, -(-2 * cache // candidate.nbytes)))]
        try:
            made[0](torch.zeros(1, shape[1], dtype=dtype))
        except RuntimeError:  # such a product is not to be had on this CPU
            continue
        copies[name] = made
    memory = torch.ones(max(_READ_BYTES, 4 * cache) // 8, dtype=torch.int64)
    readers = (memory.sum, memory.view(torch.float64).sum)
    found: dict[str, list[Rate]] = {name: [] for name in copies}
    for m in tokens:
        x = torch.randn(m, shape[1]).to(dtype)
        times: dict[str, list[float]] = {name: [] for name in copies}
        reads: list[float] = []
        end, turn = time.perf_counter() + seconds * len(copies), 0
        while turn < _LEAST_TURNS or time.perf_counter() < end:
            for name, products in copies.items():
                began = time.perf_counter()
                products[turn % len(products)](x)
                times[name].append(time.perf_counter() - began)
            began = time.perf_counter()
            readers[turn % len(readers)]()
            reads.append(time.perf_counter() - began)
            turn += 1
        for name, taken in times.items():
            rate = Rate(
                m,
                min(taken),
                statistics.median(taken),
                candidates[name].nbytes,
                2 * m * shape[0] * shape[1],
                memory.nbytes / statistics.median(reads),
            )
            found[name].append(rate)
    return found


def chosen(dtype: torch.dtype = torch.bfloat16) -> dict[str, list[Rate]]:
    """Rates of the kernels that an engine would take here, by what they compute."""
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


def describe() -> dict[str, dict[str, dict[str, float]]]:
    """`chosen`, as a result holds it: by what is computed and by tokens."""
    with torch.inference_mode():
        float32 = rates.float32_rate()
        return {
            what: {str(rate.tokens): rate.to_json_dict(float32) for rate in several}
            for what, several in chosen().items()
        }
