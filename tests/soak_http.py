# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""The random requests of `tests.soak`, sent to `vllm serve` by many clients at once.

    python -m tests.soak --http [--requests 10000] [--minutes 12] [--seed 0]

A client for each request of a wave, so four times as many as the engine runs at once. Half of the
answers are streamed, and some of these clients go away in mid-stream. The requests begin again at
the first while there is time. Every few waves the server is left alone: then it must have nothing
to do and all its KV pages, and its processes are looked at. It is ended as a service manager does.

Begin with ``eval "$(.venv/bin/python scripts/cpu_env.py)"``, as a server does. Without the
allocator that it names vLLM grows by 1.7 MB a minute, with speculation or not.
"""

import dataclasses
import itertools
import random
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
from tqdm import tqdm

from tests.engine.serving import SERVED, Server, launched
from tests.leaks import Leaks
from tests.soak import ENGINE, MODEL, SUBSPEC, Asked, Got, Pairs, Soak

SETTINGS = {
    name: ENGINE[name] for name in (*SERVED, "max_num_batched_tokens", "num_gpu_blocks_override")
}
FLAGS = ["--seed", str(ENGINE["seed"]), "--generation-config", "vllm"]
# A client finds closed what it was just about to use again, if the server closes idle connections.
VARIABLES = {"VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "3600"}
WAVES = 4
"""Sent until the server is left alone."""
IDLE_SECONDS = 30


def ask(client: openai.OpenAI, asked: Asked, streamed: bool, leaves: int | None) -> Got:
    """What a client gets.

    Args:
        leaves: after so many pieces of a stream the client goes away; None: it stays.
    """
    reply = client.completions.create(
        model="pystd",
        prompt=asked.prompt,
        stream=streamed,
        extra_body={**asked.given, "return_token_ids": True},
    )
    if not streamed:
        (choice,) = reply.choices
        return tuple(choice.token_ids), True
    tokens: list[int] = []
    with reply:
        for number, chunk in enumerate(reply):
            if number == leaves:
                return tuple(tokens), False
            (choice,) = chunk.choices
            tokens += choice.token_ids or []
    return tuple(tokens), True


def kept(server: Server) -> str | None:
    """What an idle server still holds of requests that have ended; None is right."""
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    deadline = time.monotonic() + IDLE_SECONDS
    while True:
        held = {name: server.counter(f"vllm:{name}") for name in names}
        if not any(held.values()):
            return None
        if time.monotonic() > deadline:
            return str(held)
        time.sleep(0.1)


class HttpSoak(Soak):
    """The run, over HTTP; ``repeat`` is always so."""

    def _made(self, tokenizer: Any) -> list[Asked]:
        """Whole answers: a client goes away when it likes."""
        self.repeat = True
        return [dataclasses.replace(a, steps=None) for a in super()._made(tokenizer)]

    def _drafted(self, pairs: Pairs, ends: float, folder: Path) -> str | None:
        with launched(
            folder, FLAGS, VARIABLES, model=MODEL, options=SUBSPEC, settings=SETTINGS
        ) as server:
            server.wait_until_ready()
            self.leaks = Leaks(server.processes())
            wrong = self._served(server, pairs, ends)
            drafts = server.counter("vllm:spec_decode_num_drafts_total")
            accepted = server.counter("vllm:spec_decode_num_accepted_tokens_total")
            self.tau = 1 + accepted / max(1.0, drafts)
            server.process.send_signal(signal.SIGTERM)
            status = server.wait_until_gone()
        return wrong or (f"the server ended with status {status}" if status else None)

    def _served(self, server: Server, pairs: Pairs, ends: float) -> str | None:
        rng = random.Random(self.seed)
        waves = itertools.cycle(pairs)
        for _ in tqdm(itertools.count(), desc="serving", unit="look"):
            if time.monotonic() > ends or self.too_many_apart:
                break
            each = [
                pair for wave in itertools.islice(waves, WAVES) for pair in zip(*wave, strict=True)
            ]
            for request, plain, answer in self._answers(server, each, rng):
                self.compare(request, plain, answer)
            if held := kept(server):
                return f"an idle server keeps {held}"
            self.leaks.sample()
        return None

    def _answers(
        self, server: Server, each: list[tuple[Asked, Got]], rng: random.Random
    ) -> Iterator[tuple[Asked, Got, Got]]:
        with ThreadPoolExecutor(self.wave) as pool, server.client() as client:
            running = []
            for request, plain in each:
                streamed = rng.random() < 0.5
                leaves = rng.randint(0, 4) if streamed and rng.random() < 0.3 else None
                running.append(
                    (request, plain, pool.submit(ask, client, request, streamed, leaves))
                )
            for request, plain, answer in running:
                yield request, plain, answer.result()
