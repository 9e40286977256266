# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""The driver's side of a peer: its process, the lines between them, and why it could not run."""

import contextlib
import json
import os
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.memory import MemoryGroup
from benchmarks.peers.serving import CannotRunError

LOAD_SECONDS = 300
"""Loading includes writing a peer's own form of the weights, once."""
ANSWER_SECONDS = 240


class PeerProcess:
    """A started peer, stopped (SIGSTOP) whenever it has nothing to answer, so that its threads take
    no core from another's turn.

    Args:
        command: of its adapter, from the interpreter on.
        limit: bytes that it may use, page cache included.
        log: takes its stderr.

    Raises:
        CannotRunError: it ended, or was not ready in time; says how and where.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        limit: int,
        environment: Mapping[str, str],
        folder: Path,
        log: Path,
    ) -> None:
        self.limit, self._log = limit, log
        self.group = MemoryGroup(name, limit)
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                self.group.command(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=folder,
                env=dict(environment),
                # Ctrl-C reaches the driver alone, which then ends its peers.
                start_new_session=True,
            )
        try:
            self.ready = self._read("loading", LOAD_SECONDS)
        except BaseException:
            self.close()
            raise
        self._signal(signal.SIGSTOP)

    def ask(self, prompt: list[int], tokens: int, seconds: float) -> dict[str, Any]:
        """One answer; see `serving` for what is in it.

        Raises:
            CannotRunError: the peer ended instead.
        """
        assert self._process.stdin is not None
        request = {"prompt": prompt, "tokens": tokens, "seconds": seconds}
        self._signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):  # It has ended: `_read` says why.
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        answer = self._read("answering", ANSWER_SECONDS)
        self._signal(signal.SIGSTOP)
        return answer

    def close(self) -> None:
        """End it and all that it started."""
        self._process.kill()
        self._process.wait()
        self.group.close()

    def _signal(self, number: signal.Signals) -> None:
        os.killpg(self._process.pid, number)

    def _read(self, doing: str, seconds: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        late = threading.Timer(seconds, self._process.kill)
        late.start()
        try:
            line = self._process.stdout.readline()
            waiting = late.is_alive()
        finally:
            late.cancel()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        status = self._process.wait()
        raise CannotRunError(self._why(doing, status, None if waiting else seconds))

    def _why(self, doing: str, status: int, seconds: float | None) -> str:
        if self.group.kills:
            return f"killed at the memory limit of {self.limit / 2**30:.2f} GiB while {doing}"
        if seconds is not None:
            return f"{doing} took over {seconds:.0f} s: ended"
        lines = [line for line in self._log.read_text().splitlines() if line.strip()]
        last = lines[-1].strip() if lines else "it wrote nothing"
        return last if status == 2 else f"ended with status {status} while {doing}: {last}"
