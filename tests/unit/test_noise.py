# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""The noise of sampled requests: vLLM's own, Gumbel distributed, known before its tokens are."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm import _custom_ops as ops
from vllm.platforms import current_platform

from vllm_subspec.core.noise import SeedStream, gumbel

# SplitMix64 of 0, 1, 2 and 3, each the first output of a generator of that state.
FIRST_OUTPUTS = [0xE220A8397B1DCDAF, 0x910A2DEC89025CC1, 0x975835DE1C9756CE, 0x1D0B14E4DB018FED]


def some_seeds(count: int) -> torch.Tensor:
    """As a request's generator draws them, and the ends of their range."""
    drawn = torch.randint(0, 2**31, (count - 2,), generator=torch.Generator().manual_seed(3))
    return torch.cat([torch.tensor([0, 2**31 - 1]), drawn])


def split_mix(state: int) -> int:
    """SplitMix64's output function, in Python's integers."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = (state ^ (state >> shift)) * factor % 2**64
    return state ^ (state >> 31)


def test_the_reference_is_split_mix() -> None:
    golden = 0x9E3779B97F4A7C15
    assert [split_mix((state + golden) % 2**64) for state in range(4)] == FIRST_OUTPUTS


def test_noise_is_that_of_the_formula() -> None:
    seeds = some_seeds(5)
    found = gumbel(seeds, 40)
    assert found.dtype == torch.float64 and found.shape == (5, 40)
    for row, seed in zip(found.tolist(), seeds.tolist(), strict=True):
        for token, value in enumerate(row):
            key = (split_mix(seed) + (token + 1) * 0x9E3779B97F4A7C15) % 2**64
            uniform = ((split_mix(key) >> 11) + 0.5) / 2**53
            assert value == pytest.approx(-math.log(-math.log(uniform)), rel=1e-12, abs=1e-12)


@pytest.mark.skipif(not current_platform.is_cpu(), reason="an operation of vLLM's CPU build")
@pytest.mark.parametrize("spread", [0.0, 1.0, 8.0])
@pytest.mark.parametrize("vocab", [7, 4096, 50_000])
def test_samples_are_those_of_vllms_operation(vocab: int, spread: float) -> None:
    assert ops  # registers the operation
    count = 4000 if vocab == 7 else 200
    seeds = some_seeds(count)
    noise = torch.randn(count, vocab, generator=torch.Generator().manual_seed(vocab))
    logits = spread * noise
    logits[1, : vocab // 2] = -torch.inf  # as top-k leaves them
    expected = torch.ops._C.fused_gumbel_argmax(logits.clone(), seeds)
    found = (logits + gumbel(seeds, vocab)).argmax(dim=1)
    assert torch.equal(found, expected.flatten())
    assert found.unique().numel() > min(vocab // 2, count // 20)


def test_the_distribution_is_gumbels() -> None:
    """Kolmogorov and Smirnov's largest distance, over tokens and over seeds."""
    for values in (gumbel(torch.tensor([11]), 100_000)[0], gumbel(torch.arange(100_000), 1)[:, 0]):
        ordered = values.sort().values
        exact = torch.exp(-torch.exp(-ordered))
        ranks = torch.arange(ordered.numel() + 1) / ordered.numel()
        distance = max((ranks[1:] - exact).max(), (exact - ranks[:-1]).max())
        assert distance * math.sqrt(ordered.numel()) < 1.95  # exceeded by 1 in 1000
        assert len(ordered.unique()) == ordered.numel()


def test_seeds_and_tokens_are_independent() -> None:
    """Also of neighbours: seeds that follow each other, tokens that follow each other."""
    uniform = torch.exp(-torch.exp(-gumbel(torch.arange(300), 300)))
    for first, second in (
        (uniform[1:], uniform[:-1]),
        (uniform[:, 1:], uniform[:, :-1]),
        (uniform[1:, :-1], uniform[:-1, 1:]),
    ):
        pair = torch.stack([first.flatten(), second.flatten()])
        assert abs(torch.corrcoef(pair)[0, 1]) < 4 / math.sqrt(pair.shape[1])


def test_argmax_draws_from_the_softmax() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -math.inf])
    count = 100_000
    drawn = (logits + gumbel(torch.arange(count), 5)).argmax(dim=1)
    seen = np.bincount(drawn, minlength=5)
    expected = torch.softmax(logits, 0).numpy() * count
    assert seen[4] == 0
    assert ((seen[:4] - expected[:4]) ** 2 / expected[:4]).sum() < 16.3  # 3 degrees, 1 in 1000


def vllms_draws(seed: int, count: int) -> list[int]:
    """As vLLM's CPU sampler draws one for every token."""
    generator = torch.Generator().manual_seed(seed)
    return [
        int(torch.randint(0, 2**31, (1,), generator=generator, dtype=torch.long).item())
        for _ in range(count)
    ]


@given(
    st.integers(0, 2**63 - 1),
    st.lists(st.tuples(st.sampled_from(["ahead", "advance"]), st.integers(0, 40)), max_size=20),
)
def test_looking_ahead_changes_no_seed(seed: int, calls: list[tuple[str, int]]) -> None:
    stream = SeedStream(torch.Generator().manual_seed(seed))
    expected = vllms_draws(seed, sum(count for _, count in calls) + 40)
    emitted = 0
    for call, count in calls:
        if call == "ahead":
            assert stream.ahead(count) == expected[emitted : emitted + count]
        else:
            stream.advance(count)
            emitted += count
    assert stream.ahead(3) == expected[emitted : emitted + 3]


def test_a_caller_cannot_change_the_seeds() -> None:
    stream = SeedStream(torch.Generator().manual_seed(1))
    stream.ahead(4).clear()
    assert stream.ahead(4) == vllms_draws(1, 4)


def test_seeds_fit_the_range_and_differ() -> None:
    seeds = SeedStream(torch.Generator().manual_seed(5)).ahead(10_000)
    assert 0 <= min(seeds) < 2**20 and 2**31 - 2**20 < max(seeds) < 2**31
    assert len(set(seeds)) > 9990
