# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Tensor parallelism: two ranks, which vLLM or Ray starts, against two without speculation, as
another split of the sums is another rounding."""

import importlib.util
from pathlib import Path

import pytest

from tests.engine import two_ranks
from tests.engine.helpers import assert_trees_were_tried

SPECULATING = ["drafting", "hierarchy"]
if importlib.util.find_spec("ray") is not None:
    SPECULATING.append("drafting, ray")


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stores")


@pytest.fixture(scope="module")
def outcomes(stores: Path) -> dict[str, two_ranks.Outcome]:
    """By way; all in one process, as each start of one imports vLLM again."""
    return two_ranks.run(["plain", *SPECULATING], stores, seconds=800)


@pytest.mark.parametrize("way", SPECULATING)
def test_answers_and_drafts(outcomes: dict[str, two_ranks.Outcome], way: str) -> None:
    two_ranks.assert_same_answers(outcomes[way], outcomes["plain"])
    two_ranks.assert_ranks_drafted_alike(outcomes[way])
    if way == "hierarchy":
        assert outcomes[way].counts.accepted > 50
    else:
        assert_trees_were_tried(outcomes[way].counts, 20)


def test_a_read_that_fails_on_one_rank_fails_the_pass(
    outcomes: dict[str, two_ranks.Outcome],
) -> None:
    """The other rank has read its share, but the sum of both is not the model's."""
    outcome = outcomes[two_ranks.FAULTY]
    assert outcome.failed == ["error", "error"]
    assert outcome.failures == [0, 1]
    assert outcome.after == outcomes["plain"].tokens[:4]


def test_each_rank_has_a_store(outcomes: dict[str, two_ranks.Outcome], stores: Path) -> None:
    """Ray's ranks find those that vLLM's have written."""
    assert {f.name.split(".")[-2] for f in stores.glob("*.store")} == {"rank0of2", "rank1of2"}
