# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Loads, how many requests each is given, and `vllm bench serve`, which sends them."""

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.goodput.server import VLLM, Server


@dataclass(frozen=True)
class Closed:
    """So many requests at any time: an answer makes room for the next request."""

    concurrency: int

    @property
    def options(self) -> list[str]:
        return ["--request-rate", "inf", "--max-concurrency", str(self.concurrency)]

    def __str__(self) -> str:
        return f"concurrency {self.concurrency}"

    def requests(self, seconds: float, answer_seconds: float) -> int:
        """As many as take about ``seconds``, where an answer takes ``answer_seconds``.

        All of them together several times, at least once, so that none runs alone at the end.
        """
        return self.concurrency * max(1, int(seconds / answer_seconds))


@dataclass(frozen=True)
class Open:
    """Poisson arrivals, of so many requests a second, that wait for no answer."""

    rate: float

    @property
    def options(self) -> list[str]:
        return ["--request-rate", f"{self.rate:g}"]

    def __str__(self) -> str:
        return f"{self.rate:g} requests/s"

    def requests(self, seconds: float, capacity: float) -> int:
        """As many as arrive in ``seconds``, or as ``capacity`` requests/s answer in that time."""
        return max(1, round(seconds * min(self.rate, capacity)))


@dataclass(frozen=True)
class Client:
    """`vllm bench serve` for one server.

    Args:
        model: as the server names it.
        prompts: texts; a load with more requests than that begins again with the first.
        tokens: of every answer.
        folder: of the prompts that are sent and of the results, both written anew.
    """

    server: Server
    model: Path
    prompts: Sequence[str]
    tokens: int
    folder: Path

    def run(
        self, load: Closed | Open, requests: int, seed: int, targets: Mapping[str, float]
    ) -> dict[str, Any]:
        """One run's result, with each request's times and text.

        Args:
            seed: of the arrivals. The prompts are always the same.
            targets: milliseconds of "ttft" and of "tpot" within which an answer counts as good.

        Raises:
            ClientError: there is no result.
        """
        texts = (self.prompts[number % len(self.prompts)] for number in range(requests))
        self._sent.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
        self._result.unlink(missing_ok=True)
        # Whatever proxy there is, the server is here.
        variables = {**os.environ, "HF_HUB_OFFLINE": "1", "no_proxy": "127.0.0.1"}
        log = self.folder / "client.log"
        with log.open("wb") as output:
            status = subprocess.run(
                self.command(load, requests, seed, targets),
                env=variables,
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
            ).returncode
        if status != 0 or not self._result.exists():
            raise ClientError(f"vllm bench serve ended with status {status}: see {log}")
        measured: dict[str, Any] = json.loads(self._result.read_text())
        return measured

    def command(
        self, load: Closed | Open, requests: int, seed: int, targets: Mapping[str, float]
    ) -> list[str]:
        """Of `run`."""
        command = [
            *(VLLM, "bench", "serve", "--model", str(self.model), "--temperature", "0"),
            *("--base-url", f"http://127.0.0.1:{self.server.port}", "--seed", str(seed)),
            *("--dataset-name", "custom", "--dataset-path", str(self._sent), "--disable-shuffle"),
            *("--skip-chat-template", "--output-len", str(self.tokens), "--ignore-eos"),
            *("--num-prompts", str(requests), *load.options, "--disable-tqdm"),
            *("--percentile-metrics", "ttft,tpot,e2el"),
            *("--save-result", "--save-detailed", "--result-dir", str(self.folder)),
            *("--result-filename", self._result.name),
        ]
        if targets:
            command += ["--goodput", *(f"{name}:{limit:g}" for name, limit in targets.items())]
        return command

    @property
    def _sent(self) -> Path:
        return self.folder / "prompts.jsonl"

    @property
    def _result(self) -> Path:
        return self.folder / "result.json"


class ClientError(RuntimeError):
    """`vllm bench serve` failed."""
