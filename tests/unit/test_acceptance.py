# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.trees import token_trees
from vllm_subspec.core.acceptance import verdicts, walk, walk_batch
from vllm_subspec.core.tree import TokenTree


def follow(tree: TokenTree, sampled: list[int]) -> tuple[list[int], int]:
    """The walk, node by node."""
    at = -1
    path: list[int] = []
    while True:
        token = sampled[at + 1]
        children = [
            i for i in range(len(tree)) if tree.parents[i] == at and tree.tokens[i] == token
        ]
        if not children:
            return path, token
        (at,) = children
        path.append(at)


@st.composite
def verified(draw: st.DrawFn) -> tuple[TokenTree, list[int]]:
    tree = draw(token_trees())
    return tree, [draw(st.integers(0, 3)) for _ in range(len(tree) + 1)]


@given(st.lists(verified(), max_size=6))
def test_walk_equals_following_node_by_node(rows: list[tuple[TokenTree, list[int]]]) -> None:
    expected = [follow(tree, sampled) for tree, sampled in rows]
    batch = walk_batch([tree for tree, _ in rows], sum((sampled for _, sampled in rows), []))
    assert [path.tolist() for path in batch.paths] == [path for path, _ in expected]
    assert batch.counts.tolist() == [len(path) for path, _ in expected]
    assert batch.last.tolist() == [last for _, last in expected]
    for (tree, sampled), (path, last) in zip(rows, expected, strict=True):
        nodes, token = walk(tree, sampled)
        assert (nodes.tolist(), token) == (path, last)


@given(verified())
def test_tested_nodes_are_the_children_in_order_up_to_the_accepted(
    row: tuple[TokenTree, list[int]],
) -> None:
    tree, sampled = row
    path, _ = follow(tree, sampled)
    expected = []
    for parent in [-1, *path]:
        for rank, child in enumerate(np.flatnonzero(tree.parents == parent)):
            expected.append((int(child), child in path, rank == 0))
            if child in path:
                break
    nodes, accepted, first = verdicts(tree, np.array(path, int))
    got = list(zip(nodes.tolist(), accepted.tolist(), first.tolist(), strict=True))
    assert got == sorted(expected)


def test_of_a_chain_all_accepted_nodes_and_the_first_refused_are_tested() -> None:
    chain = TokenTree.chain([7, 8, 9, 7], [0.9] * 4)
    path, last = walk(chain, [7, 8, 1, 2, 3])
    assert (path.tolist(), last) == ([0, 1], 1)
    nodes, accepted, first = verdicts(chain, path)
    assert nodes.tolist() == [0, 1, 2]
    assert accepted.tolist() == [True, True, False]
    assert first.all()


def test_sampling_through_a_tree_has_the_target_s_distribution() -> None:
    """A target over 3 tokens whose distribution depends on the prefix; the texts that rounds with
    a fixed tree emit must be distributed as texts sampled token by token."""
    table = np.random.default_rng(0).dirichlet(np.ones(3) * 0.7, size=40)

    def given_prefix(prefix: tuple[int, ...]) -> np.ndarray:
        return table[int("1" + "".join(map(str, prefix)), 3)]

    #   root -> 0 -> 1 -> 2,  root -> 0 -> 0,  root -> 2 -> 2
    prefixes = [(0,), (2,), (0, 1), (0, 0), (2, 2), (0, 1, 2)]
    tree = TokenTree(
        np.array([p[-1] for p in prefixes]), np.array([-1, -1, 0, 0, 1, 2]), np.full(6, 0.5)
    )
    rng = np.random.default_rng(1)
    rounds, length = 40_000, 2
    draws = np.stack(
        [rng.choice(3, size=rounds, p=given_prefix(prefix)) for prefix in [(), *prefixes]], axis=1
    )
    walks = walk_batch([tree] * rounds, draws.ravel())
    counts = np.zeros((3, 3))
    for path, last in zip(walks.paths, walks.last, strict=True):
        text = [*tree.tokens[path].tolist(), int(last)][:length]
        while len(text) < length:  # the next round starts with the target itself
            text.append(int(rng.choice(3, p=given_prefix(tuple(text)))))
        counts[tuple(text)] += 1
    expected = np.array([[given_prefix(())[a] * given_prefix((a,))[b] for b in range(3)]
                         for a in range(3)]) * rounds  # fmt: skip
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert statistic < 26.1  # chi-squared, 8 degrees of freedom: exceeded once in a thousand


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match="need 2 samples"):
        walk(TokenTree.chain([1], [0.5]), [1])
    twins = TokenTree(np.array([4, 4]), np.array([-1, -1]), np.array([0.5, 0.5]))
    with pytest.raises(ValueError, match="same token"):
        walk(twins, [4, 0, 0])
