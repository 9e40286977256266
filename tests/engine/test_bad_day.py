# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""A real server on a bad disk, with a jumping clock, and killed at the worst moments.

The faults are made between the process and the kernel, by `data/faults.c`. A test that ends a
server leaves its folder to the next one, as on a machine where a service manager restarts it.
"""

import mmap
import os
import re
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.engine.helpers import Engines, encode, greedy
from tests.engine.serving import START_SECONDS, TOKENS, Server, launched

TEXTS = ["def parse(text):\n    ", "class Stack:\n    def __init__(self):\n        "]
SECRET = "sk-this-is-nobodys-business"
PATIENCE = 10
"""Seconds after which the second server gives up a read."""
BLOCKS_WRITTEN = 3
"""Of the weight store's layers, when the very first server is killed."""

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler is installed")


class Faults:
    """What the servers of these tests suffer from; they are told through a mapped file."""

    _FIELDS = ("reads", "delay", "ahead", "calls")
    READS = ("none", "fail", "short", "die")

    def __init__(self, folder: Path) -> None:
        library = folder / "faults.so"
        source = Path(__file__).parent / "data" / "faults.c"
        command = ["cc", "-O1", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"]
        subprocess.run(command, check=True)
        told = folder / "faults"
        told.write_bytes(bytes(8 * len(self._FIELDS)))
        with told.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 0)
        preload = " ".join(filter(None, [os.environ.get("LD_PRELOAD"), str(library)]))
        self.environment = {
            "LD_PRELOAD": preload,
            "FAULTS": str(told),
            "VLLM_API_KEY": SECRET,
            "HF_TOKEN": SECRET,
        }

    def set(self, **values: int) -> None:
        for name, value in values.items():
            struct.pack_into("q", self._memory, 8 * self._FIELDS.index(name), value)

    def reads(self, kind: str) -> None:
        self.set(reads=self.READS.index(kind))

    @property
    def calls(self) -> int:
        """Reads and writes of weight stores so far."""
        return int(struct.unpack_from("q", self._memory, 8 * self._FIELDS.index("calls"))[0])

    def clear(self) -> None:
        self.set(reads=0, delay=0, ahead=0)


@pytest.fixture(scope="module")
def expected(engines: Engines) -> dict[str, str]:
    """What the engine without speculation says, by prompt."""
    params = [greedy(TOKENS)] * len(TEXTS)
    answers = engines.reference([encode(text) for text in TEXTS], params)
    engines.close()
    return {text: answer.text for text, answer in zip(TEXTS, answers, strict=True)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bad-day")


@pytest.fixture(scope="module")
def machine(folder: Path) -> Faults:
    return Faults(folder)


@pytest.fixture
def faults(machine: Faults) -> Iterator[Faults]:
    machine.clear()
    yield machine
    machine.clear()


@pytest.fixture(scope="module")
def unfinished(folder: Path, machine: Faults, expected: dict[str, str]) -> Path:
    """The weight store that a killed server was writing."""
    machine.set(delay=1_000_000)  # a write takes a second: it is killed before the next one
    with launched(folder, environment=machine.environment) as server:
        deadline = time.monotonic() + START_SECONDS
        while machine.calls <= BLOCKS_WRITTEN:
            assert server.process.poll() is None and time.monotonic() < deadline, server.said()
            time.sleep(0.02)
        os.killpg(server.process.pid, signal.SIGKILL)
        server.wait_until_gone()
        assert "Writing the weight store" in server.said()
    machine.clear()
    (partial,) = (path for path in server.store.iterdir() if path.suffix != ".lock")
    return partial


@pytest.fixture(scope="module")
def first(folder: Path, machine: Faults, unfinished: Path) -> Iterator[Server]:
    with launched(folder, environment=machine.environment) as server:
        server.wait_until_ready()
        yield server


@pytest.fixture(scope="module")
def second(folder: Path, machine: Faults, first: Server) -> Iterator[Server]:
    """The restarted one, of a server that was killed."""
    if first.process.poll() is None:
        os.killpg(first.process.pid, signal.SIGKILL)
    impatient = {"VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": str(2 * PATIENCE)}
    with launched(folder, environment=machine.environment | impatient) as server:
        server.wait_until_ready()
        yield server


def answers(server: Server) -> dict[str, str]:
    return {text: complete(server, text) for text in TEXTS}


def complete(server: Server, text: str, tokens: int = TOKENS) -> str:
    return "".join(stream(server, text, tokens))


def stream(server: Server, text: str, tokens: int) -> Iterator[str]:
    for chunk in server.stream(text, tokens, SECRET):
        yield chunk.choices[0].text


def test_a_server_killed_while_it_writes_leaves_no_store(unfinished: Path) -> None:
    """Half of the layers lie in the file, but not under the name of a store."""
    assert unfinished.suffix == ".partial"
    assert any(unfinished.read_bytes())


def test_the_start_after_it_writes_the_store_anew(
    first: Server, unfinished: Path, expected: dict[str, str]
) -> None:
    assert answers(first) == expected
    assert "Writing the weight store" in first.said()
    assert f"Removing {unfinished}, left by a writer that was killed" in first.said()
    assert sorted(path.suffix for path in first.store.iterdir()) == [".lock", ".store"]


@pytest.mark.parametrize("seconds", [3600, -3600])
def test_the_clock_jumps(
    first: Server, faults: Faults, expected: dict[str, str], seconds: int
) -> None:
    text = TEXTS[0]
    chunks = stream(first, text, TOKENS)
    begun = next(chunks)
    faults.set(ahead=seconds)
    assert begun + "".join(chunks) == expected[text]
    assert answers(first) == expected


def test_a_slow_disk(first: Server, faults: Faults, expected: dict[str, str]) -> None:
    """Each read takes ten times as long as a block at the usual speed, and more."""
    before = time.monotonic()
    assert answers(first) == expected
    usual = time.monotonic() - before
    faults.set(delay=30_000)
    calls, before = faults.calls, time.monotonic()
    assert answers(first) == expected
    assert time.monotonic() - before > usual
    assert faults.calls - calls > 50


def test_short_reads(first: Server, faults: Faults, expected: dict[str, str]) -> None:
    faults.reads("short")
    assert answers(first) == expected


def test_read_errors(first: Server, faults: Faults, expected: dict[str, str]) -> None:
    faults.reads("fail")
    for _ in range(2):
        with pytest.raises(openai.APIError):
            complete(first, TEXTS[0])
    faults.clear()
    with pytest.raises(openai.APIError):
        complete(first, TEXTS[0])  # what was loaded ahead for it could not be read
    assert answers(first) == expected
    assert re.search(r"request\(s\) failed: reading .* failed: Input/output error", first.said())


def test_the_store_is_deleted_while_it_is_read(first: Server, expected: dict[str, str]) -> None:
    """An open file stays what it is. (It is put back for the next start.)"""
    (path,) = first.store.glob("*.store")
    away = first.store.parent / "away.store"
    os.link(path, away)
    path.unlink()
    try:
        assert answers(first) == expected
    finally:
        os.rename(away, path)


def test_a_killed_engine_ends_its_server(first: Server, faults: Faults) -> None:
    chunks = stream(first, TEXTS[0], 400)
    next(chunks)
    faults.set(delay=30_000)
    first.engine().kill()
    with pytest.raises(openai.APIError):
        list(chunks)
    first.wait_until_gone()  # with status 0, which is vLLM's choice


def test_a_restart_uses_the_store_again(second: Server, expected: dict[str, str]) -> None:
    assert answers(second) == expected
    log = second.said()
    assert "Streaming from the weight store" in log and "Writing the weight store" not in log


def test_a_dead_reader_ends_its_server(second: Server, faults: Faults) -> None:
    """Its requests, too, get an error and not silence."""
    faults.reads("die")
    with pytest.raises(openai.APIError):
        complete(second, TEXTS[0], 400)
    second.wait_until_gone()
    assert f"a streamed weight has not arrived in {PATIENCE} s" in second.said()


def test_no_log_holds_a_secret(first: Server, second: Server) -> None:
    for server in (first, second):
        assert "Memory plan" in server.said() and SECRET not in server.said()
