# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_subspec.core.tree import TokenTree


@st.composite
def trees(draw: st.DrawFn) -> TokenTree:
    size = draw(st.integers(0, 24))
    parents = [draw(st.integers(-1, i - 1)) for i in range(size)]
    # Few distinct factors, so that ties between scores are common.
    factors = [draw(st.sampled_from([1.0, 0.5, 0.25, 0.0, 0.9])) for _ in range(size)]
    scores: list[float] = []
    for parent, factor in zip(parents, factors, strict=True):
        scores.append((scores[parent] if parent >= 0 else 1.0) * factor)
    return TokenTree(np.arange(size) + 100, np.array(parents, int), np.array(scores, float))


def ancestors(tree: TokenTree, node: int) -> list[int]:
    """The node and its ancestors, walked one by one."""
    path = []
    while node >= 0:
        path.append(node)
        node = int(tree.parents[node])
    return path


@given(trees())
def test_depths_mask_and_chain_equal_a_walk(tree: TokenTree) -> None:
    size = len(tree)
    assert tree.depths.tolist() == [len(ancestors(tree, i)) for i in range(size)]
    expected = np.zeros((size, size), bool)
    for i in range(size):
        expected[i, ancestors(tree, i)] = True
    assert np.array_equal(tree.ancestor_mask(), expected)
    assert tree.is_chain == all(p == i - 1 for i, p in enumerate(tree.parents))


@given(trees(), st.integers(0, 26))
def test_prune_keeps_the_best_closed_under_parents(tree: TokenTree, limit: int) -> None:
    pruned = tree.prune(limit)
    ranked = sorted(range(len(tree)), key=lambda i: (-tree.scores[i], i))
    kept = sorted(ranked[:limit])
    assert (pruned.tokens - 100).tolist() == kept  # tokens are unique: they name the nodes
    assert pruned.scores.tolist() == tree.scores[kept].tolist()
    for new, old in enumerate(kept):
        parent = int(tree.parents[old])
        assert parent == -1 or parent in kept
        assert pruned.parents[new] == (-1 if parent == -1 else kept.index(parent))


def test_chain() -> None:
    chain = TokenTree.chain([7, 8, 9], [0.9, 0.9, 0.1])
    assert chain.is_chain
    assert chain.parents.tolist() == [-1, 0, 1]
    assert chain.depths.tolist() == [1, 2, 3]
    assert np.array_equal(chain.ancestor_mask(), np.tri(3, dtype=bool))
    dtypes = [array.dtype for array in (chain.tokens, chain.parents, chain.scores)]
    assert dtypes == [np.dtype(np.int32), np.dtype(np.int32), np.dtype(np.float32)]
    assert chain.prune(2).tokens.tolist() == [7, 8]
    assert len(TokenTree.chain([], [])) == 0


def test_immutable_and_independent_of_its_inputs() -> None:
    tokens = np.array([1, 2], np.int32)
    chain = TokenTree.chain(tokens, [0.5, 0.5])
    tokens[0] = 5
    assert chain.tokens[0] == 1
    with pytest.raises(ValueError, match="read-only"):
        chain.tokens[0] = 3


@pytest.mark.parametrize(
    ("parents", "scores", "message"),
    [
        ([0, 0], [0.5, 0.5], "node 0 has parent 0"),
        ([-1, 1], [0.5, 0.5], "node 1 has parent 1"),
        ([-2, 0], [0.5, 0.5], "node 0 has parent -2"),
        ([-1, 0], [0.5, 0.6], "node 1 has score 0.6"),
        ([-1, -1], [0.5, 1.1], "node 1 has score 1.1"),
        ([-1, 0], [0.5, -0.1], "node 1 has score -0.1"),
        ([-1, 0], [0.5, float("nan")], "node 1 has score nan"),
        ([-1], [0.5, 0.4], "of one length"),
        ([[-1, 0]], [[0.5, 0.4]], "of one length"),
    ],
)
def test_invalid_trees_are_refused(parents: list, scores: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenTree(np.zeros(2, np.int32), np.array(parents), np.array(scores))


def test_negative_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="limit"):
        TokenTree.chain([1], [0.5]).prune(-1)
