# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Drafts from earlier occurrences, against a search by hand."""

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st

from vllm_subspec.core.lookup import lookup

texts = st.lists(st.integers(0, 3), min_size=1, max_size=40)
sizes = st.integers(1, 5)


def occurrences(text: list[int], shortest: int, longest: int) -> list[tuple[int, int]]:
    """(tokens that match, place of the last of them), the best first."""
    found = []
    for end in range(len(text) - 1):
        n = 0
        while n < longest and n <= end and text[end - n] == text[-1 - n]:
            n += 1
        if n >= shortest:
            found.append((n, end))
    return sorted(found, reverse=True)


def as_it_is(confidence: npt.ArrayLike) -> npt.NDArray[np.float64]:
    return np.asarray(confidence, np.float64)


def path(draft: object, node: int) -> list[int]:
    tree = draft.tree  # type: ignore[attr-defined]
    tokens: list[int] = []
    while node >= 0:
        tokens.append(int(tree.tokens[node]))
        node = int(tree.parents[node])
    return tokens[::-1]


@given(texts, sizes, sizes, sizes, st.integers(1, 4), st.integers(1, 12))
def test_every_path_follows_an_occurrence(
    text: list[int], shortest: int, more: int, depth: int, branching: int, limit: int
) -> None:
    longest = shortest + more
    draft = lookup(np.array(text, np.int32), shortest, longest, depth, branching, limit, as_it_is)
    expected = [text[end + 1 : end + 1 + depth] for _, end in occurrences(text, shortest, longest)]
    assert len(draft) <= limit
    assert bool(expected) == bool(len(draft))
    for node in range(len(draft)):
        found = path(draft, node)
        assert any(each[: len(found)] == found for each in expected)
    if expected:
        best = min(len(expected[0]), limit)
        assert list(draft)[:best] == expected[0][:best], "the best occurrence comes first"
        assert (draft.tree.parents[:best] == np.arange(-1, best - 1)).all()
    siblings = set(zip(draft.tree.parents.tolist(), list(draft), strict=True))
    assert len(siblings) == len(draft), "no child twice"
    assert ((draft.confidence > 0) & (draft.confidence < 1)).all()


@given(texts, sizes, sizes)
def test_one_continuation_is_a_chain(text: list[int], shortest: int, depth: int) -> None:
    draft = lookup(np.array(text, np.int32), shortest, shortest, depth, 1, 64, as_it_is)
    assert draft.tree.is_chain
    assert len(draft) <= depth


def test_longer_matches_are_trusted_more() -> None:
    text = np.array([1, 2, 3, 7, 9, 3, 8, 1, 2, 3])
    draft = lookup(text, 1, 3, 2, 2, 8, as_it_is)
    assert list(draft) == [7, 9, 8, 1]
    assert draft.tree.parents.tolist() == [-1, 0, -1, 2]
    assert draft.confidence[0] > draft.confidence[2]
    first, second, other, last = draft.confidence
    probable = [first, first * second, (1 - first) * other, (1 - first) * other * last]
    np.testing.assert_allclose(draft.tree.scores, probable, rtol=1e-6)


def test_nothing_occurred_before() -> None:
    assert len(lookup(np.array([1, 2, 3]), 1, 5, 3, 3, 9, as_it_is)) == 0
    assert len(lookup(np.array([4]), 1, 5, 3, 3, 9, as_it_is)) == 0
