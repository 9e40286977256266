# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Invariant 2: greedy answers in float32 are those of the target without speculation."""

from collections import Counter
from typing import Any

import pytest
from vllm import LLM, SamplingParams

from tests.engine.helpers import (
    CHAIN,
    DEFAULTS,
    LAYERS,
    ROUGH,
    Answer,
    Batch,
    Engines,
    assert_chains_were_tried,
    assert_trees_were_tried,
    draft_counts,
    generate,
    greedy,
    memory_plan,
    metric,
    resident_gib,
    scheduler_of,
    source_prompts,
    worker_of,
)
from vllm_subspec.core.draft_tokens import DraftTokens
from vllm_subspec.core.resting import Reading

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
    llm = engines.get({**ROUGH, "resident_weights_gib": resident, **options}, **CHUNKED)
    plan = memory_plan(llm)
    assert plan.streamed == tuple(range(streamed))
    assert plan.substituted == tuple(substituted)

    answers = generate(llm, PROMPTS, PARAMS)

    assert_same(answers, reference)
    assert_trees_were_tried(draft_counts(llm), 100)


def test_chains(engines: Engines, reference: list[Answer]) -> None:
    """The same batch, and once more with hits of the prefix cache."""
    llm = engines.get(CHAIN, **CHUNKED)
    assert_same(generate(llm, PROMPTS, PARAMS), reference)
    counts, hits = draft_counts(llm), metric(llm, "prefix_cache_hits")
    assert_chains_were_tried(counts, 100)
    assert_same(generate(llm, PROMPTS, PARAMS), reference)
    assert metric(llm, "prefix_cache_hits") - hits > sum(map(len, PROMPTS)) // 2
    assert_chains_were_tried(draft_counts(llm) - counts, 100)
    with pytest.raises(ValueError, match='started with "branching" 1 has no tree attention'):
        llm.collective_rpc("set_drafting", kwargs={"branching": 2})


def test_prefix_cache_hits(engines: Engines, reference: list[Answer]) -> None:
    llm = engines.get(ROUGH, **CHUNKED)
    assert_same(generate(llm, PROMPTS, PARAMS), reference)
    hits, counts = metric(llm, "prefix_cache_hits"), draft_counts(llm)

    again = generate(llm, PROMPTS, PARAMS)

    assert metric(llm, "prefix_cache_hits") - hits > sum(map(len, PROMPTS)) // 2
    assert_same(again, reference)
    assert_trees_were_tried(draft_counts(llm) - counts, 100)


def test_a_hit_that_leaves_one_token(engines: Engines) -> None:
    """Beside requests that run already: vLLM would pad it to the size of a full draft."""
    block = DEFAULTS["block_size"]
    asked = [p[: len(p) // block * block + 1] for p in source_prompts(8, shortest=70, longest=200)]
    asked = [*asked, asked[3][:1]]
    params = [greedy(20)] * len(asked)
    expected = engines.reference(asked, params, **CHUNKED)
    llm = engines.get(ROUGH, **CHUNKED)
    assert_same(generate(llm, asked, params), expected)
    hits, counts = metric(llm, "prefix_cache_hits"), draft_counts(llm)
    assert_same(generate(llm, asked, params), expected)
    assert metric(llm, "prefix_cache_hits") - hits == sum(len(p) - 1 for p in asked)
    assert_trees_were_tried(draft_counts(llm) - counts, 5)


def test_answers_are_cached_as_the_target_computed_them(
    engines: Engines, reference: list[Answer], continued: Case
) -> None:
    """A question that contains an earlier answer finds it in the prefix cache; had a draft's K/V
    been left there, the continuation would be the draft's."""
    prompts, params, expected = continued
    llm = engines.get(ROUGH, **CHUNKED)
    assert_same(generate(llm, PROMPTS, PARAMS), reference)
    hits = metric(llm, "prefix_cache_hits")
    counts = draft_counts(llm)
    assert_same(generate(llm, prompts, params), expected)
    assert metric(llm, "prefix_cache_hits") - hits > sum(map(len, PROMPTS)) // 2
    assert_trees_were_tried(draft_counts(llm) - counts, 100)


def test_ways_to_stop(engines: Engines, stopping: Case) -> None:
    """max_tokens of 1, 2 and 3, stop strings (kept or cut), stop tokens (with min_tokens), the end
    of text, and none of them: tokens, text and reasons are the same."""
    prompts, params, expected = stopping
    llm = engines.get(ROUGH, **CHUNKED)
    counts = draft_counts(llm)

    answers = generate(llm, prompts, params)

    assert_same(answers, expected)
    reasons = {(a.finish_reason, type(a.stop_reason)) for a in answers}
    assert {("stop", str), ("stop", int), ("length", type(None))} <= reasons
    assert_trees_were_tried(draft_counts(llm) - counts, 50)


def test_the_last_token_is_not_drafted_for(engines: Engines) -> None:
    llm = engines.get(ROUGH, **CHUNKED)
    before = draft_counts(llm)
    generate(llm, PROMPTS[:8], [greedy(1)] * 8)
    assert (draft_counts(llm) - before).drafted == 0
    generate(llm, PROMPTS[:8], [greedy(2)] * 8)
    assert (draft_counts(llm) - before).drafted == 0
    generate(llm, PROMPTS[:8], [greedy(3)] * 8)
    counts = draft_counts(llm) - before
    assert counts.trees == counts.drafts == 8
    assert counts.drafted == 8 * ROUGH["branching"]  # of one level


def test_one_request_alone(engines: Engines, reference: list[Answer]) -> None:
    llm = engines.get(ROUGH, **CHUNKED)
    counts = draft_counts(llm)
    for i in (0, 20, 41, 63):
        assert generate(llm, PROMPTS[i : i + 1], PARAMS[i : i + 1]) == reference[i : i + 1]
    assert_trees_were_tried(draft_counts(llm) - counts, 3)


def test_speculation_switched_off_and_on(engines: Engines, reference_growing: list[Answer]) -> None:
    """Every four steps, in the middle of a batch."""
    llm = engines.get(ROUGH, **CHUNKED)
    batch = Batch(llm, *GROWING)
    drafting: dict[bool, list[bool]] = {True: [], False: []}
    for step in batch.steps():
        enabled = worker_of(llm).proposer.enabled
        computed = worker_of(llm).model_runner.verification.request_ids
        drafting[enabled] += [
            bool(r.spec_token_ids) for r in batch.running().values() if r.request_id in computed
        ]
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
    answers = generate(llm, *GROWING)

    assert metric(llm, "num_preemptions") > 0
    assert_same(answers, reference_growing)
    assert_trees_were_tried(draft_counts(llm), 100)


def test_the_default_draft(engines: Engines, reference_growing: list[Answer]) -> None:
    """4 bits, HQQ, sequences of up to 48 tokens in which lookups take part, as long as pays on this
    machine; then trees of up to 128 tokens and 48 levels, all of it."""
    llm = engines.get({"method": "subspec", "resident_weights_gib": 0})
    assert_same(generate(llm, *GROWING), reference_growing)
    before = draft_counts(llm)
    assert before.accepted > 100
    llm.collective_rpc("set_drafting", kwargs={"pruning": "none", "hierarchy": False})
    assert_same(generate(llm, *GROWING), reference_growing)
    full = draft_counts(llm) - before
    assert full.accepted > 4 * full.drafts
    assert full.trees == full.drafts
    assert full.largest == 128


def test_drafting_changed_while_serving(engines: Engines, reference_growing: list[Answer]) -> None:
    """Every few steps, in the middle of a batch: chains and trees of other sizes, pruned or not."""
    llm = engines.get(ROUGH, **CHUNKED)
    changes: list[tuple[dict[str, Any], int, int]] = [  # most nodes, most levels
        ({"branching": 1}, 6, 6),
        ({"branching": 8, "depth": 2}, 16, 2),
        ({"pruning": "dynamic"}, 16, 6),
        ({"depth": 1}, 3, 1),
        ({}, 16, 6),
    ]
    batch = Batch(llm, *GROWING)
    seen: dict[int, set[tuple[int, int]]] = {}
    now = len(changes) - 1
    for step in batch.steps():
        computed = worker_of(llm).model_runner.verification.request_ids
        drafts = [r.spec_token_ids for r in batch.running().values() if r.request_id in computed]
        seen.setdefault(now, set()).update(_shape(draft) for draft in drafts if draft)
        if step % 4 == 3:
            now = (now + 1) % len(changes)
            llm.collective_rpc("set_drafting", kwargs=changes[now][0])
    llm.collective_rpc("set_drafting")
    assert_same([batch.answers[i] for i in range(len(GROWING[0]))], reference_growing)
    for i, (change, nodes, levels) in enumerate(changes):
        assert max(size for size, _ in seen[i]) <= nodes, change
        assert max(depth for _, depth in seen[i]) <= levels, change
        if change.get("pruning") != "dynamic":
            assert (nodes, levels) in seen[i], change


def test_tokens_do_not_wait_for_the_next_draft(
    engines: Engines, reference_growing: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server sends what the scheduler returns before it asks for the drafts (`post_step`)."""
    llm = engines.get(ROUGH, **CHUNKED)
    scheduler, proposer = scheduler_of(llm), worker_of(llm).proposer
    done: list[str] = []

    def noting(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            done.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, noted)

    for owner, name in (
        (proposer, "target_computed"),
        (scheduler, "update_from_output"),
        (proposer, "propose"),
    ):
        noting(owner, name)
    assert_same(generate(llm, *GROWING), reference_growing)
    steps = len(done) // 3
    assert steps > 10 and done == ["target_computed", "update_from_output", "propose"] * steps


def test_rests_from_drafting_are_counted(
    engines: Engines, reference_growing: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = engines.get(ROUGH, **CHUNKED)
    said: list[bool] = []

    def pays(rows: int, reading: Reading | None = None) -> bool:
        said.append(len(said) % 3 == 0)
        return said[-1]

    monkeypatch.setattr(worker_of(llm).proposer.drafter, "pays", pays)
    before = _counters(llm)
    assert_same(generate(llm, *GROWING), reference_growing)
    after = _counters(llm)
    assert after["rested_rounds"] - before["rested_rounds"] == said.count(False)
    assert after["rounds"] > before["rounds"] + 4


def _counters(llm: LLM) -> dict[str, int]:
    (known,) = llm.collective_rpc("statistics")
    return known["counters"]


def _shape(draft: DraftTokens) -> tuple[int, int]:
    return len(draft), int(draft.tree.depths.max())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"branching": 0}, 'key "branching" is 0; allowed: an integer from 1'),
        ({"branching": 65}, 'key "branching" is 65; allowed: .* to 64'),
        ({"depth": 0}, 'key "depth" is 0; allowed: an integer from 1 to 512'),
        ({"depth": 513}, 'key "depth" is 513; allowed: an integer from 1 to 512'),
        ({"pruning": "x"}, 'key "pruning" is \'x\'; allowed: "dynamic"'),
    ],
)
def test_wrong_changes_of_drafting_change_nothing(
    engines: Engines, reference: list[Answer], change: dict[str, Any], says: str
) -> None:
    llm = engines.get(ROUGH, **CHUNKED)
    drafter = worker_of(llm).proposer.drafter
    with pytest.raises(ValueError, match=says):
        llm.collective_rpc("set_drafting", kwargs=change)
    assert worker_of(llm).proposer.drafter is drafter
    assert generate(llm, PROMPTS[:2], PARAMS[:2]) == reference[:2]
