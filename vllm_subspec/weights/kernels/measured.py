# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""How fast kernels are on this machine: measured at the first start, in seconds, and kept.

Which of two kernels is faster depends on the CPU, its memory and the versions of libraries, so no
rule says it: all that could compute a width or a dtype are timed on weights of the same shape, in
turns, out of cache. One thread computes and its own CPU time counts, which other programs disturb
little, and of each kernel's turns the fastest, since nothing makes one too fast. Figures of another
CPU, level or version are never used: they are measured again, as are those that cannot be read.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from math import inf, prod
from pathlib import Path
from typing import Any, TypeVar

import torch
from vllm import envs
from vllm.logger import init_logger

from vllm_subspec import __version__
from vllm_subspec.machine import isa, rates
from vllm_subspec.weights.host_memory import release_freed
from vllm_subspec.weights.kernels import native

logger = init_logger(__name__)

T = TypeVar("T")

TOKENS = (1, 8, 32, 128)
"""Of a pass, at which kernels are timed."""
SHAPE = (2048, 4096)
"""Rows and columns of the weights that are multiplied."""
_SETTLED = 3  # of a kernel's turns must be about as fast as its fastest
_ABOUT = 1.1
_SECONDS = 1.0  # of CPU time at most, for each kernel and number of tokens
_MOST_BYTES = 192 << 20  # of one kernel's weights

Product = Callable[[torch.Tensor], torch.Tensor]
Make = Callable[[], Product]
"""Packs one more copy of a weight of `SHAPE`."""
Seconds = Mapping[int, float]
"""Of one product on one thread, by tokens."""


@dataclass(frozen=True)
class Candidate:
    make: Make
    nbytes: int
    """Of one packed weight."""


def typical(times: Seconds, tokens: Sequence[int] = TOKENS) -> float:
    """The geometric mean over some numbers of tokens: none of them outweighs the others."""
    return float(prod(times[m] for m in tokens) ** (1 / len(tokens)))


@functools.cache
def machine() -> dict[str, str | int]:
    """What figures belong to."""
    level = isa.level()
    sources = b"".join(file.read_bytes() for file in sorted(native.SOURCES.glob("*")))
    return {
        "cpu": rates.cpu_name(),
        "level": "none" if level is None else level.name,
        "torch": torch.__version__,
        "vllm": metadata.version("vllm"),
        "vllm-subspec": __version__,
        "kernels": hashlib.sha256(sources).hexdigest()[:16],
    }


def seconds(family: str, candidates: Mapping[str, Candidate]) -> dict[str, Seconds]:
    """Seconds of each candidate, by tokens: measured, or kept from an earlier start.

    Args:
        family: what they compute, such as "4 bits, bfloat16": figures are kept by it, and it ends
            with the dtype of activations.
        candidates: by name. One that raises RuntimeError cannot compute this here, and is left out.
    """
    keys = [str(tokens) for tokens in TOKENS]

    def sound(kept: dict[str, Any]) -> bool:
        times = kept.get("seconds")
        return (
            kept.get("candidates") == sorted(candidates)
            and isinstance(times, dict)
            and times.keys() <= candidates.keys()
            and all(list(found) == keys and _are_times(found.values()) for found in times.values())
        )

    def measure() -> dict[str, Any]:
        found = _measure(candidates, _dtype(family))
        times = {name: dict(zip(keys, each, strict=True)) for name, each in found.items()}
        return {"candidates": sorted(candidates), "seconds": times}

    times = _figures(family, measure, sound)["seconds"]
    return {name: dict(zip(TOKENS, found.values(), strict=True)) for name, found in times.items()}


def _are_times(values: Iterable[Any]) -> bool:
    return all(isinstance(value, float) and 0 < value < inf for value in values)


def _dtype(family: str) -> torch.dtype:
    found = getattr(torch, family.rpartition(" ")[2])
    assert isinstance(found, torch.dtype)
    return found


def _measure(candidates: Mapping[str, Candidate], dtype: torch.dtype) -> dict[str, list[float]]:
    """Seconds of each candidate, by `TOKENS`."""
    x = {tokens: torch.randn(tokens, SHAPE[1]).to(dtype) for tokens in TOKENS}
    out_of_cache = min(_MOST_BYTES, 2 * rates.largest_cache())
    copies: dict[str, list[Product]] = {}
    for name, candidate in candidates.items():
        try:
            made = [candidate.make() for _ in range(max(2, -(-out_of_cache // candidate.nbytes)))]
            made[0](x[1])
        except RuntimeError as error:
            logger.debug("%s cannot compute %s here: %s", name, dtype, error)
        else:
            copies[name] = made
    turns = _on_one_thread(
        lambda: [_alternate(list(copies.values()), x[tokens]) for tokens in TOKENS]
    )
    return {name: [turn[i] for turn in turns] for i, name in enumerate(copies)}


def _on_one_thread(call: Callable[[], T]) -> T:
    """What ``call`` returns, called where torch computes with one thread.

    In a Python thread of its own: each has its own OpenMP threads, and those of the caller may be
    bound to cores, which they would lose. For the same reason vLLM's workers take torch's public
    function away.
    """
    threads = torch.get_num_threads()

    def alone() -> T:
        torch._C.set_num_threads(1)
        try:
            return call()
        finally:
            torch._C.set_num_threads(threads)

    with ThreadPoolExecutor(1) as executor:
        return executor.submit(alone).result()


def _alternate(kernels: list[list[Product]], x: torch.Tensor) -> list[float]:
    """Seconds of each kernel's fastest turn; its copies are computed after each other."""
    best = [[inf] * _SETTLED for _ in kernels]
    end, turn = time.thread_time() + _SECONDS * len(kernels), 0
    while any(b[-1] > _ABOUT * b[0] or b[-1] == inf for b in best) and time.thread_time() < end:
        for found, copies in zip(best, kernels, strict=True):
            began = time.thread_time()
            copies[turn % len(copies)](x)
            found[:] = sorted([*found, time.thread_time() - began])[:_SETTLED]
        turn += 1
    return [found[0] for found in best]


def _figures(
    name: str, measure: Callable[[], dict[str, Any]], sound: Callable[[dict[str, Any]], bool]
) -> dict[str, Any]:
    """What is kept under a name; if that is not sound, measured now and kept.

    Of several processes one measures while the others wait, so that they agree and do not disturb
    each other.
    """
    path = _path()
    with _locked(path):
        kept = _read(path)
        found = kept.get(name)
        if isinstance(found, dict) and sound(found):
            return found
        began = time.perf_counter()
        measured = measure()
        release_freed()
        took = time.perf_counter() - began
        logger.info("Measured %s in %.1f s, kept in %s", name, took, path)
        _write(path, {**kept, name: measured})
        return measured


def _path() -> Path:
    digest = hashlib.sha256(json.dumps(machine(), sort_keys=True).encode()).hexdigest()[:16]
    return Path(envs.VLLM_CACHE_ROOT) / "subspec" / "kernels" / f"measured-{digest}.json"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone among all processes. Where the folder cannot be written, nobody can be waited for."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_suffix(".lock").open("w")
    except OSError:
        yield
        return
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _read(path: Path) -> dict[str, Any]:
    """Nothing, if the file is absent, damaged or of another machine."""
    try:
        found = json.loads(path.read_text())
        return dict(found["figures"]) if found["machine"] == machine() else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _write(path: Path, figures: Mapping[str, Any]) -> None:
    """All or nothing; a folder that cannot be written costs the next start the same seconds."""
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        partial.write_text(json.dumps({"machine": machine(), "figures": figures}, indent=1))
        partial.replace(path)
    except OSError as error:
        logger.warning("%s cannot keep what was measured (%s)", path, error.strerror)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
