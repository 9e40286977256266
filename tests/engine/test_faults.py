# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Weights that cannot be read while serving: the requests of that pass fail, the others do not."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM

from tests.engine.faulty_source import FaultySource
from tests.engine.helpers import (
    LAYERS,
    ROUGH,
    Answer,
    Batch,
    Engines,
    assert_trees_were_tried,
    draft_counts,
    generate,
    greedy,
    scheduler_of,
    source_prompts,
    worker_of,
)
from vllm_subspec.weights.ring import Ring, ThreadTransfer

RUNNING = 4
PROMPTS = source_prompts(9, 70, 200)  # several full KV blocks each, so that they can be found again
PARAMS = [greedy(24)] * len(PROMPTS)
SETTINGS: dict[str, Any] = {"max_num_seqs": RUNNING, "max_num_batched_tokens": 1024}


@pytest.fixture(scope="module")
def expected(engines: Engines) -> list[Answer]:
    return engines.reference(PROMPTS, PARAMS, **SETTINGS)


@pytest.fixture
def llm(engines: Engines, expected: list[Answer]) -> LLM:
    llm = engines.get(ROUGH, **SETTINGS)
    llm.reset_prefix_cache()
    return llm


@pytest.fixture
def source(llm: LLM) -> Iterator[FaultySource]:
    transfer = ring_of(llm).transfer
    assert isinstance(transfer, ThreadTransfer)
    faulty = FaultySource(transfer._source)
    transfer._source = faulty
    yield faulty
    transfer._source = faulty._source


def ring_of(llm: LLM) -> Ring:
    ring: Ring = worker_of(llm).loading.ring
    return ring


@pytest.mark.parametrize("block", [0, 2, LAYERS - 1])
@pytest.mark.parametrize("after_steps", [0, 1, 4])
def test_one_unreadable_block(
    llm: LLM, source: FaultySource, expected: list[Answer], block: int, after_steps: int
) -> None:
    """In the pass of the prompts or of the drafts' verification, at the ring's begin or end."""
    failures = ring_of(llm).stats.failures
    before = draft_counts(llm)
    batch = Batch(llm, PROMPTS, PARAMS)
    if after_steps == 0:
        source.arm(block)
    for step in batch.steps():
        if step + 1 == after_steps:
            source.arm(block)
    assert source.failed == 1 and ring_of(llm).stats.failures == failures + 1
    failed = {i for i, answer in batch.answers.items() if answer.finish_reason == "error"}
    assert len(batch.answers) == len(PROMPTS)
    assert 1 <= len(failed) <= RUNNING
    for i, answer in batch.answers.items():
        if i in failed:
            assert answer.tokens == expected[i].tokens[: len(answer.tokens)]
            assert len(answer.tokens) < len(expected[i].tokens)
        else:
            assert answer == expected[i]
    # The same prompts again: nothing of the failed pass may be found in the prefix cache.
    assert generate(llm, PROMPTS, PARAMS) == expected
    assert_trees_were_tried(draft_counts(llm) - before, 10)
    assert not scheduler_of(llm).requests


def test_generate_returns_the_error(llm: LLM, source: FaultySource, expected: list[Answer]) -> None:
    source.arm(LAYERS - 1)  # not read ahead: the ring is shorter
    (answer,) = generate(llm, PROMPTS[:1], PARAMS[:1])
    assert answer.finish_reason == "error" and not answer.tokens
    assert generate(llm, PROMPTS[:1], PARAMS[:1]) == expected[:1]


@pytest.mark.parametrize("block", [0, 2, LAYERS - 1])
def test_a_missed_wait_is_no_answer(
    llm: LLM, expected: list[Answer], monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    """As where a graph was compiled for another memory plan."""
    ring = ring_of(llm)
    wait = ring.wait
    with monkeypatch.context() as patch:
        patch.setattr(ring, "wait", lambda awaited: None if awaited == block else wait(awaited))
        (answer,) = generate(llm, PROMPTS[:1], PARAMS[:1])
    assert answer.finish_reason == "error" and not answer.tokens
    assert generate(llm, PROMPTS[:1], PARAMS[:1]) == expected[:1]


def test_a_failed_pass_leaves_nothing_in_the_prefix_cache(
    llm: LLM, source: FaultySource, expected: list[Answer]
) -> None:
    pool = scheduler_of(llm).kv_cache_manager.block_pool
    generate(llm, PROMPTS[:1], PARAMS[:1])
    assert len(pool.cached_block_hash_to_block) > 0
    source.arm(LAYERS - 1)
    (answer,) = generate(llm, PROMPTS[1:2], PARAMS[1:2])
    assert answer.finish_reason == "error"
    assert len(pool.cached_block_hash_to_block) == 0
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1  # all but vLLM's null block
    assert generate(llm, PROMPTS[:1], PARAMS[:1]) == expected[:1]


def test_truncated_while_serving(llm: LLM, expected: list[Answer], tmp_path: Path) -> None:
    """The real file gets shorter under the engine, and comes back."""
    path = Path(worker_of(llm).loading.store_path)
    whole = path.read_bytes()
    os.truncate(path, len(whole) // 2)
    try:
        for _ in range(2):
            for answer in generate(llm, PROMPTS[:2], PARAMS[:2]):
                assert answer.finish_reason == "error" and not answer.tokens
    finally:
        with path.open("r+b") as file:  # the same file: the engine holds it open
            file.write(whole)
    # What was loaded ahead for this pass was loaded before the file came back.
    generate(llm, PROMPTS[:1], PARAMS[:1])
    assert generate(llm, PROMPTS, PARAMS) == expected
