# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""`vllm serve` as a user starts it, in processes of its own."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from openai.types import Completion

from tests.engine.helpers import DEFAULTS, MODEL, ROUGH, Settings

START_SECONDS = 240
STOP_SECONDS = 60
CLIENT_SECONDS = 120
TEMPLATE = Path(__file__).parent / "data" / "chat.jinja"
TOKENS = 48
SERVED = {
    name: DEFAULTS[name]
    for name in ("max_model_len", "block_size", "kv_cache_memory_bytes", "max_num_seqs")
}


@dataclass
class Server:
    process: subprocess.Popen[bytes]
    port: int
    log: Path
    store: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, api_key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=api_key, timeout=CLIENT_SECONDS, max_retries=0
        )

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"{self.url}{path}", timeout=60) as reply:
            return str(reply.read().decode())

    def post(self, path: str, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(
            f"{self.url}{path}", json.dumps(body).encode(), headers, method="POST"
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.loads(reply.read())

    def counter(self, name: str) -> float:
        named = re.compile(re.escape(name) + r"[{ ]")
        lines = [line for line in self.get("/metrics").splitlines() if named.match(line)]
        assert lines, f"no {name} in /metrics"
        return sum(float(line.split()[-1]) for line in lines)

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            try:
                self.get("/health")
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        tail = self.log.read_text(errors="replace")[-4000:]
        pytest.fail(f"the server did not start (exit status {self.process.poll()}):\n{tail}")

    def processes(self) -> list[psutil.Process]:
        """All that live. (Who is orphaned and ends stays a zombie where nobody asks for it.)"""
        living = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                ours = os.getpgid(process.pid) == self.process.pid
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    living.append(process)
        return living

    def engine(self) -> psutil.Process:
        """Its engine core."""
        (only,) = _started_by(psutil.Process(self.process.pid))
        return only

    def workers(self) -> list[psutil.Process]:
        """The ranks that are processes of their own."""
        return _started_by(self.engine())

    def wait_until_gone(self, seconds: float = STOP_SECONDS) -> int:
        """The exit status, once every process of the server has ended and its port is free."""
        status = self.process.wait(seconds)
        deadline = time.monotonic() + STOP_SECONDS
        while left := self.processes():  # its engine too
            assert time.monotonic() < deadline, f"processes of the server are left: {left}"
            time.sleep(0.2)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", self.port))
        return status

    def said(self) -> str:
        """Its log."""
        return self.log.read_text(errors="replace")

    def complete(self, text: str, **settings: object) -> str:
        reply = self.client().completions.create(
            model="pystd", prompt=text, max_tokens=TOKENS, temperature=0, **settings
        )
        return str(reply.choices[0].text)

    def stream(self, text: str, tokens: int, api_key: str = "none") -> openai.Stream[Completion]:
        """A greedy answer of exactly so many tokens, in pieces."""
        return self.client(api_key).completions.create(
            model="pystd",
            prompt=text,
            max_tokens=tokens,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )


def _started_by(process: psutil.Process) -> list[psutil.Process]:
    children: list[psutil.Process] = process.children()
    return [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def launched(
    folder: Path,
    arguments: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    model: Path = MODEL,
    options: Settings = ROUGH,
    settings: Settings = SERVED,
) -> Iterator[Server]:
    """A server that has just been started, and is ended at the end if it lives.

    Args:
        folder: of its log and its weight store, which a later server of the same folder finds.
        arguments: more options.
        environment: more variables.
        options: the ``speculative_config``, but for the ``store_dir``.
        settings: of the engine, by their names in Python.
    """
    port = free_port()
    variables = {**os.environ, **(environment or {})}
    # The front end and the engine are two processes, as they are for users.
    del variables["VLLM_ENABLE_V1_MULTIPROCESSING"]
    variables.pop("VLLM_LOGGING_LEVEL")
    command = [str(Path(sys.executable).parent / "vllm"), "serve", str(model)]
    command += ["--speculative-config", json.dumps({**options, "store_dir": str(folder / "store")})]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "pystd"]
    command += ["--dtype", "float32", "--enforce-eager", "--chat-template", str(TEMPLATE)]
    for name, value in settings.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    log = folder / f"log-{port}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, *arguments],
            env=variables,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that its engine can be ended with it
        )
    try:
        yield Server(process, port, log, folder / "store")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
