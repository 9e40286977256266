# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""The peer's side: prompts come in on stdin, answers leave on stdout, one JSON object per line.

Standard library only, because every peer's environment imports it.

    <- {"ready": true, "load_seconds": 4.1, "packages": {"torch": "2.13.0"}, "peak_rss_bytes": ...}
    -> {"prompt": [5, 17], "tokens": 64, "seconds": 30}
    <- {"tokens": [3, ...], "steps": [1, ...], "first_token_seconds": 2.0, "decode_seconds": ...}

``seconds`` bounds the decoding, for a way that needs seconds per token: it answers with the first
tokens of what it would have said. A peer that cannot work here says why in one sentence on stderr
and ends with status 2.
"""

import argparse
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Emit = Callable[[list[int]], bool]
"""Takes the next tokens of the answer; false if the peer shall stop here."""
Answer = Callable[[list[int], int, Emit], None]
"""Prompt, number of tokens, and where they go."""


class CannotRunError(Exception):
    """This way does not work on this machine or with this model: one sentence."""


class Clock:
    """Times the tokens of one answer from its start to the last one that counts."""

    def __init__(self, tokens: int, seconds: float) -> None:
        self._wanted, self._seconds = tokens, seconds
        self._began = self._last = time.perf_counter()
        self._first: float | None = None
        self.tokens: list[int] = []
        self.steps: list[int] = []

    def emit(self, tokens: list[int]) -> bool:
        self._last = time.perf_counter()
        if self._first is None:
            self._first = self._last
        self.tokens += tokens
        self.steps.append(len(tokens))
        return len(self.tokens) < self._wanted and self._last - self._first < self._seconds

    def result(self) -> dict[str, Any]:
        first = self._began if self._first is None else self._first
        return {
            "tokens": self.tokens,
            "steps": self.steps,
            "first_token_seconds": first - self._began,
            "decode_seconds": self._last - first,
            "peak_rss_bytes": peak_rss(),
        }


def parser(adapter: str) -> argparse.ArgumentParser:
    """What every adapter is told on its command line."""
    options = argparse.ArgumentParser(prog=f"benchmarks.peers.{adapter}")
    options.add_argument("--model", type=Path, required=True, help="folder of the checkpoint")
    options.add_argument("--folder", type=Path, required=True, help="for its own form of weights")
    options.add_argument("--limit", type=int, required=True, help="bytes that it may use in all")
    return options


def serve(load: Callable[[], Answer], packages: Iterable[str]) -> int:
    """Load, then answer until stdin ends; returns the exit status.

    Args:
        packages: distributions whose versions belong to the result.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # What a library prints is no answer.
    began = time.perf_counter()
    try:
        answer = load()
    except CannotRunError as reason:
        print(reason, file=sys.stderr)
        return 2
    ready = {
        "ready": True,
        "load_seconds": time.perf_counter() - began,
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "peak_rss_bytes": peak_rss(),
    }
    print(json.dumps(ready), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        clock = Clock(request["tokens"], request["seconds"])
        answer(request["prompt"], request["tokens"], clock.emit)
        print(json.dumps(clock.result()), file=answers)
    return 0


def peak_rss() -> int:
    """Bytes this program has had in memory at once.

    Not getrusage's figure: that one begins with what the driver had when it started this process.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no line VmHWM")
