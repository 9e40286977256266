# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Log probabilities are those of the target, on accepted paths and at their ends alike.

The same numbers computed in passes of other shapes: float32 rounding, hence `TOLERANCE`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
from vllm import LLM, RequestOutput, SamplingParams
from vllm.logprobs import Logprob

from tests.engine.helpers import (
    ROUGH,
    DraftCounts,
    Engines,
    assert_trees_were_tried,
    draft_counts,
    encode,
    greedy,
    source_prompts,
)

TOLERANCE = 2e-4
PROMPTS = source_prompts(12, 5, 150)
GREEDY = [greedy(40, logprobs=5, prompt_logprobs=3)] * len(PROMPTS)
WANTED = [*encode("self"), *encode(":"), *encode(" 0")]


def sampled(seed: int, **settings: Any) -> SamplingParams:
    given = {"temperature": 0.9, "top_p": 0.95, "max_tokens": 40, "min_tokens": 40, **settings}
    return SamplingParams(seed=seed, **given)


# As many of each as there are prompts: they stand in one batch.
SAMPLED = {
    "some": [sampled(i, logprobs=(0, 2, 5, None)[i % 4]) for i in range(12)],
    # Few tokens: each brings the whole vocabulary along.
    "all": [sampled(i, logprobs=-1, max_tokens=5, min_tokens=5) for i in range(12)],
    "wanted": [sampled(i, logprob_token_ids=WANTED[: 1 + i % 3]) for i in range(12)],
    "penalties": [sampled(i, logprobs=3, repetition_penalty=1.3, top_k=30) for i in range(12)],
}
SETTINGS: dict[str, Any] = {"max_num_batched_tokens": 256, "max_logprobs": -1}

Position = dict[int, Logprob] | None


class Answered(NamedTuple):
    outputs: list[RequestOutput]
    counts: DraftCounts


def ask(
    llm: LLM, prompts: Sequence[list[int]], params: Sequence[SamplingParams]
) -> list[RequestOutput]:
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    return llm.generate(asked, list(params), use_tqdm=False)


def answered(llm: LLM, params: Sequence[SamplingParams]) -> Answered:
    before = draft_counts(llm)
    outputs = ask(llm, PROMPTS, params)
    return Answered(outputs, draft_counts(llm) - before)


@pytest.fixture(scope="module")
def speculative(engines: Engines) -> dict[str, Answered]:
    llm = engines.get(ROUGH, **SETTINGS)
    return {name: answered(llm, params) for name, params in {"greedy": GREEDY, **SAMPLED}.items()}


@pytest.fixture(scope="module")
def plain(engines: Engines, speculative: dict[str, Answered]) -> dict[str, list[RequestOutput]]:
    llm = engines.get(None, **SETTINGS)
    return {name: ask(llm, PROMPTS, asked) for name, asked in {"greedy": GREEDY, **SAMPLED}.items()}


def assert_same(mine: Position, other: Position) -> None:
    if mine is None or other is None:
        assert mine is other
        return
    shared = mine.keys() & other.keys()
    for token in shared:
        assert mine[token].logprob == pytest.approx(other[token].logprob, abs=TOLERANCE)
        assert mine[token].decoded_token == other[token].decoded_token
    # A token may be missing on one side only where it ties with the last one listed.
    least = min(entry.logprob for entry in other.values())
    for token in mine.keys() - shared:
        assert mine[token].logprob == pytest.approx(least, abs=TOLERANCE)
    by_rank = [
        sorted((entry.rank, entry.logprob) for entry in side.values()) for side in (mine, other)
    ]
    assert len(by_rank[0]) == len(by_rank[1])
    for (_, a), (_, b) in zip(*by_rank, strict=True):
        assert a == pytest.approx(b, abs=TOLERANCE)


def assert_same_outputs(mine: RequestOutput, other: RequestOutput) -> list[int]:
    """Tokens, and what is said about each; returns the tokens' ranks."""
    (a,), (b,) = mine.outputs, other.outputs
    assert list(a.token_ids) == list(b.token_ids)
    if a.logprobs is None or b.logprobs is None:
        assert a.logprobs is b.logprobs
        return []
    assert len(a.logprobs) == len(a.token_ids) == len(b.logprobs)
    for token, x, y in zip(a.token_ids, a.logprobs, b.logprobs, strict=True):
        assert token in x and len(x) == len(y)
        assert x[token].rank == y[token].rank
        assert_same(x, y)
    if a.cumulative_logprob is not None:
        assert a.cumulative_logprob == pytest.approx(b.cumulative_logprob, abs=40 * TOLERANCE)
    return [step[token].rank for token, step in zip(a.token_ids, a.logprobs, strict=True)]


def test_greedy(speculative: dict[str, Answered], plain: dict[str, list[RequestOutput]]) -> None:
    assert_trees_were_tried(speculative["greedy"].counts, 20)
    for mine, other in zip(speculative["greedy"].outputs, plain["greedy"], strict=True):
        assert set(assert_same_outputs(mine, other)) == {1}
        assert all(len(step) == 5 for step in mine.outputs[0].logprobs or [{}])


def test_prompt(speculative: dict[str, Answered], plain: dict[str, list[RequestOutput]]) -> None:
    for mine, other in zip(speculative["greedy"].outputs, plain["greedy"], strict=True):
        assert mine.prompt_logprobs is not None and other.prompt_logprobs is not None
        assert len(mine.prompt_logprobs) == len(mine.prompt_token_ids or ())
        for x, y in zip(mine.prompt_logprobs, other.prompt_logprobs, strict=True):
            assert_same(x, y)


@pytest.mark.parametrize("name", SAMPLED)
def test_sampled(
    speculative: dict[str, Answered], plain: dict[str, list[RequestOutput]], name: str
) -> None:
    assert_trees_were_tried(speculative[name].counts, 4 if name == "all" else 20)
    ranks = set()
    for mine, other in zip(speculative[name].outputs, plain[name], strict=True):
        ranks.update(assert_same_outputs(mine, other))
    assert len(ranks) > 2  # not all of them the most likely token


@pytest.mark.parametrize("mode", ["processed_logprobs", "processed_logits", "raw_logits"])
def test_other_modes(engines: Engines, mode: str) -> None:
    """After penalties, temperature and limits; or before the softmax."""
    params = [
        sampled(i, logprobs=3, repetition_penalty=1.2, top_k=30) if i % 3 else GREEDY[0]
        for i in range(12)
    ]
    found = answered(engines.get(ROUGH, **SETTINGS, logprobs_mode=mode), params)
    assert_trees_were_tried(found.counts, 20)
    expected = ask(engines.get(None, **SETTINGS, logprobs_mode=mode), PROMPTS, params)
    for mine, other in zip(found.outputs, expected, strict=True):
        assert_same_outputs(mine, other)
