# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Hierarchies: whatever happens inside, the answers are the target's."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import SamplingParams

from tests.engine.helpers import (
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
from tests.engine.hierarchies import SMALL, WAYS
from tests.engine.kinds import seeded

TIGHT: dict[str, Any] = {
    "max_model_len": 176,
    "max_num_batched_tokens": 192,
    "max_num_seqs": 8,
    "kv_cache_memory_bytes": 24 << 20,
}

# Greedy ones up to max_model_len, prompts in chunks; some prompts come again, to be found in the
# prefix cache, beside requests that are aborted.
SAMPLED = ["temperature 1", "all together", "temperature 0.3", "min_p", "repetition_penalty"]
PARAMS = [greedy(40), *[seeded(name, 1, max_tokens=24)[0] for name in SAMPLED]]
PARAMS = [*PARAMS, greedy(300), *seeded("mixed", 3, max_tokens=24)[1:], greedy(300)]
PROMPTS = source_prompts(len(PARAMS), 2, 140)
PROMPTS, PARAMS = [*PROMPTS, *PROMPTS[4:]], [*PARAMS, *PARAMS[4:]]
ABORTED = {2: 3, 5: 4, 9: 13}
"""Requests, by the step after which they are aborted."""

GROWING = (source_prompts(10, 30, 90), [greedy(80 - 5 * (i % 4)) for i in range(10)])


@pytest.fixture(scope="module", autouse=True)
def expected(engines: Engines) -> list[Answer]:
    return engines.reference(PROMPTS, PARAMS, **TIGHT)


@pytest.fixture(scope="module")
def expected_growing(engines: Engines, expected: list[Answer]) -> list[Answer]:
    return engines.reference(*GROWING, **TIGHT)


@pytest.mark.parametrize("way", WAYS)
def test_answers_are_the_targets(engines: Engines, expected: list[Answer], way: str) -> None:
    llm = engines.get(WAYS[way], **TIGHT)
    free = scheduler_of(llm).kv_cache_manager.block_pool.get_num_free_blocks()
    batch = Batch(llm, PROMPTS, PARAMS)
    for step in batch.steps():
        if step in ABORTED:
            batch.abort(ABORTED[step])
    for i in set(range(len(PROMPTS))) - set(ABORTED.values()):
        assert batch.answers[i] == expected[i], f"request {i}"
    counts = draft_counts(llm)
    assert counts.accepted > 40 and counts.rejected > 40, counts
    assert (counts.trees > 4) == way.startswith("target"), counts
    assert metric(llm, "prefix_cache_hits") > 0
    assert scheduler_of(llm).kv_cache_manager.block_pool.get_num_free_blocks() == free


@pytest.mark.parametrize("way", ["small-eagle", "substitute-ngram"])
def test_preempted_requests_resume(
    engines: Engines, expected_growing: list[Answer], way: str
) -> None:
    llm = engines.get(WAYS[way], **TIGHT | {"kv_cache_memory_bytes": 6 << 20})
    assert generate(llm, *GROWING) == expected_growing
    assert metric(llm, "num_preemptions") > 0
    assert draft_counts(llm).accepted > 50


@pytest.mark.parametrize("way", ["small-eagle", "substitute-eagle3"])
def test_own_pages_hold_what_a_prefill_computes(engines: Engines, way: str) -> None:
    """After hundreds of rounds in which drafts were right, partly right and wrong."""
    llm = engines.get(WAYS[way], **TIGHT)
    llm.reset_prefix_cache()
    prompts = source_prompts(12, 5, 60)
    sampled = SamplingParams(temperature=0.8, seed=5, max_tokens=100, ignore_eos=True)
    batch = Batch(llm, prompts, [greedy(100), sampled] * 6)
    coverages = worker_of(llm).proposer._models._coverages
    prefixes = ["intermediate.", "drafter."][-len(coverages) :]
    pages: dict[tuple[int, str], torch.Tensor] = {}
    texts: dict[int, list[int]] = {}
    rounds = 0
    for _ in batch.steps():
        for i, request in batch.running().items():
            rounds += 1
            texts[i] = list(request.all_token_ids)
            for prefix, coverage in zip(prefixes, coverages, strict=True):
                # The row's next forward begins here.
                end = min(coverage._ends[batch.id(i)], request.num_computed_tokens)
                pages[i, prefix] = kv_pages(llm, batch.id(i), 0, end, prefix)
    assert rounds > 200
    for i, text in texts.items():
        llm.reset_prefix_cache()
        fresh = Batch(llm, [text], [greedy(4)])
        found: dict[str, torch.Tensor] = {}
        for _ in fresh.steps():
            for prefix in prefixes if fresh.running() and not found else ():
                end = pages[i, prefix].shape[-2]
                assert end > len(prompts[i]) + 50
                found[prefix] = kv_pages(llm, fresh.id(0), 0, end, prefix)
        for prefix in prefixes:
            torch.testing.assert_close(pages[i, prefix], found[prefix], atol=1e-4, rtol=1e-4)


def test_beyond_what_a_model_can_read_nothing_is_drafted(
    engines: Engines, expected: list[Answer], tmp_path: Path
) -> None:
    """The small model has no positions there."""
    short = tmp_path / "short"
    shutil.copytree(SMALL, short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 96}))
    llm = engines.get({**WAYS["small-ngram"], "intermediate": str(short)}, **TIGHT)
    batch = Batch(llm, PROMPTS, PARAMS)
    longest = 0
    for _ in batch.steps():
        done = worker_of(llm).model_runner.verification
        ends = [r + len(d) for r, d in zip(done.roots, done.drafts, strict=True) if len(d)]
        longest = max(longest, *ends, 0)
    assert [batch.answers[i] for i in range(len(PROMPTS))] == expected
    assert 80 < longest <= 96


def test_another_draft_while_serving(engines: Engines, expected: list[Answer]) -> None:
    llm = engines.get(WAYS["small-ngram"], **TIGHT)
    llm.collective_rpc("set_drafting", kwargs={"hierarchy": False})
    before = draft_counts(llm)
    assert generate(llm, PROMPTS, PARAMS) == expected
    assert (draft_counts(llm) - before).accepted > 50
    llm = engines.get(WAYS["target-ngram"], **TIGHT)
    with pytest.raises(ValueError, match='no "intermediate" to draft'):
        llm.collective_rpc("set_drafting", kwargs={"hierarchy": False})
