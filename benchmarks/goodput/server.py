# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""`vllm serve` in processes of its own, whose speculation is switched while it serves."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from scripts.cpu_env import cpu_environment, find_tcmalloc

VLLM = str(Path(sys.executable).parent / "vllm")
START_SECONDS = 900
STOP_SECONDS = 30


class ServerError(RuntimeError):
    """The server did not start, or did not do what it was asked."""


class Server:
    """A server that has been started.

    Args:
        command: `vllm serve` and its arguments, without host and port.
        log: file of what it prints.
    """

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.port = _free_port()
        self.log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [*command, "--host", "127.0.0.1", "--port", str(self.port)],
                env=_variables(),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that its engine can be ended with it
            )

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while self._process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError):  # refused: it does not listen yet
                self._ask("/health")
                return
            time.sleep(0.5)
        status = self._process.poll()
        raise ServerError(f"the server did not start (exit status {status}): see {self.log}")

    def set_speculation(self, enabled: bool) -> None:
        """Of all later rounds. vLLM offers this call in its development mode only."""
        self._ask("/collective_rpc", {"method": "set_speculation", "args": [enabled]})

    def close(self) -> None:
        """Ends all its processes."""
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(self._process.pid, signal.SIGTERM)
            self._process.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _ask(self, path: str, body: object = None) -> None:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data)
        with urllib.request.urlopen(request, timeout=60):
            pass


@contextlib.contextmanager
def serving(command: Sequence[str], log: Path) -> Iterator[Server]:
    """A `Server` that answers; it is ended at the end."""
    server = Server(command, log)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.close()


def _variables() -> dict[str, str]:
    """This process's, and those with which vLLM's CPU backend is fastest."""
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_SERVER_DEV_MODE": "1"}
    openmp = Path(sys.prefix) / "lib" / "libiomp5.so"
    if openmp.exists():
        cores = sorted(os.sched_getaffinity(0))
        variables |= cpu_environment(openmp, find_tcmalloc(), cores, 1, variables)
    return variables


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
