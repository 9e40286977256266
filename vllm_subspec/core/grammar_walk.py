# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Taking a grammar through a drafted tree: which nodes it accepts, and what may follow each.

A grammar is an automaton that accepts tokens one after the other and can take back the last ones.
The walk is depth first, so that the grammar goes back no further than to the last fork.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from vllm_subspec.core.tree import TokenTree

ROOT = -1


class Grammar(Protocol):
    """What is asked of a request's grammar; vLLM's backends for structured output have it."""

    def accept_tokens(self, request_id: str, tokens: list[int], /) -> bool:
        """Go on by ``tokens``; False if it cannot. It may log a refusal as an error."""

    def validate_tokens(self, tokens: list[int], /) -> list[int]:
        """The longest prefix that would be accepted, up to the token that ends the grammar.

        Refuses in silence and changes nothing.
        """

    def rollback(self, num_tokens: int, /) -> None:
        """Take back the last ``num_tokens`` accepted, at least 1."""

    def is_terminated(self) -> bool:
        """Whether an end token was accepted, after which no token is constrained."""

    def fill_bitmask(self, bitmask: torch.Tensor, index: int, /) -> None:
        """Set row ``index`` of ``bitmask`` [rows, words] int32 to the tokens that may follow."""


def walk(
    tree: TokenTree, grammar: Grammar, request_id: str, visit: Callable[[int], None]
) -> npt.NDArray[np.int64]:
    """Take ``grammar`` once to the root and to each node that it accepts.

    A node is accepted where a chain of the tokens on its path would be, hence not below a node
    that is refused or that ends the grammar. The grammar is left as it was found, also when
    something raises.

    Args:
        request_id: for the grammar's log.
        visit: called with `ROOT`, then with each accepted node, its parent before it, while the
            grammar is in the state after that node's path. It must leave the state alone.

    Returns:
        [accepted] the accepted nodes, ascending.
    """
    tokens, depths = tree.tokens.tolist(), tree.depths.tolist()
    children = _children(tree)
    accepted: list[int] = []
    taken = 0  # tokens of the tree that the grammar stands after
    try:
        visit(ROOT)
        pending = [node for node in children[ROOT] if grammar.validate_tokens([tokens[node]])]
        while pending:
            node = pending.pop()
            if taken >= depths[node]:
                grammar.rollback(taken - depths[node] + 1)
                taken = depths[node] - 1
            # Asked for from here, with this node before it: a grammar that allows nothing but its
            # end validates no token at all, yet the end as part of a longer list.
            valid = [
                child
                for child in children[node]
                if len(grammar.validate_tokens([tokens[node], tokens[child]])) == 2
            ]
            if not grammar.accept_tokens(request_id, [tokens[node]]):
                continue
            taken += 1
            visit(node)
            accepted.append(node)
            pending += valid
    finally:
        if taken:
            grammar.rollback(taken)
    return np.sort(np.array(accepted, np.int64))


def valid_nodes(tree: TokenTree, grammar: Grammar, request_id: str) -> npt.NDArray[np.int64]:
    """[valid] the nodes whose whole path ``grammar`` accepts, ascending; their parents are among
    them.
    """
    return walk(tree, grammar, request_id, lambda node: None)


def fill_masks(tree: TokenTree, grammar: Grammar, request_id: str, masks: torch.Tensor) -> None:
    """Say which tokens may follow the root and each node, given the path to it.

    Nothing is forbidden after the end of the grammar. A refused node, which nothing can reach, as
    its parent's mask forbids it, gets that mask.

    Args:
        masks: [1 + n, words] int32, one bit for each token; row 0 is the root's.
    """

    def fill(node: int) -> None:
        if grammar.is_terminated():
            masks[1 + node].fill_(-1)
        else:
            grammar.fill_bitmask(masks, 1 + node)

    accepted = walk(tree, grammar, request_id, fill)
    for node in np.setdiff1d(np.arange(len(tree)), accepted).tolist():
        masks[1 + node] = masks[1 + int(tree.parents[node])]


def best_path(tree: TokenTree) -> npt.NDArray[np.int64]:
    """[depth] the nodes from the root down that are each the best of their siblings.

    Siblings stand in the tree in the order of their ranks.
    """
    path: list[int] = []
    tip = ROOT
    for node, parent in enumerate(tree.parents.tolist()):
        if parent == tip:
            path.append(node)
            tip = node
    return np.array(path, np.int64)


def _children(tree: TokenTree) -> list[list[int]]:
    """The children of each node; the last list, which `ROOT` also indexes, has the root's."""
    children: list[list[int]] = [[] for _ in range(len(tree) + 1)]
    for node, parent in enumerate(tree.parents.tolist()):
        children[parent].append(node)
    return children
