# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""At temperature > 0: a request with a seed gets the very text that it gets without speculation,
under every sampling parameter and whatever is drafted; a request without one is sampled from the
same distribution.

The distributions are compared by a permutation test (`distributions.p_value`) of hundreds of short
continuations of each prompt. What is drafted does not depend on measured times here, so that the
samples are the same on every run.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from vllm import LLM, SamplingParams

from tests.engine.distributions import Sequences, p_value
from tests.engine.helpers import (
    CHAIN,
    ROUGH,
    Answer,
    Batch,
    Engines,
    assert_chains_were_tried,
    assert_trees_were_tried,
    draft_counts,
    encode,
    generate,
    metric,
    source_prompts,
    worker_of,
)
from tests.engine.hierarchies import WAYS
from tests.engine.kinds import KINDS, Params, seeded
from vllm_subspec.core.acceptance import Walks, walk_batch
from vllm_subspec.core.noise import SeedStream
from vllm_subspec.core.tree import TokenTree
from vllm_subspec.engine import runner as runner_module

SETTINGS: dict[str, Any] = {"max_num_seqs": 120, "max_num_batched_tokens": 1024}
PROMPTS = source_prompts(21, 3, 120)


# Continued in few ways, so that the samples show a small difference.
FEW = [
    encode("x = [0, 0, 0, 0,"),
    encode("if a is None:\n    return None\nif b is None:\n"),
]
COUNT = 240  # samples of each
LENGTH = 5
UNSEEDED: dict[str, Params] = {
    "temperature 0.3": {"temperature": 0.3},
    "temperature 0.6": {"temperature": 0.6},
    "temperature 1": {"temperature": 1.0},
    # All of them likely, so that a dependence between the tokens of a text shows.
    "few tokens": {"temperature": 2.0, "top_k": 3},
}


def sample(llm: LLM, name: str) -> list[Sequences]:
    """For each prompt of `FEW` what ``llm`` says without a seed."""
    params = SamplingParams(max_tokens=LENGTH, **UNSEEDED[name])
    prompts = [prompt for prompt in FEW for _ in range(COUNT)]
    out = [answer.tokens for answer in generate(llm, prompts, [params] * len(prompts))]
    return [out[:COUNT], out[COUNT:]]


@pytest.fixture(scope="module")
def expected(engines: Engines) -> dict[str, list[Answer]]:
    """The seeded answers without speculation."""
    return {
        name: engines.reference(PROMPTS, seeded(name, len(PROMPTS)), **SETTINGS) for name in KINDS
    }


@pytest.fixture(scope="module")
def plain(engines: Engines, expected: dict[str, list[Answer]]) -> dict[str, list[Sequences]]:
    """Samples without speculation."""
    llm = engines.get(None, **SETTINGS)
    torch.manual_seed(1)
    return {name: sample(llm, name) for name in UNSEEDED}


@pytest.fixture
def trees(engines: Engines, plain: dict[str, list[Sequences]]) -> LLM:
    return engines.get(ROUGH, **SETTINGS)


@pytest.fixture
def fixed(trees: LLM) -> Iterator[LLM]:
    """The same samples, whatever was asked before."""
    restart(trees)
    yield trees


def restart(llm: LLM) -> None:
    """Requests without a seed get the same noise as after the last restart."""
    worker_of(llm).model_runner._unseeded.manual_seed(2)


@pytest.mark.parametrize("name", KINDS)
def test_seeded_text_is_that_without_speculation(
    trees: LLM, expected: dict[str, list[Answer]], name: str
) -> None:
    before = draft_counts(trees)
    answers = generate(trees, PROMPTS, seeded(name, len(PROMPTS)))
    different = [i for i in range(len(PROMPTS)) if answers[i] != expected[name][i]]
    assert not different, (answers[different[0]], expected[name][different[0]])
    if name != "top_k 1":  # all other tokens have probability 0: they are no candidates
        assert_trees_were_tried(draft_counts(trees) - before, 20)


def test_settings_matter(expected: dict[str, list[Answer]]) -> None:
    """Each setting changes the text, so that ignoring it in one engine would show."""
    for name in KINDS:
        if name not in ("temperature 1", "mixed"):
            pairs = zip(expected[name], expected["temperature 1"], strict=True)
            assert sum(mine.tokens != other.tokens for mine, other in pairs) >= 6, name


@pytest.mark.parametrize(
    "change",
    [
        {"branching": 1, "depth": 8},
        {"branching": 2, "depth": 3},
        {"branching": 16, "depth": 2},
        {"pruning": "dynamic"},
    ],
    ids=str,
)
def test_the_text_does_not_depend_on_the_draft(
    trees: LLM, expected: dict[str, list[Answer]], change: dict[str, Any]
) -> None:
    names = ["temperature 1", "mixed"]
    trees.collective_rpc("set_drafting", kwargs=change)
    answers = [generate(trees, PROMPTS, seeded(name, len(PROMPTS))) for name in names]
    trees.collective_rpc("set_drafting")
    assert answers == [expected[name] for name in names]


def test_the_draft_foresees_the_samples(fixed: LLM) -> None:
    """By their seeds: sampled text is accepted nearly as often as greedy text."""
    rates = []
    for temperature in (0.0, 1.0):
        before = draft_counts(fixed)
        params = SamplingParams(temperature=temperature, max_tokens=40, ignore_eos=True)
        generate(fixed, PROMPTS, [params] * len(PROMPTS))
        counts = draft_counts(fixed) - before
        rates.append(counts.accepted / counts.drafts)
    assert rates[1] > 0.7 * rates[0]


def test_alone_and_in_a_batch(trees: LLM) -> None:
    """Also when the prompt is computed in chunks, and while drafting is switched off and on."""
    prompts = source_prompts(6, 40, 400)
    asked = [
        SamplingParams(temperature=1.0, top_p=0.95, seed=7 + i, max_tokens=40, ignore_eos=True)
        for i in range(len(prompts))
    ]
    alone = [
        generate(trees, [prompt], [params])[0]
        for prompt, params in zip(prompts, asked, strict=True)
    ]
    neighbours = source_prompts(12, 30, 400)
    params = [SamplingParams(temperature=0.9, max_tokens=10 + 3 * i) for i in range(12)]
    batch = Batch(trees, [*neighbours, *prompts], [*params, *asked])
    assert sum(map(len, [*neighbours, *prompts])) > 2 * SETTINGS["max_num_batched_tokens"]
    for step in batch.steps():
        if step % 3 == 2:
            trees.collective_rpc("set_speculation", args=(step % 2 == 0,))
    trees.collective_rpc("set_speculation", args=(True,))
    assert [batch.answers[12 + i] for i in range(len(prompts))] == alone
    assert len(set(alone)) == len(alone)


def test_preempted_requests_get_the_same_text(engines: Engines) -> None:
    prompts = source_prompts(12, 40, 100)
    asked = [
        SamplingParams(temperature=0.9, seed=i, max_tokens=96, ignore_eos=True) for i in range(12)
    ]
    reference = engines.reference(prompts, asked, **SETTINGS)
    llm = engines.get(ROUGH, kv_cache_memory_bytes=6 << 20, enable_prefix_caching=False, **SETTINGS)
    assert generate(llm, prompts, asked) == reference
    assert metric(llm, "num_preemptions") > 0
    assert_trees_were_tried(draft_counts(llm), 50)


def test_several_samples_of_one_request(
    engines: Engines, plain: dict[str, list[Sequences]]
) -> None:
    def choices(llm: LLM, seed: int | None) -> list[list[tuple[int, ...]]]:
        params = SamplingParams(n=3, temperature=1.0, seed=seed, max_tokens=24, ignore_eos=True)
        asked = [{"prompt_token_ids": prompt} for prompt in PROMPTS[:6]]
        outputs = llm.generate(asked, params, use_tqdm=False)
        return [[tuple(choice.token_ids) for choice in o.outputs] for o in outputs]

    llm = engines.get(ROUGH, **SETTINGS)
    ours = choices(llm, 11)
    unseeded = choices(llm, None)
    for three in [*ours, *unseeded]:
        assert len(set(three)) == 3
    assert choices(llm, None) != unseeded
    assert choices(engines.get(None, **SETTINGS), 11) == ours


def test_without_a_seed_texts_differ(trees: LLM) -> None:
    """In one batch, and from one call to the next."""
    params = SamplingParams(temperature=1.0, max_tokens=24, ignore_eos=True)
    texts = [generate(trees, [PROMPTS[9]] * 8, [params] * 8) for _ in range(2)]
    assert len({answer.tokens for batch in texts for answer in batch}) == 16


@pytest.mark.parametrize("name", UNSEEDED)
def test_distribution_with_trees(fixed: LLM, plain: dict[str, list[Sequences]], name: str) -> None:
    before = draft_counts(fixed)
    samples = sample(fixed, name)
    assert_trees_were_tried(draft_counts(fixed) - before, 20)
    assert p_value(samples, plain[name]) > 0.01


def nodes_share_their_parents_seed(patch: pytest.MonkeyPatch) -> None:
    original = SeedStream.ahead
    patch.setattr(SeedStream, "ahead", lambda self, count: original(self, 1) * count)


def any_child_is_accepted(patch: pytest.MonkeyPatch) -> None:
    """A sample that some child holds counts as the first child's: the draft biases the text."""

    def walk(trees: list[TokenTree], sampled: np.ndarray) -> Walks:
        changed, row = np.array(sampled), 0
        for tree in trees:
            for parent in range(-1, len(tree)):
                children = tree.tokens[tree.parents == parent]
                if changed[row + 1 + parent] in children:
                    changed[row + 1 + parent] = children[0]
            row += len(tree) + 1
        walks = walk_batch(trees, changed)
        sampled[:] = changed
        return walks

    patch.setattr(runner_module, "walk_batch", walk)


@pytest.mark.parametrize(
    ("broken", "name"),
    [
        (nodes_share_their_parents_seed, "few tokens"),
        (any_child_is_accepted, "temperature 0.6"),
    ],
)
def test_power(
    fixed: LLM,
    plain: dict[str, list[Sequences]],
    monkeypatch: pytest.MonkeyPatch,
    broken: Callable[[pytest.MonkeyPatch], None],
    name: str,
) -> None:
    """Wrong couplings are seen in the distribution."""
    with monkeypatch.context() as patch:
        broken(patch)
        samples = sample(fixed, name)
    assert p_value(samples, plain[name]) < 0.001


def test_power_of_seeds(
    trees: LLM, expected: dict[str, list[Answer]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounds that begin with the same noise are too alike for the distribution of a few tokens,
    but not for seeded text."""
    with monkeypatch.context() as patch:
        patch.setattr(SeedStream, "advance", lambda self, count: None)
        answers = generate(trees, PROMPTS, seeded("temperature 1", len(PROMPTS)))
    pairs = zip(answers, expected["temperature 1"], strict=True)
    assert sum(mine != other for mine, other in pairs) > len(PROMPTS) // 2


@pytest.mark.parametrize("name", UNSEEDED)
@pytest.mark.parametrize("drafts", ["chain", "hierarchy"])
def test_distribution_with_chains(
    engines: Engines, plain: dict[str, list[Sequences]], drafts: str, name: str
) -> None:
    llm = engines.get(CHAIN if drafts == "chain" else WAYS["small-eagle"], **SETTINGS)
    restart(llm)
    before = draft_counts(llm)
    samples = sample(llm, name)
    assert_chains_were_tried(draft_counts(llm) - before, 20)
    assert p_value(samples, plain[name]) > 0.01


def test_seeded_text_with_chains(engines: Engines, expected: dict[str, list[Answer]]) -> None:
    llm = engines.get(CHAIN, **SETTINGS)
    for name in ("all together", "mixed"):
        before = draft_counts(llm)
        assert generate(llm, PROMPTS, seeded(name, len(PROMPTS))) == expected[name]
        assert_chains_were_tried(draft_counts(llm) - before, 20)
