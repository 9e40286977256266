# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Invariant 2: greedy answers in float32 are those of the target without speculation."""

from collections import Counter
from typing import Any

import pytest
from vllm import SamplingParams

from tests.engine.helpers import (
    LAYERS,
    ROUGH,
    Answer,
    Batch,
    Engines,
    draft_counts,
    draft_fully,
    generate,
    greedy,
    memory_plan,
    metric,
    resident_gib,
    source_prompts,
    worker_of,
)

# Prompts of up to 300 tokens through passes of at most 192: long ones come in chunks, beside rows
# that already verify.
CHUNKED: dict[str, Any] = {"max_num_batched_tokens": 192}
Case = tuple[list[list[int]], list[SamplingParams], list[Answer]]

PROMPTS = source_prompts(64, shortest=1, longest=300)
PARAMS = [greedy(12 + i % 3 * 6) for i in range(64)]
GROWING = (source_prompts(16, shortest=40, longest=100), [greedy(96)] * 16)


@pytest.fixture(scope="module")
def reference(engines: Engines) -> list[Answer]:
    return engines.reference(PROMPTS, PARAMS, **CHUNKED)


@pytest.fixture(scope="module")
def reference_growing(engines: Engines) -> list[Answer]:
    return engines.reference(*GROWING, **CHUNKED)


@pytest.fixture(scope="module")
def continued(engines: Engines, reference: list[Answer]) -> Case:
    """Prompts that contain the answers of `reference`."""
    longer = [p + list(a.tokens) for p, a in zip(PROMPTS, reference, strict=True)]
    return longer, PARAMS, engines.reference(longer, PARAMS, **CHUNKED)


@pytest.fixture(scope="module")
def stopping(engines: Engines, reference: list[Answer]) -> Case:
    """All ways to stop, side by side."""
    prompts = source_prompts(48, shortest=3, longest=120)
    common = Counter(t for a in reference for t in a.tokens).most_common(4)[-1][0]
    ways = [
        greedy(1),
        greedy(2),
        greedy(3),
        greedy(40, stop=["self", "return"]),
        greedy(40, stop=["\n\n", "):"], include_stop_str_in_output=True),
        greedy(40, stop_token_ids=[common]),
        greedy(40, stop_token_ids=[common], min_tokens=7),
        greedy(40, ignore_eos=False),
    ]
    params = [ways[i % len(ways)] for i in range(len(prompts))]
    return prompts, params, engines.reference(prompts, params, **CHUNKED)


@pytest.fixture(scope="module", autouse=True)
def references_first(
    reference: list[Answer], reference_growing: list[Answer], continued: Case, stopping: Case
) -> None:
    """All from one engine, before any other lives."""


def assert_same(answers: list[Answer], reference: list[Answer]) -> None:
    different = [
        i for i, pair in enumerate(zip(answers, reference, strict=True)) if pair[0] != pair[1]
    ]
    assert not different, f"requests {different}, the first: {answers[different[0]]}"


@pytest.mark.parametrize(
    ("streamed", "substituted", "options"),
    [
        (0, [1, 3, 4], {"substitute_layers": [1, 3, 4]}),
        (0, range(LAYERS), {"substitute_layers": "all"}),
        (3, range(3), {}),
        (3, range(LAYERS), {"substitute_layers": "all"}),
        (LAYERS, range(LAYERS), {}),
    ],
)
def test_batch_of_mixed_lengths(
    engines: Engines,
    reference: list[Answer],
    streamed: int,
    substituted: list[int],
    options: dict[str, Any],
) -> None:
    """64 requests in one continuous batch with chunked prefill. (Streamed layers always have a
    substitute, and a draft without any would be the target.)"""
    resident = resident_gib(LAYERS - streamed) if streamed < LAYERS else 0
    llm = draft_fully(
        engines.get({**ROUGH, "resident_weights_gib": resident, **options}, **CHUNKED)
    )
    plan = memory_plan(llm)
    assert plan.streamed == tuple(range(streamed))
    assert plan.substituted == tuple(substituted)

    answers = generate(llm, PROMPTS, PARAMS)

    assert_same(answers, reference)
    counts = draft_counts(llm)
    assert counts.accepted > 100
    assert counts.rejected > 100


def test_prefix_cache_hits(engines: Engines, reference: list[Answer]) -> None:
    llm = draft_fully(engines.get(ROUGH, **CHUNKED))
    assert_same(generate(llm, PROMPTS, PARAMS), reference)
    hits, counts = metric(llm, "prefix_cache_hits"), draft_counts(llm)

    again = generate(llm, PROMPTS, PARAMS)

    assert metric(llm, "prefix_cache_hits") - hits > sum(map(len, PROMPTS)) // 2
    assert (draft_counts(llm) - counts).rejected > 100
    assert_same(again, reference)


def test_answers_are_cached_as_the_target_computed_them(
    engines: Engines, reference: list[Answer], continued: Case
) -> None:
    """A question that contains an earlier answer finds it in the prefix cache; had a draft's K/V
    been left there, the continuation would be the draft's."""
    prompts, params, expected = continued
    llm = draft_fully(engines.get(ROUGH, **CHUNKED))
    assert_same(generate(llm, PROMPTS, PARAMS), reference)
    hits = metric(llm, "prefix_cache_hits")
    assert_same(generate(llm, prompts, params), expected)
    assert metric(llm, "prefix_cache_hits") - hits > sum(map(len, PROMPTS)) // 2


def test_ways_to_stop(engines: Engines, stopping: Case) -> None:
    """max_tokens of 1, 2 and 3, stop strings (kept or cut), stop tokens (with min_tokens), the end
    of text, and none of them: tokens, text and reasons are the same."""
    prompts, params, expected = stopping
    llm = draft_fully(engines.get(ROUGH, **CHUNKED))
    counts = draft_counts(llm)

    answers = generate(llm, prompts, params)

    assert_same(answers, expected)
    reasons = {(a.finish_reason, type(a.stop_reason)) for a in answers}
    assert {("stop", str), ("stop", int), ("length", type(None))} <= reasons
    assert (draft_counts(llm) - counts).rejected > 50


def test_the_last_token_is_not_drafted_for(engines: Engines) -> None:
    llm = draft_fully(engines.get(ROUGH, **CHUNKED))
    before = draft_counts(llm)
    generate(llm, PROMPTS[:8], [greedy(1)] * 8)
    assert (draft_counts(llm) - before).drafted == 0
    generate(llm, PROMPTS[:8], [greedy(2)] * 8)
    assert (draft_counts(llm) - before).drafted == 0
    generate(llm, PROMPTS[:8], [greedy(3)] * 8)
    assert 0 < (draft_counts(llm) - before).drafted <= 8


def test_one_request_alone(engines: Engines, reference: list[Answer]) -> None:
    llm = draft_fully(engines.get(ROUGH, **CHUNKED))
    counts = draft_counts(llm)
    for i in (0, 20, 41, 63):
        assert generate(llm, PROMPTS[i : i + 1], PARAMS[i : i + 1]) == reference[i : i + 1]
    assert (draft_counts(llm) - counts).rejected > 0


def test_speculation_switched_off_and_on(engines: Engines, reference_growing: list[Answer]) -> None:
    """Every four steps, in the middle of a batch."""
    llm = draft_fully(engines.get(ROUGH, **CHUNKED))
    batch = Batch(llm, *GROWING)
    drafting: dict[bool, list[bool]] = {True: [], False: []}
    for step in batch.steps():
        enabled = worker_of(llm).proposer.enabled
        drafting[enabled] += [bool(r.spec_token_ids) for r in batch.running().values()]
        if step % 4 == 3:
            llm.collective_rpc("set_speculation", args=(not enabled,))
    llm.collective_rpc("set_speculation", args=(True,))
    assert_same([batch.answers[i] for i in range(len(GROWING[0]))], reference_growing)
    assert any(drafting[True])
    assert drafting[False]
    assert not any(drafting[False])


def test_forced_preemption(engines: Engines, reference_growing: list[Answer]) -> None:
    """The KV cache holds a part of what 16 growing requests need."""
    llm = engines.get(ROUGH, kv_cache_memory_bytes=8 << 20, enable_prefix_caching=False)
    answers = generate(draft_fully(llm), *GROWING)

    assert metric(llm, "num_preemptions") > 0
    assert_same(answers, reference_growing)
    counts = draft_counts(llm)
    assert counts.accepted > 100
    assert counts.rejected > 100


def test_the_default_draft(engines: Engines, reference_growing: list[Answer]) -> None:
    """4 bits, HQQ, up to 48 tokens, as deep as pays on this machine."""
    llm = engines.get({"method": "subspec", "resident_weights_gib": 0})
    assert_same(generate(llm, *GROWING), reference_growing)
    assert draft_counts(llm).accepted > 100
    before = draft_counts(llm)
    assert_same(generate(draft_fully(llm), *GROWING), reference_growing)
    deep = draft_counts(llm) - before
    assert deep.accepted > 4 * deep.drafts
