# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Log probabilities are those of the target, for accepted, recovered and bonus tokens alike.

The same numbers computed in passes of other shapes: float32 rounding, hence `TOLERANCE`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
from vllm import LLM, RequestOutput, SamplingParams
from vllm.logprobs import Logprob

from tests.engine.helpers import ROUGH, DraftCounts, Engines, draft_counts, greedy, source_prompts

TOLERANCE = 2e-4
PROMPTS = source_prompts(12, 5, 150)
GREEDY = [greedy(40, logprobs=5, prompt_logprobs=3)] * len(PROMPTS)
SAMPLED = [
    SamplingParams(temperature=0.9, top_p=0.95, logprobs=2, max_tokens=40, min_tokens=40)
] * len(PROMPTS)
SETTINGS: dict[str, Any] = {"max_num_batched_tokens": 256}

Position = dict[int, Logprob] | None


class Answered(NamedTuple):
    greedy: list[RequestOutput]
    sampled: list[RequestOutput]
    greedy_counts: DraftCounts
    sampled_counts: DraftCounts


def ask(
    llm: LLM, prompts: Sequence[list[int]], params: Sequence[SamplingParams]
) -> list[RequestOutput]:
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    return llm.generate(asked, list(params), use_tqdm=False)


@pytest.fixture(scope="module")
def speculative(engines: Engines) -> Answered:
    llm = engines.get(ROUGH, **SETTINGS)
    start = draft_counts(llm)
    first = ask(llm, PROMPTS, GREEDY)
    middle = draft_counts(llm)
    second = ask(llm, PROMPTS, SAMPLED)
    return Answered(first, second, middle - start, draft_counts(llm) - middle)


@pytest.fixture(scope="module")
def plain(engines: Engines, speculative: Answered) -> LLM:
    return engines.get(None, **SETTINGS)


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


def test_greedy(speculative: Answered, plain: LLM) -> None:
    assert speculative.greedy_counts.accepted and speculative.greedy_counts.rejected
    for mine, other in zip(speculative.greedy, ask(plain, PROMPTS, GREEDY), strict=True):
        (a,), (b,) = mine.outputs, other.outputs
        assert list(a.token_ids) == list(b.token_ids)
        assert a.logprobs is not None and b.logprobs is not None
        assert len(a.logprobs) == len(a.token_ids) == len(b.logprobs)
        for token, x, y in zip(a.token_ids, a.logprobs, b.logprobs, strict=True):
            assert x[token].rank == 1 and len(x) == 5
            assert_same(x, y)
        assert a.cumulative_logprob == pytest.approx(b.cumulative_logprob, abs=40 * TOLERANCE)


def test_prompt(speculative: Answered, plain: LLM) -> None:
    for mine, other in zip(speculative.greedy, ask(plain, PROMPTS, GREEDY), strict=True):
        assert mine.prompt_logprobs is not None and other.prompt_logprobs is not None
        assert len(mine.prompt_logprobs) == len(mine.prompt_token_ids or ())
        for x, y in zip(mine.prompt_logprobs, other.prompt_logprobs, strict=True):
            assert_same(x, y)


def test_sampled_by_teacher_forcing(speculative: Answered, plain: LLM) -> None:
    """Each sampled token's log probability, from one pass over prompt and output."""
    assert speculative.sampled_counts.accepted and speculative.sampled_counts.rejected
    texts = [
        [*prompt, *output.outputs[0].token_ids]
        for prompt, output in zip(PROMPTS, speculative.sampled, strict=True)
    ]
    forced = ask(plain, texts, [SamplingParams(max_tokens=1, prompt_logprobs=2)] * len(texts))
    ranks = set()
    for prompt, mine, other in zip(PROMPTS, speculative.sampled, forced, strict=True):
        (a,) = mine.outputs
        assert a.logprobs is not None and other.prompt_logprobs is not None
        for token, x, y in zip(
            a.token_ids, a.logprobs, other.prompt_logprobs[len(prompt) :], strict=True
        ):
            assert y is not None and token in x
            assert_same(x, y)
            ranks.add(x[token].rank)
    assert len(ranks) > 2  # not all of them the most likely token
