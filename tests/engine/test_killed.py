# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""A server of two tensor-parallel ranks that loses one of its processes to `kill -9`.

Each time the rest of it ends by itself and leaves its weight stores as they were; the server that
is started next, as by a service manager, takes them. What becomes of a killed engine core, and of a
server that is killed while it writes its store, is in `test_bad_day`.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.engine.serving import CLIENT_SECONDS, Server, launched

TEXTS = ["def parse(text):\n    ", "class Stack:\n    def __init__(self):\n        "]
RANKS = ["--tensor-parallel-size", "2", "--distributed-executor-backend", "mp"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("killed")


@pytest.fixture(scope="module")
def first(folder: Path) -> Iterator[Server]:
    yield from started(folder)


@pytest.fixture(scope="module")
def expected(first: Server) -> list[str]:
    return answers(first)


@pytest.fixture(scope="module")
def second(folder: Path, expected: list[str]) -> Iterator[Server]:
    yield from started(folder)


def started(folder: Path) -> Iterator[Server]:
    cores = sorted(os.sched_getaffinity(0))
    variables = {"VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}", "OMP_NUM_THREADS": "1"}
    with launched(folder, RANKS, variables) as server:
        server.wait_until_ready()
        yield server


def answers(server: Server) -> list[str]:
    return [server.complete(text) for text in TEXTS]


def kill_in_mid_generation(server: Server, victim: psutil.Process) -> None:
    """The client that waits is told at once."""
    chunks = server.stream(TEXTS[0], 400)
    next(iter(chunks))
    victim.kill()
    began = time.monotonic()
    with pytest.raises(Exception):  # noqa: B017 - openai's, or of the library that it asks by
        list(chunks)
    assert time.monotonic() - began < CLIENT_SECONDS / 2


def stores(server: Server) -> dict[str, tuple[int, int, bytes]]:
    """All that lies in the folder, and whether it is the same files."""
    return {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes())
        for path in server.store.iterdir()
    }


def test_a_killed_worker_ends_its_server(first: Server, expected: list[str]) -> None:
    """The other rank may wait for it in the middle of a sum."""
    before = stores(first)
    _, last = first.workers()
    kill_in_mid_generation(first, last)
    first.wait_until_gone()
    assert stores(first) == before


def test_a_restart_uses_the_stores_again(second: Server, expected: list[str]) -> None:
    assert answers(second) == expected
    log = second.said()
    assert "Streaming from the weight store" in log and "Writing the weight store" not in log
    left = sorted(path.suffix for path in second.store.iterdir())
    assert left == [".lock", ".lock", ".store", ".store"]  # a store for each rank


def test_a_killed_front_end_ends_its_engine(second: Server) -> None:
    """Nobody can ask the engine for anything any more. Another restart would find what this one
    has found."""
    before = stores(second)
    assert len(second.workers()) == 2
    kill_in_mid_generation(second, psutil.Process(second.process.pid))
    second.wait_until_gone()
    assert "The front end has ended without a word" in second.said()
    assert stores(second) == before
