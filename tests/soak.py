# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Random requests, with token trees and without speculation: the tokens are the same.

    python -m tests.soak [--requests 10000] [--minutes 12] [--seed 0] [--repeat] [--http]

Short prompts with common prefixes, greedy and sampled (with seeds: then sampled text is a fixed
function of the prompt too), all the sampling parameters, structured output, stop strings, tiny
batches, few KV blocks (preemption), a token budget that cuts trees, aborts at random moments; from
round to round another branching, depth and pruning. float32. An aborted request must have emitted
a prefix of its answer. Four times as many requests are sent as the engine runs at once. Ends with
status 1 if an answer differs by more than a near tie of float32, which vLLM without speculation
has with itself (`tests.ties`), if pages, memory, files or threads were gathered meanwhile, or if
hardly anything was compared or drafted.

With --http they go to `vllm serve` in processes of its own: see `tests.soak_http`.
"""

import argparse
import gc
import itertools
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # tests that import this have settings of their own
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tqdm import tqdm
from vllm import LLM, SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from tests import ties
from tests.leaks import Leaks
from vllm_subspec.engine import compat

MODEL = Path(__file__).resolve().parents[1] / "models" / "pystd-1m"
ENGINE: dict[str, Any] = {
    "model": str(MODEL),
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "block_size": 32,
    "max_num_seqs": 6,
    "max_num_batched_tokens": 96,
    "kv_cache_memory_bytes": 64 << 20,
    "num_gpu_blocks_override": 24,  # less than a full batch may want
    "seed": 0,
    "use_tqdm_on_load": False,
}
SUBSPEC = {
    "method": "subspec",
    "bits": 2,
    "quantizer": "rtn",
    "resident_weights_gib": 0,
    "drafter": {"method": "ngram", "depth": 6, "branching": 2},
    "branching": 6,
    "depth": 24,
    "num_speculative_tokens": 40,
}
GRAMMARS: list[dict[str, Any]] = [
    {"regex": r"[a-z_]{1,12} = [0-9]{1,6}(\.[0-9]{1,4})?"},
    {"choice": ["return None", "return self", "raise ValueError"]},
    {"json": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}},
]
PIECES = [
    "def ", "import os\n", "class A:\n    ", "self.x = ", "return ", "if a is None:\n", "for i in ",
    "x = [0, 0, 0, ", "    raise ValueError(", "try:\n    ", "with open(path) as f:\n", "# the ",
]  # fmt: skip


@dataclass(frozen=True)
class Asked:
    prompt: list[int]
    given: dict[str, Any]
    """Sampling parameters, by the names they have over HTTP, too."""
    steps: int | None
    """Aborted after so many engine steps; None: never."""

    @property
    def params(self) -> SamplingParams:
        given = dict(self.given)
        if grammar := given.pop("structured_outputs", None):
            given["structured_outputs"] = StructuredOutputsParams(**grammar)
        return SamplingParams(**given)


def requests(count: int, seed: int, tokenizer: Any) -> list[Asked]:
    rng = random.Random(seed)
    made = []
    for number in range(count):
        prompt = tokenizer.encode("".join(rng.choices(PIECES, k=rng.randint(1, 24))))
        aborted = rng.randint(1, 12) if rng.random() < 0.05 else None
        made.append(Asked(prompt[:160], parameters(rng, number, tokenizer), aborted))
    return made


def parameters(rng: random.Random, number: int, tokenizer: Any) -> dict[str, Any]:
    def sometimes(share: float, name: str, value: Any) -> dict[str, Any]:
        return {name: value} if rng.random() < share else {}

    given: dict[str, Any] = {"temperature": 0.0, "max_tokens": rng.randint(1, 28)}
    if rng.random() < 0.6:
        given |= {"temperature": rng.choice([0.2, 0.6, 1.0, 1.5]), "seed": number}
        given |= sometimes(0.3, "top_k", rng.choice([1, 3, 50]))
        given |= sometimes(0.3, "top_p", rng.choice([0.1, 0.7, 0.95]))
    given |= sometimes(0.15, "presence_penalty", rng.uniform(-1, 2))
    given |= sometimes(0.15, "frequency_penalty", rng.uniform(-1, 2))
    given |= sometimes(0.15, "repetition_penalty", rng.uniform(0.8, 1.5))
    given |= sometimes(0.1, "bad_words", [" self", "0, 0", "None"])
    given |= sometimes(0.1, "stop", ["\n\n", "self."])
    given |= sometimes(0.1, "min_tokens", rng.randint(1, given["max_tokens"]))
    given |= sometimes(0.1, "stop_token_ids", tokenizer.encode(" 0:")[-2:])
    given |= sometimes(0.05, "allowed_token_ids", list(range(3, 900)))
    given |= sometimes(0.5, "ignore_eos", True)
    if rng.random() < 0.06:
        given["structured_outputs"] = rng.choice(GRAMMARS)
    return given


Got = tuple[tuple[int, ...], bool]
"""A request's tokens, and whether it ended by itself."""
LEAST_TAU = 1.2
"""Tokens a round. Where fewer are emitted hardly any draft was verified."""
REQUESTS_PER_TIE = 2_000
"""Of answers of a dozen tokens: near ties are no rarer where the same requests are repeated."""
Pairs = list[tuple[list[Asked], list[Got]]]
"""Waves, and what an engine without speculation answers them."""


class Apart(NamedTuple):
    """Two answers that contradict each other."""

    request: Asked
    plain: Got
    drafted: Got
    way: str
    """Of drafting."""


class Engine:
    """An engine that answers requests, some of which are aborted."""

    def __init__(self, speculative: dict[str, Any] | None, **settings: Any) -> None:
        if speculative is None:
            compat.apply()  # or vLLM would fail where ours must not
        self.llm = LLM(**ENGINE, **settings, speculative_config=speculative)

    def answer(self, asked: Sequence[Asked]) -> list[Got]:
        engine = self.llm.llm_engine
        for i, request in enumerate(asked):
            engine.add_request(str(i), {"prompt_token_ids": request.prompt}, request.params)
        answers: list[Got] = [((), False)] * len(asked)
        step = 0
        while engine.has_unfinished_requests():
            for output in engine.step():
                tokens = tuple(output.outputs[0].token_ids)
                answers[int(output.request_id)] = (tokens, output.finished)
            step += 1
            due = [str(i) for i, request in enumerate(asked) if request.steps == step]
            if due:
                engine.abort_request(due)
        return answers

    def kept(self) -> str | None:
        """What an idle engine still holds of requests that have ended; None is right."""
        scheduler = self.llm.llm_engine.engine_core.engine_core.scheduler
        pool = scheduler.kv_cache_manager.block_pool
        taken = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()  # one is vLLM's null block
        if taken or scheduler.requests:
            return f"{taken} pages and {len(scheduler.requests)} requests"
        return None

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()


def differs(plain: Got, drafted: Got) -> bool:
    """Whether two answers contradict each other: one may be a part of the other only if it, or
    the other, was aborted."""
    (a, a_ended), (b, b_ended) = plain, drafted
    if a_ended and b_ended:
        return a != b
    short, long = sorted((a, b), key=len)
    return long[: len(short)] != short or (a_ended and len(b) > len(a))


@dataclass
class Soak:
    """The run.

    Args:
        wave: requests that are sent at once.
        repeat: begin again at the first request while there is time.
    """

    requests: int = 10_000
    minutes: float = 12.0
    seed: int = 0
    wave: int = 24
    repeat: bool = False

    def __post_init__(self) -> None:
        self.compared = self.emitted = 0
        self.tau = 0.0
        self.leaks = Leaks()
        self.apart: list[Apart] = []
        self.near_ties = 0

    def run(self) -> str | None:
        """What is wrong; None if nothing is."""
        ends = time.monotonic() + 60 * self.minutes
        pairs = self._plain(ends)
        with tempfile.TemporaryDirectory() as folder:
            wrong = self._drafted(pairs, ends, Path(folder))
        found = [*self._untested(), *self.leaks.found()]
        return self._different() or wrong or "; ".join(found) or None

    def _untested(self) -> list[str]:
        """Why a run in which nothing differs may say nothing, a sentence each."""
        if not self.compared:
            return ["not a single request was compared: give it more minutes"]
        if self.tau < LEAST_TAU:
            return [f"hardly anything was drafted: tau is {self.tau:.2f}, not {LEAST_TAU}"]
        return []

    def _made(self, tokenizer: Any) -> list[Asked]:
        return requests(self.requests, self.seed, tokenizer)

    def _plain(self, ends: float) -> Pairs:
        engine = Engine(None)
        made = self._made(engine.llm.get_tokenizer())
        waves = [made[i : i + self.wave] for i in range(0, len(made), self.wave)]
        pairs = []
        share = 0.1 if self.repeat else 0.3
        enough = time.monotonic() + share * (ends - time.monotonic())
        for wave in tqdm(waves, desc="without speculation", unit="wave"):
            if time.monotonic() > enough:
                break
            pairs.append((wave, engine.answer(wave)))
        engine.close()
        return pairs

    def _drafted(self, pairs: Pairs, ends: float, folder: Path) -> str | None:
        """What is wrong with the answers of an engine that speculates."""
        engine = Engine({**SUBSPEC, "store_dir": str(folder)})
        try:
            wrong = self._compare(engine, pairs, ends)
            stats = engine.llm.collective_rpc("round_log")[0]["totals"]
        finally:
            engine.close()
        self.tau = stats["emitted_tokens"] / max(1, stats["request_rounds"])
        return wrong

    def _compare(self, engine: Engine, pairs: Pairs, ends: float) -> str | None:
        rng = random.Random(self.seed)
        rounds = itertools.cycle(pairs) if self.repeat else pairs
        for wave, expected in tqdm(rounds, desc="drafting", unit="wave"):
            if time.monotonic() > ends or self.too_many_apart:
                break
            way = {
                "hierarchy": rng.random() < 0.3,
                "branching": rng.choice([1, 2, 3, 6]),
                "depth": rng.choice([1, 3, 8, 24]),
                "pruning": rng.choice(["dynamic", "none"]),
            }
            engine.llm.collective_rpc("set_drafting", kwargs=way)
            for request, a, b in zip(wave, expected, engine.answer(wave), strict=True):
                self.compare(request, a, b, str(way))
            if kept := engine.kept():
                return f"an idle engine keeps {kept}"
            self.leaks.sample()
        return None

    def compare(self, request: Asked, plain: Got, drafted: Got, way: str = "") -> None:
        self.compared += 1
        self.emitted += len(drafted[0])
        if differs(plain, drafted):
            self.apart.append(Apart(request, plain, drafted, way))

    @property
    def too_many_apart(self) -> bool:
        """Answers differ more often than near ties can explain."""
        return len(self.apart) > 1 + self.compared // REQUESTS_PER_TIE

    def _different(self) -> str | None:
        """Of the answers that differ, one that is no near tie, or that there are too many."""
        if not self.apart:
            return None
        engine = Engine(None, **ties.SETTINGS)
        try:
            for request, plain, drafted, way in self.apart:
                gap = ties.gap(engine.llm, request.prompt, request.params, plain[0], drafted[0])
                if gap > ties.NEAR:
                    return f"DIFFERENT by {gap} with {way}: {request}\n{plain}\n{drafted}"
        finally:
            engine.close()
        self.near_ties = len(self.apart)
        return f"{self.near_ties} near ties" if self.too_many_apart else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=Soak.requests)
    parser.add_argument("--minutes", type=float, default=Soak.minutes)
    parser.add_argument("--seed", type=int, default=Soak.seed)
    parser.add_argument("--wave", type=int, default=Soak.wave, help="requests sent at once")
    parser.add_argument("--repeat", action="store_true", help="until the minutes are over")
    parser.add_argument("--http", action="store_true", help="to a server, over HTTP")
    given = vars(parser.parse_args())
    if given.pop("http"):
        from tests.soak_http import HttpSoak

        soak: Soak = HttpSoak(**given)
    else:
        soak = Soak(**given)
    wrong = soak.run()
    leaks = soak.leaks
    print(f"{soak.compared} requests, {soak.emitted} tokens; tau {soak.tau:.2f} in full batches")
    print(leaks)
    if wrong:
        print(wrong, file=sys.stderr)
        return 1
    ties_found = f"but for {soak.near_ties} near ties" if soak.near_ties else "at all"
    print(f"no difference {ties_found}, nothing gathered")
    if soak.compared < soak.requests:
        print(f"the time of {soak.minutes:g} minutes ended before all {soak.requests} requests")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
