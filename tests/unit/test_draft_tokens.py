# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""A scheduler cuts, stores and sends draft tokens; the tree goes along."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.trees import token_trees
from vllm_subspec.core.draft_tokens import DraftTokens
from vllm_subspec.core.tree import TokenTree


def assert_consistent(drafts: DraftTokens) -> None:
    assert list(drafts) == drafts.tree.tokens.tolist()
    assert drafts.confidence.shape == (len(drafts),)


@given(token_trees(), st.integers(0, 25))
def test_a_prefix_is_the_tree_of_the_first_nodes(tree: TokenTree, size: int) -> None:
    drafts = DraftTokens(tree, np.linspace(0, 1, len(tree)))
    head = drafts[:size]
    assert isinstance(head, DraftTokens)
    assert_consistent(head)
    assert head.tree.parents.tolist() == tree.parents[:size].tolist()
    assert head.confidence.tolist() == drafts.confidence[:size].tolist()


@given(token_trees(), st.data())
def test_select_keeps_every_kept_nodes_path(tree: TokenTree, data: st.DataObject) -> None:
    drafts = DraftTokens(tree, np.linspace(0, 1, len(tree)))
    chosen = {data.draw(st.integers(0, len(tree) - 1)) for _ in range(3)} if len(tree) else set()
    mask = tree.ancestor_mask()
    kept = np.flatnonzero(mask[sorted(chosen)].any(axis=0)) if chosen else np.zeros(0, int)
    part = drafts.select(kept)
    assert_consistent(part)
    for new, old in enumerate(kept):
        path = tree.tokens[np.flatnonzero(mask[old])]
        assert part.tree.tokens[np.flatnonzero(part.tree.ancestor_mask()[new])].tolist() == list(
            path
        )
    assert part.confidence.tolist() == drafts.confidence[kept].tolist()


def test_a_node_without_its_parent_is_refused() -> None:
    drafts = DraftTokens(TokenTree.chain([5, 6, 7], [0.9, 0.8, 0.7]), [0.9, 0.9, 0.9])
    with pytest.raises(ValueError, match="parent"):
        drafts.select(np.array([0, 2]))


@given(token_trees())
def test_it_survives_pickling(tree: TokenTree) -> None:
    drafts = pickle.loads(pickle.dumps(DraftTokens(tree, np.ones(len(tree)))))
    assert isinstance(drafts, DraftTokens)
    assert_consistent(drafts)
    assert drafts.tree.parents.tolist() == tree.parents.tolist()


def test_confidences_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="2 nodes"):
        DraftTokens(TokenTree.chain([5, 6], [0.9, 0.8]), [0.9])
