# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Invariant 6: a request at its limit, aborted or preempted changes nothing for its neighbours."""

from typing import Any

import pytest
from vllm import SamplingParams

from tests.engine.helpers import (
    ROUGH,
    Answer,
    Batch,
    Engines,
    assert_trees_were_tried,
    draft_counts,
    generate,
    greedy,
    metric,
    scheduler_of,
    source_prompts,
    worker_of,
)

LENGTH = 224
TIGHT: dict[str, Any] = {
    "max_model_len": LENGTH,
    "max_num_batched_tokens": 128,
    "max_num_seqs": 10,
}
DEPTH, NODES = ROUGH["depth"], ROUGH["num_speculative_tokens"]

Case = tuple[list[list[int]], list[SamplingParams]]

# Every second one is cut at max_model_len, at different times.
CUT: Case = (
    source_prompts(12, shortest=140, longest=LENGTH - 20),
    [greedy(500 if i % 2 else 40) for i in range(12)],
)
MANY: Case = (source_prompts(24, shortest=1, longest=180), [greedy(32)] * 24)
UNEVEN: Case = (
    source_prompts(20, shortest=5, longest=120),
    [greedy(5 + 7 * i % 43) for i in range(20)],
)
# All of them begin at once, even where the budget is small.
SHORT: Case = (source_prompts(10, shortest=1, longest=6), [greedy(24)] * 10)
GROWING: Case = (
    source_prompts(10, shortest=30, longest=90),
    [greedy(80 - 5 * (i % 4)) for i in range(10)],
)


@pytest.fixture(scope="module", autouse=True)
def references(engines: Engines) -> dict[str, list[Answer]]:
    cases = {"cut": CUT, "many": MANY, "uneven": UNEVEN, "short": SHORT, "growing": GROWING}
    return {name: engines.reference(*case, **TIGHT) for name, case in cases.items()}


def test_max_model_len_beside_others(engines: Engines, references: dict[str, list[Answer]]) -> None:
    """Requests near max_model_len draft what they can still verify, the others as much as ever."""
    llm = engines.get(ROUGH, **TIGHT)
    batch = Batch(llm, *CUT)
    near: list[tuple[int, int]] = []  # drafted, and room for
    beside: list[int] = []
    for _ in batch.steps():
        running = batch.running()
        room = {i: LENGTH - 1 - r.num_tokens for i, r in running.items()}
        drafted = {i: len(r.spec_token_ids) for i, r in running.items()}
        going_on = [i for i, r in running.items() if r.max_tokens - r.num_output_tokens > DEPTH]
        if min(room.values(), default=LENGTH) < NODES:
            near += [(drafted[i], room[i]) for i in going_on if room[i] < NODES]
            beside += [drafted[i] for i in going_on if room[i] >= NODES]

    assert [batch.answers[i] for i in range(12)] == references["cut"]
    for i in range(1, 12, 2):
        assert len(CUT[0][i]) + len(batch.answers[i].tokens) == LENGTH
    assert len(near) > 10
    assert all(drafted == max(room, 0) for drafted, room in near)
    assert len(beside) > 10
    assert set(beside) == {NODES}


def test_max_tokens_of_a_tree(engines: Engines, references: dict[str, list[Answer]]) -> None:
    """No deeper than what may still be emitted, but with more nodes than that."""
    llm = engines.get(ROUGH, **TIGHT)
    batch = Batch(llm, *UNEVEN)
    near: list[tuple[int, int, int]] = []  # levels, nodes, tokens left
    for _ in batch.steps():
        for request in batch.running().values():
            left = request.max_tokens - request.num_output_tokens
            draft = request.spec_token_ids
            if draft and left <= DEPTH:
                near.append((int(draft.tree.depths.max()), len(draft), left))
    assert [batch.answers[i] for i in range(20)] == references["uneven"]
    assert len(near) > 10
    assert all(levels == left - 1 for levels, _, left in near)
    assert sum(nodes > left for _, nodes, left in near) > 10


def test_a_budget_that_cuts_trees(engines: Engines, references: dict[str, list[Answer]]) -> None:
    """To their first nodes; the answers stay the same."""
    llm = engines.get(ROUGH, **TIGHT | {"max_num_batched_tokens": 40})
    runner = worker_of(llm).model_runner
    batch = Batch(llm, *SHORT)
    drafted: dict[str, list[int]] = {}
    cut = 0
    for _ in batch.steps():
        done = runner.verification
        for name, draft in zip(done.request_ids, done.drafts, strict=True):
            before = drafted.get(name, [])
            if len(draft):
                assert list(draft) == list(before[: len(draft)])
                cut += len(draft) < len(before) and not draft.tree.is_chain
        running = batch.running().values()
        drafted = {request.request_id: request.spec_token_ids for request in running}
    assert [batch.answers[i] for i in range(10)] == references["short"]
    assert cut > 10
    assert_trees_were_tried(draft_counts(llm), 30)


def test_a_cached_prompt_beside_others(engines: Engines) -> None:
    """Of which one token is left to compute, where the budget is smaller than a draft may be: a
    scheduler that pads it with a draft's worth of nothing would never come to it."""
    (prompt,) = source_prompts(1, 65, 65)
    others = source_prompts(3, 5, 20)
    params = [greedy(40)] * 4
    settings = TIGHT | {"max_num_batched_tokens": 48}
    expected = engines.reference([*others, prompt], params, **settings)
    llm = engines.get({**ROUGH, "num_speculative_tokens": 64, "depth": 24}, **settings)
    assert generate(llm, [prompt], params[:1]) == expected[3:]
    hits = metric(llm, "prefix_cache_hits")
    assert generate(llm, [*others, prompt], params) == expected
    assert metric(llm, "prefix_cache_hits") - hits == 64


def test_trees_of_hundreds_of_nodes(engines: Engines) -> None:
    """Verified in one pass each, greedy and sampled."""
    prompts = source_prompts(4, 40, 300)
    params = [
        SamplingParams(temperature=t, seed=1, max_tokens=80, ignore_eos=True) for t in (0, 1) * 2
    ]
    roomy: dict[str, Any] = {"max_model_len": 1024, "max_num_batched_tokens": 4096}
    reference = engines.reference(prompts, params, **roomy)
    options = {**ROUGH, "num_speculative_tokens": 512, "branching": 8, "depth": 48}
    llm = engines.get(options, **roomy)
    assert generate(llm, prompts, params) == reference
    counts = draft_counts(llm)
    assert counts.largest == 8 * 48
    assert counts.drafted > 128 * counts.drafts
    assert_trees_were_tried(counts, 5)


def test_aborts_in_flight(engines: Engines, references: dict[str, list[Answer]]) -> None:
    """Aborted while waiting, in prefill and with a draft; the others do not notice."""
    llm = engines.get(ROUGH, **TIGHT)
    scheduler = scheduler_of(llm)
    free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    batch = Batch(llm, *MANY)
    when: dict[str, set[int]] = {"waiting": set(), "prefill": set(), "drafted": set()}
    for _ in batch.steps():
        for i in range(len(MANY[0])):
            request = scheduler.requests.get(batch.id(i))
            if request is None:
                continue
            state = "drafted" if request.spec_token_ids else ""
            if request.num_computed_tokens < request.num_prompt_tokens:
                state = "prefill" if request.num_computed_tokens else "waiting"
            if state and len(when[state]) < 3 and i % 2:
                batch.abort(i)
                when[state].add(i)
                break

    assert all(when.values()), when
    aborted = set.union(*when.values())
    assert set(batch.answers) - aborted == set(range(24)) - aborted
    for i in set(range(24)) - aborted:
        assert batch.answers[i] == references["many"][i], f"request {i}"
    assert not scheduler.requests
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == free


def test_requests_join_and_leave(engines: Engines, references: dict[str, list[Answer]]) -> None:
    """Rows move within the batch as twice as many requests as rows come and go."""
    llm = engines.get(ROUGH, **TIGHT)
    counts = draft_counts(llm)
    assert generate(llm, *UNEVEN) == references["uneven"]
    assert_trees_were_tried(draft_counts(llm) - counts, 50)


def test_preempted_requests_resume(engines: Engines, references: dict[str, list[Answer]]) -> None:
    """With the same answers; their neighbours keep theirs."""
    llm = engines.get(ROUGH, **TIGHT | {"kv_cache_memory_bytes": 5 << 20})
    batch = Batch(llm, *GROWING)
    preempted: set[int] = set()
    for _ in batch.steps():
        preempted |= {i for i, r in batch.running().items() if r.num_preemptions}
    assert metric(llm, "num_preemptions") > 0
    assert 0 < len(preempted) < 10
    assert [batch.answers[i] for i in range(10)] == references["growing"]
    assert_trees_were_tried(draft_counts(llm), 50)
