# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
import numpy as np
import pytest

from vllm_subspec.core.acceptance_model import AcceptanceModel


def test_prior_is_the_published_table_and_monotone() -> None:
    model = AcceptanceModel()
    assert model.estimate([0.9, 0.5, 0.3]) == pytest.approx([0.996, 0.789, 0.62])
    assert (np.diff(model.estimate(np.linspace(0, 1, 101))) >= 0).all()


def test_acceptance_follows_observations_in_their_bucket_only() -> None:
    rng = np.random.default_rng(0)
    model = AcceptanceModel()
    for _ in range(400):
        model.observe(np.full(8, 0.7), rng.random(8) < 0.3)
    assert model.estimate(0.7) == pytest.approx(0.3, abs=0.06)
    assert model.estimate(0.2) == pytest.approx(0.49)
    assert model.estimate(0.9) == pytest.approx(0.996)
    assert model.next_token == pytest.approx(0.3, abs=0.06)
    for _ in range(400):  # and forgets
        model.observe(np.full(8, 0.7), rng.random(8) < 0.9)
    assert model.estimate(0.7) == pytest.approx(0.9, abs=0.05)


def test_children_exclude_each_other_and_stand_in_their_order() -> None:
    model = AcceptanceModel()
    chances = model.children([[0.5, 0.9, 0.3], [0.1, 1.0, 1.0], [1.0, 1.0, 1.0]])
    refused = 1 - 0.789
    assert chances[0] == pytest.approx([0.789, refused * 0.996, refused * 0.004 * 0.62])
    assert chances[1] == pytest.approx(
        [0.21, 0.21, 0.79 * 0.0005 * 0.9995]
    )  # never above the first
    assert (chances.sum(axis=1) <= 1).all()


def test_next_token_counts_nodes_and_not_their_children() -> None:
    model = AcceptanceModel()
    for _ in range(400):  # of two nodes, one holds the token in its second child, one in none
        model.observe([0.5, 0.9, 0.5, 0.9], [False, True, False, False], [True, False, True, False])
    assert model.next_token == pytest.approx(0.5, abs=0.05)
    assert model.estimate([0.5, 0.9]) == pytest.approx([0.0, 0.5], abs=0.05)
