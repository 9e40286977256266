# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""At temperature > 0 the output has the distribution that it has without speculation.

Hundreds of short continuations of each prompt are drawn with and without speculation and compared
by a permutation test (`distributions.p_value`). The drafts come from 2-bit substitutes, so that
many are rejected. How deep to draft depends on measured times; that is switched off, so that fixed
seeds give the same samples on every run.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.v1.sample import rejection_sampler

from tests.engine.distributions import Sequences, p_value
from tests.engine.helpers import (
    ROUGH,
    Engines,
    draft_counts,
    encode,
    generate,
    source_prompts,
    worker_of,
)

COUNT = 240  # samples for each prompt
LENGTH = 5
SETTINGS: dict[str, Any] = {"max_num_seqs": 120, "max_num_batched_tokens": 1024}
# Continued in few ways, so that this many samples show a small difference.
PROMPTS = [
    encode("x = [0, 0, 0, 0,"),
    encode("if a is None:\n    return None\nif b is None:\n"),
]
# The tokens that most often continue the prompts.
FREQUENT = [*encode(" 0"), *encode(":")]

Params = dict[str, Any]

GREEDY: Params = {"temperature": 0}
ALL: dict[str, list[Params]] = {
    # Requests take these in turn; each is then compared by itself.
    "temperature 0.3": [{"temperature": 0.3}],
    "temperature 0.6": [{"temperature": 0.6}],
    "temperature 1": [{}],
    "top_k": [{"top_k": 3}],
    "top_p": [{"top_p": 0.7}],
    "top_k and top_p": [{"temperature": 0.8, "top_k": 20, "top_p": 0.9}],
    "min_tokens": [{"min_tokens": 3, "stop_token_ids": FREQUENT}],
    "presence_penalty": [{"presence_penalty": 1.5}],
    "frequency_penalty": [{"frequency_penalty": 1.5}],
    "repetition_penalty": [{"repetition_penalty": 1.5}],
    "bad_words": [{"bad_words": [" 0, 0", " b"]}],
    "allowed_token_ids": [{"allowed_token_ids": sorted(set(encode("if a b: is None [0, 1],")))}],
    "all together": [
        {
            "temperature": 0.8,
            "top_k": 50,
            "top_p": 0.95,
            "min_tokens": 2,
            "stop_token_ids": FREQUENT,
            "presence_penalty": 0.5,
            "frequency_penalty": 0.5,
            "repetition_penalty": 1.2,
            "bad_words": [" 1", " 0, 0"],
        }
    ],
    "seed": [{"seed": 0}],
    "greedy and random": [GREEDY, {}],
    "mixed": [GREEDY, {"top_k": 3}, {"seed": 0}, {"temperature": 0.6, "presence_penalty": 1.0}],
}


def sample(llm: LLM, name: str, seed: int) -> list[Sequences]:
    """For each prompt and each entry of ``ALL[name]`` what ``llm`` says; ``seed`` decides it."""
    torch.manual_seed(seed)
    kinds = ALL[name]
    params, prompts = [], []
    for prompt in PROMPTS:
        for i in range(COUNT):
            given = {"temperature": 1.0, **kinds[i % len(kinds)]}
            if "seed" in given:
                given["seed"] = seed * COUNT + i
            params.append(SamplingParams(max_tokens=LENGTH, **given))
            prompts.append(prompt)
    out = [answer.tokens for answer in generate(llm, prompts, params)]
    return [
        out[p * COUNT + kind : (p + 1) * COUNT : len(kinds)]
        for p in range(len(PROMPTS))
        for kind in range(len(kinds))
    ]


@pytest.fixture(scope="module")
def plain(engines: Engines) -> dict[str, list[Sequences]]:
    """Samples without speculation."""
    llm = engines.get(None, **SETTINGS)
    return {name: sample(llm, name, seed=1) for name in ALL}


@pytest.fixture(scope="module")
def speculative(engines: Engines, plain: dict[str, list[Sequences]]) -> LLM:
    return engines.get(ROUGH, **SETTINGS)


@pytest.fixture
def timeless(speculative: LLM) -> Iterator[LLM]:
    """The engine with drafts whose depth does not depend on the clock."""
    drafter = worker_of(speculative).proposer.drafter
    drafter._stream.manual_seed(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drafter.depth, "observe_round", lambda done: None)
        yield speculative


@pytest.fixture(scope="module")
def found() -> dict[str, float]:
    """p-values by setting."""
    return {}


@pytest.mark.parametrize("name", ALL)
def test_distribution_is_the_targets(
    timeless: LLM, plain: dict[str, list[Sequences]], found: dict[str, float], name: str
) -> None:
    before = draft_counts(timeless)
    samples = sample(timeless, name, seed=2)
    counts = draft_counts(timeless) - before
    assert counts.accepted > 100 and counts.rejected > 100
    found[name] = p_value(samples, plain[name])
    # On another CPU the same seeds are other samples, and each right setting has p <= 0.01 there
    # with probability 0.01: see the next test.
    assert found[name] > 0.001
    for kind, params in enumerate(ALL[name]):
        if params is GREEDY:
            for p in range(len(PROMPTS)):
                group = p * len(ALL[name]) + kind
                assert set(samples[group]) == set(plain[name][group])
                assert len(set(samples[group])) == 1


def test_p_values_are_those_of_no_difference(found: dict[str, float]) -> None:
    if len(found) < len(ALL):
        pytest.skip("needs the p-values of all settings")
    print({name: round(p, 3) for name, p in found.items()})
    assert sum(p > 0.01 for p in found.values()) >= len(ALL) - 2


def test_settings_matter(plain: dict[str, list[Sequences]]) -> None:
    """Each setting changes what is sampled here, so that ignoring it in one engine would show."""
    for name in ALL:
        if name not in ("temperature 1", "seed") and len(ALL[name]) == 1:
            assert p_value(plain[name], plain["temperature 1"]) < 0.001, name


def test_power_stock_sampler(
    timeless: LLM, plain: dict[str, list[Sequences]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's own CPU form of the expand kernel samples something else, and the test sees it."""
    kernel = rejection_sampler.expand_kernel
    monkeypatch.setattr(kernel, "_impl", kernel._impl.__wrapped__)
    name = "temperature 0.6"
    assert p_value(sample(timeless, name, seed=2), plain[name]) < 0.001


def test_power_wrong_draft_probabilities(
    timeless: LLM, plain: dict[str, list[Sequences]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drafts that were not drawn from the distribution handed over are seen."""
    runner = worker_of(timeless).model_runner
    original = runner._get_spec_decode_draft_probs

    def uniform(metadata: Any) -> torch.Tensor | None:
        probabilities = original(metadata)
        return None if probabilities is None else torch.full_like(probabilities, 1 / 4096)

    monkeypatch.setattr(runner, "_get_spec_decode_draft_probs", uniform)
    name = "temperature 0.6"
    assert p_value(sample(timeless, name, seed=2), plain[name]) < 0.001


def test_draft_probabilities_are_used(timeless: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without them every draft counts as certain: as right, but accepted less often."""
    name = "temperature 1"

    def acceptance() -> float:
        before = draft_counts(timeless)
        sample(timeless, name, seed=3)
        counts = draft_counts(timeless) - before
        return counts.accepted / counts.drafted

    with_probabilities = acceptance()
    runner = worker_of(timeless).model_runner
    monkeypatch.setattr(runner, "_get_spec_decode_draft_probs", lambda metadata: None)
    assert with_probabilities > 1.1 * acceptance()


def test_seed_repeats_alone_and_in_a_batch(speculative: LLM) -> None:
    """Also when its prompt is computed in chunks; drafts are as deep as the clock says."""
    prompts = source_prompts(6, 40, 400)
    seeded = [
        SamplingParams(temperature=1.0, top_p=0.95, seed=7 + i, max_tokens=40, ignore_eos=True)
        for i in range(len(prompts))
    ]
    before = draft_counts(speculative)
    alone = [
        generate(speculative, [prompt], [params])[0].tokens
        for prompt, params in zip(prompts, seeded, strict=True)
    ]
    counts = draft_counts(speculative) - before
    assert counts.accepted and counts.rejected

    neighbours = source_prompts(12, 30, 400)
    params = [SamplingParams(temperature=0.9, max_tokens=10 + 3 * i) for i in range(12)]
    batch = generate(speculative, [*neighbours, *prompts], [*params, *seeded])
    assert sum(map(len, [*neighbours, *prompts])) > 2 * SETTINGS["max_num_batched_tokens"]
    assert [answer.tokens for answer in batch[len(neighbours) :]] == alone
    assert len(set(alone)) == len(alone)


@pytest.mark.parametrize("params", [{"min_p": 0.1}, {"logit_bias": {5: 1.0}}])
def test_parameters_without_support_are_refused(speculative: LLM, params: Params) -> None:
    with pytest.raises(VLLMValidationError, match="min_p and logit_bias .* not yet supported"):
        generate(speculative, PROMPTS[:1], [SamplingParams(max_tokens=2, **params)])
    assert generate(speculative, PROMPTS[:1], [SamplingParams(max_tokens=2)])[0].tokens
