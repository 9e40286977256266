# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Hierarchies: every drafter under every intermediate model, and directly under the target.

The inner models are so much smaller than the target that they are often wrong.
"""

from typing import Any

import pytest
import torch
from vllm import SamplingParams

from tests.engine.helpers import (
    MODELS,
    ROUGH,
    Answer,
    Batch,
    Engines,
    draft_counts,
    generate,
    greedy,
    kv_pages,
    metric,
    scheduler_of,
    source_prompts,
    worker_of,
)

SMALL = str(MODELS / "pystd-1m")
TIGHT: dict[str, Any] = {
    "max_model_len": 256,
    "max_num_batched_tokens": 160,
    "max_num_seqs": 8,
    "kv_cache_memory_bytes": 24 << 20,
}

DRAFTERS: dict[str, dict[str, Any]] = {
    "ngram": {"method": "ngram", "depth": 3, "branching": 3, "nodes": 8},
    "model": {"method": "draft_model", "model": SMALL, "depth": 3, "branching": 3, "nodes": 8},
}
COMMON: dict[str, Any] = {"num_speculative_tokens": 12, "pruning": "none", "min_draft_length": 5}


def hierspec(intermediate: str | None, drafter: str) -> dict[str, Any]:
    given = {"method": "hierspec", "drafter": DRAFTERS[drafter], **COMMON}
    if intermediate is None:
        del given["min_draft_length"]
        return given
    return {**given, "intermediate": intermediate}


WAYS: dict[str, dict[str, Any]] = {
    "ngram": hierspec(None, "ngram"),
    "model": hierspec(None, "model"),
    "small-ngram": hierspec(SMALL, "ngram"),
    "small-model": hierspec(SMALL, "model"),
    "substitute-ngram": {**ROUGH, **COMMON, "drafter": DRAFTERS["ngram"]},
    "substitute-model": {**ROUGH, **COMMON, "drafter": DRAFTERS["model"]},
}

# Some end at max_model_len, all sorts of parameters, prompts in chunks.
PROMPTS = source_prompts(20, 2, 200)
PARAMS = [
    greedy(40),
    greedy(300),
    SamplingParams(temperature=0.8, seed=1, max_tokens=40, ignore_eos=True),
    SamplingParams(temperature=1.0, top_p=0.9, top_k=40, seed=2, max_tokens=24, ignore_eos=True),
    SamplingParams(
        temperature=0.7, repetition_penalty=1.3, min_p=0.05, seed=3, max_tokens=40, ignore_eos=True
    ),
] * 4


@pytest.fixture(scope="module", autouse=True)
def expected(engines: Engines) -> list[Answer]:
    return engines.reference(PROMPTS, PARAMS, **TIGHT)


@pytest.mark.parametrize("way", WAYS)
def test_answers_are_the_targets(engines: Engines, expected: list[Answer], way: str) -> None:
    """Greedy and sampled, in chunks, up to max_model_len; then from the prefix cache; then beside
    requests that are aborted."""
    llm = engines.get(WAYS[way], **TIGHT)
    assert generate(llm, PROMPTS, PARAMS) == expected
    counts = draft_counts(llm)
    assert counts.accepted > 50 and counts.rejected > 50, counts
    hits = metric(llm, "prefix_cache_hits")
    assert generate(llm, PROMPTS, PARAMS) == expected
    assert metric(llm, "prefix_cache_hits") > hits

    free = scheduler_of(llm).kv_cache_manager.block_pool.get_num_free_blocks()
    batch = Batch(llm, PROMPTS, PARAMS)
    aborted = {3, 8, 13}
    for step in batch.steps():
        if step in (2, 5, 9):
            batch.abort({2: 3, 5: 8, 9: 13}[step])
    for i in set(range(len(PROMPTS))) - aborted:
        assert batch.answers[i] == expected[i], f"request {i}"
    assert scheduler_of(llm).kv_cache_manager.block_pool.get_num_free_blocks() == free


@pytest.mark.parametrize("way", ["small-model", "substitute-ngram"])
def test_preempted_requests_resume(engines: Engines, way: str) -> None:
    prompts, params = source_prompts(10, 30, 90), [greedy(80 - 5 * (i % 4)) for i in range(10)]
    expected = engines.reference(prompts, params, **TIGHT)
    llm = engines.get(WAYS[way], **TIGHT | {"kv_cache_memory_bytes": 6 << 20})
    assert generate(llm, prompts, params) == expected
    assert metric(llm, "num_preemptions") > 0


@pytest.mark.parametrize("prefix", ["intermediate.", "drafter."])
def test_own_pages_hold_what_a_prefill_computes(engines: Engines, prefix: str) -> None:
    """After hundreds of rounds in which drafts were right, partly right and wrong."""
    llm = engines.get(WAYS["small-model"], **TIGHT)
    llm.reset_prefix_cache()
    prompts = source_prompts(6, 5, 60)
    params = [
        greedy(150)
        if i % 2
        else SamplingParams(temperature=0.8, seed=i, max_tokens=150, ignore_eos=True)
        for i in range(6)
    ]
    batch = Batch(llm, prompts, params)
    pages: dict[int, torch.Tensor] = {}
    texts: dict[int, list[int]] = {}
    rounds = 0
    for _ in batch.steps():
        coverage = worker_of(llm).proposer._models._coverages[prefix == "drafter."]
        for i, request in batch.running().items():
            rounds += 1
            # The row's next forward begins here.
            end = min(coverage._ends[batch.id(i)], request.num_computed_tokens)
            texts[i] = list(request.all_token_ids)
            pages[i] = kv_pages(llm, batch.id(i), 0, end, prefix)
    assert rounds > 200
    llm.reset_prefix_cache()
    for i, text in texts.items():
        fresh = Batch(llm, [text], [greedy(4)])
        found: list[torch.Tensor] = []
        for _ in fresh.steps():
            if fresh.running() and not found:
                found.append(kv_pages(llm, fresh.id(0), 0, pages[i].shape[-2], prefix))
        torch.testing.assert_close(pages[i], found[0], atol=1e-4, rtol=1e-4)
        assert pages[i].shape[-2] > len(prompts[i]) + 50
        llm.reset_prefix_cache()
