# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Engines of two tensor-parallel ranks, in a process of their own, as the ranks are processes, too.

    python -m tests.engine.two_ranks MODEL STORE_DIR WAY...

prints a line of JSON: what each way answered, and what its ranks drafted.
"""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vllm import LLM, SamplingParams
from vllm.distributed import get_tp_group

from tests.engine.faulty_source import FaultySource
from tests.engine.helpers import (
    CHAIN,
    LAYERS,
    MODEL,
    ROUGH,
    DraftCounts,
    count_drafts,
    draft_counts,
    generate,
    greedy,
    source_prompts,
)
from tests.engine.hierarchies import WAYS
from vllm_subspec.engine.in_use import REPAIR

ROOT = Path(__file__).resolve().parents[2]
PLATFORM = Path(__file__).parent / "ray_cpu_platform"
# Ray listens on all interfaces, but only these tests may join; and it tells nobody about its use.
ALONE = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": uuid.uuid4().hex,
    "RAY_USAGE_STATS_ENABLED": "0",
}

PROMPTS = source_prompts(16, shortest=1, longest=200)[:8]
# All ranks draw the same seeds, also for requests that brought none.
SAMPLED = [SamplingParams(temperature=0.8, seed=s, max_tokens=24) for s in (1, 2, None, None)]
PARAMS = [*[greedy(24)] * 4, *SAMPLED]

OPTIONS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "drafting": ROUGH,
    "drafting, ray": ROUGH,
    # What a hierarchy drafts depends on measured time, which differs between the ranks.
    "hierarchy": {**WAYS["substitute-eagle"], "pruning": "dynamic"},
    # Of a random model, coarser substitutes are hardly ever right.
    "chains": {**CHAIN, "bits": 4},
}
"""The ``speculative_config`` of each way. The ranks of those that end in "ray" are started by Ray,
the others' by vLLM: that changes no sum."""


FAULTY = "drafting"
"""The way that meets a disk error when it has answered."""


class Outcome(NamedTuple):
    """What an engine did.

    Args:
        tokens: of every answer.
        counts: of what was verified; nothing without speculation.
        drafted: of every rank, a digest of all that it drafted; none without speculation.
        failed: how requests ended while the second rank could not read a layer; none where that
            was not tried.
        after: tokens of every greedy answer after that.
        failures: of every rank, reads that failed.
    """

    tokens: list[list[int]]
    counts: DraftCounts
    drafted: list[str]
    failed: Sequence[str | None] = ()
    after: Sequence[list[int]] = ()
    failures: Sequence[int] = ()


def run(
    ways: Sequence[str], store_dir: Path, seconds: float, model: Path = MODEL
) -> dict[str, Outcome]:
    """What engines do, by their ways (keys of ``OPTIONS``).

    Args:
        store_dir: of all that speculate.
        seconds: after which it is given up.
        model: one without a tokenizer gets the same prompts, as far as it knows such tokens.
    """
    cores = sorted(os.sched_getaffinity(0))
    found = [str(ROOT), *[str(PLATFORM)] * any(map(_over_ray, ways))]
    environment = {
        **os.environ,
        **ALONE,
        "VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}",
        "PYTHONPATH": os.pathsep.join(filter(None, [*found, os.environ.get("PYTHONPATH", "")])),
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.two_ranks", str(model), str(store_dir), *ways],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        timeout=seconds,
        check=True,
    )
    report = json.loads(done.stdout.splitlines()[-1])
    return {
        way: Outcome(tokens, DraftCounts(**counts), *others)
        for way, (tokens, counts, *others) in report.items()
    }


def assert_same_answers(outcome: Outcome, plain: Outcome) -> None:
    for i, params in enumerate(PARAMS):
        if params.seed or not params.temperature:
            assert outcome.tokens[i] == plain.tokens[i], f"request {i}"


def assert_ranks_drafted_alike(outcome: Outcome) -> None:
    first, second = outcome.drafted
    assert first == second


def _digest_drafts(worker: Any) -> None:
    """Makes a worker digest what it drafts (a `collective_rpc`)."""
    proposer = worker.proposer
    propose, proposer.digest = proposer.propose, hashlib.sha256()

    def digested(*args: Any, **kwargs: Any) -> Any:
        drafts = propose(*args, **kwargs)
        for draft in drafts:
            proposer.digest.update(draft.tree.tokens.tobytes() + draft.tree.parents.tobytes())
        return drafts

    proposer.propose = digested


def _digest_of(worker: Any) -> str:
    digest: str = worker.proposer.digest.hexdigest()
    return digest


def _break_a_read(worker: Any) -> None:
    """The second rank's next read of its last layer fails (a `collective_rpc`)."""
    if get_tp_group().rank_in_group == 1:
        transfer = worker.loading.ring.transfer
        transfer._source = FaultySource(transfer._source)
        transfer._source.arm(LAYERS - 1)


def _over_ray(way: str) -> bool:
    return way.endswith("ray")


def _answer(way: str, model: str, store_dir: str) -> Outcome:
    options = OPTIONS[way]
    # Or vLLM would fail where ours must not; its workers read it when they start.
    os.environ[REPAIR] = str(int(options is None))
    llm = LLM(
        model,
        skip_tokenizer_init=not (Path(model) / "tokenizer.json").exists(),
        dtype="float32",
        enforce_eager=True,
        tensor_parallel_size=2,
        distributed_executor_backend="ray" if _over_ray(way) else "mp",
        max_model_len=512,
        block_size=32,
        kv_cache_memory_bytes=32 << 20,
        max_num_batched_tokens=128,
        disable_log_stats=False,
        speculative_config=None if options is None else {**options, "store_dir": store_dir},
    )
    if options is not None:
        llm.collective_rpc(count_drafts)
        llm.collective_rpc(_digest_drafts)
    known = llm.model_config.get_vocab_size()
    prompts = [[token % known for token in prompt] for prompt in PROMPTS]
    outcome = Outcome(
        [list(answer.tokens) for answer in generate(llm, prompts, PARAMS)], DraftCounts(), []
    )
    if options is not None:
        outcome = outcome._replace(counts=draft_counts(llm), drafted=llm.collective_rpc(_digest_of))
    if way == FAULTY:
        llm.collective_rpc(_break_a_read)
        failed = generate(llm, prompts[:2], PARAMS[:2])
        after = generate(llm, prompts[:4], PARAMS[:4])
        outcome = outcome._replace(
            failed=[answer.finish_reason for answer in failed],
            after=[list(answer.tokens) for answer in after],
            failures=[
                told["counters"]["read_failures"] for told in llm.collective_rpc("statistics")
            ],
        )
    llm.llm_engine.engine_core.shutdown()
    return outcome


@contextlib.contextmanager
def _ray() -> Iterator[None]:
    import ray

    ray.init(num_cpus=2, num_gpus=2, object_store_memory=100 << 20, include_dashboard=False)
    yield
    ray.shutdown()


def main(model: str, store_dir: str, *ways: str) -> None:
    answered = {}
    for way in ways:
        with _ray() if _over_ray(way) else contextlib.nullcontext():
            answered[way] = _answer(way, model, store_dir)
    print("\n" + json.dumps(answered, default=vars), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
