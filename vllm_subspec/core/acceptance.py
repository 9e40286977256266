# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Walking a verified tree: the emitted tokens are the target's own samples.

The target's pass gives, for the root and for every node, its distribution of the next token given
the prefix that ends there. One token is sampled from each, with the request's own parameters, and
the walk goes from the root to the child that holds the sampled token, from that child on with the
child's own sample, until no child matches; the last sample is emitted as well.

This is exact for greedy and for sampling, whatever the draft proposes. Which node the walk visits
next depends only on samples taken at its ancestors, so the sample of a visited node is a fresh
draw from the target's distribution given exactly the tokens emitted so far. Each sample is looked
at once, and what is emitted is that sample, never a token chosen because it matched. Samples of
nodes that are not visited are never looked at.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_subspec.core.tree import TokenTree


@dataclass(frozen=True, eq=False)
class Walks:
    """What was accepted of several rows' trees.

    Args:
        nodes: [accepted of all rows] int64 indices within their trees, row by row from the root
            down, hence ascending within a row.
        counts: [rows] int64 accepted nodes of each row.
        last: [rows] int64 the sample at the end of each walk: the correction of the draft, or the
            bonus below a leaf.
    """

    nodes: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    last: npt.NDArray[np.int64]

    @property
    def paths(self) -> list[npt.NDArray[np.int64]]:
        """For each row its accepted nodes."""
        return np.split(self.nodes, np.cumsum(self.counts)[:-1]) if self.counts.size else []


def walk_batch(trees: Sequence[TokenTree], sampled: npt.ArrayLike) -> Walks:
    """Walk each row's tree.

    Args:
        trees: one per row; an empty one accepts nothing.
        sampled: the rows' samples one after the other: of each row the token after its root, then
            the token after each of its n nodes, n + 1 in all.

    Raises:
        ValueError: ``sampled`` has another length, or two children of a node hold one token.
    """
    samples = np.asarray(sampled, np.int64)
    sizes = np.array([len(tree) for tree in trees], np.int64)
    if samples.shape != (sizes.sum() + sizes.size,):
        raise ValueError(
            f"{sizes.size} trees of {sizes.sum()} nodes need {sizes.sum() + sizes.size} samples, "
            f"not {samples.shape}"
        )
    roots = np.cumsum(sizes + 1) - sizes - 1  # a root and its nodes stand together in ``samples``
    rows = np.repeat(np.arange(sizes.size), sizes)
    none = np.zeros(0, np.int64)
    tokens = np.concatenate([none, *(tree.tokens for tree in trees)])
    local = np.concatenate([none, *(tree.parents for tree in trees)])
    places = np.arange(rows.size) + rows + 1  # of the nodes in ``samples``
    parents = np.full(samples.size, -1)
    parents[places] = roots[rows] + 1 + local
    accepted = np.ones(samples.size, np.bool_)  # a root is
    accepted[places] = samples[parents[places]] == tokens
    ancestors = parents  # the 2^k-th ancestor in round k (pointer jumping)
    while (live := ancestors >= 0).any():
        accepted[live] &= accepted[ancestors[live]]
        ancestors = np.where(live, ancestors[ancestors], -1)
    path = np.flatnonzero(accepted)
    follows = np.append(-1, path[:-1])
    if (path[(parents[path] >= 0) & (parents[path] != follows)]).size:
        raise ValueError("two children of a node hold the same token")
    counts = np.add.reduceat(accepted, roots, dtype=np.int64) - 1 if sizes.size else none
    ends = np.cumsum(counts + 1) - 1
    below = path[parents[path] >= 0]
    owner = np.repeat(np.arange(sizes.size), counts)
    return Walks(below - roots[owner] - 1, counts, samples[path[ends]])


def walk(tree: TokenTree, sampled: npt.ArrayLike) -> tuple[npt.NDArray[np.int64], int]:
    """The accepted nodes of one tree, from the root down, and the sample at the end of the walk.

    Args:
        sampled: [n + 1] the target's token after the root and after each node.

    Raises:
        ValueError: as `walk_batch`.
    """
    walks = walk_batch([tree], sampled)
    return walks.nodes, int(walks.last[0])


def verdicts(
    tree: TokenTree, path: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """What a walk tells `AcceptanceModel.observe` about the draft's confidence.

    Below the root and below each accepted node, the children were put to the test best first, up
    to the one accepted. Siblings stand in the tree in the order of their ranks.

    Args:
        path: the accepted nodes of ``tree``.

    Returns:
        nodes: [m] int64 the nodes tested, ascending.
        accepted: [m] whether each was accepted.
        first: [m] whether each is the best of its siblings.
    """
    on_path = np.zeros(len(tree) + 1, np.bool_)  # the last entry answers for parent -1, the root
    on_path[path] = True
    on_path[-1] = True
    taken = np.full(len(tree) + 1, len(tree))  # the child accepted below each node, else past all
    taken[tree.parents[path]] = path
    nodes = np.flatnonzero(on_path[tree.parents] & (np.arange(len(tree)) <= taken[tree.parents]))
    first = np.zeros(len(tree), np.bool_)
    first[np.unique(tree.parents, return_index=True)[1]] = True
    return nodes, on_path[nodes], first[nodes]
