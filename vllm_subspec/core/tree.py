# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""The drafted candidates of one request. A chain is a tree of branching 1."""

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, eq=False)
class TokenTree:
    """``n`` drafted tokens below the root. The root, the last emitted token, is not a node.

    Parents precede their children, and scores do not rise along a path: a cumulative probability
    is multiplied by at most 1 at each step. Both are checked, and ``prune`` relies on them.

    Args:
        tokens: [n] token ids; stored as int32, read-only like the other arrays.
        parents: [n] index of each node's parent, -1 for a child of the root; stored as int32.
        scores: [n] cumulative draft probability of the path from the root; stored as float32.

    Raises:
        ValueError: the arrays are not one-dimensional and of one length, a parent does not
            precede its child, or a score is above its parent's (above 1 for a child of the root),
            negative or not a number.
    """

    tokens: npt.NDArray[np.int32]
    parents: npt.NDArray[np.int32]
    scores: npt.NDArray[np.float32]

    def __post_init__(self) -> None:
        for name, dtype in (("tokens", np.int32), ("parents", np.int32), ("scores", np.float32)):
            array = np.array(getattr(self, name), dtype=dtype)
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        if self.tokens.ndim != 1 or not (
            self.tokens.shape == self.parents.shape == self.scores.shape
        ):
            raise ValueError(
                f"tokens, parents and scores must be one-dimensional and of one length, not "
                f"{self.tokens.shape}, {self.parents.shape} and {self.scores.shape}"
            )
        misplaced = (self.parents < -1) | (self.parents >= np.arange(len(self)))
        if misplaced.any():
            node = int(misplaced.argmax())
            raise ValueError(
                f"node {node} has parent {self.parents[node]}; a parent precedes its child"
            )
        bound = np.append(self.scores, np.float32(1.0))[self.parents]  # index -1: the root's 1
        wrong = ~((self.scores <= bound) & (self.scores >= 0))
        if wrong.any():
            node = int(wrong.argmax())
            raise ValueError(
                f"node {node} has score {self.scores[node]}; it must lie between 0 and its "
                f"parent's, {bound[node]}"
            )

    @classmethod
    def chain(cls, tokens: npt.ArrayLike, scores: npt.ArrayLike) -> Self:
        """A single path: ``tokens`` [n] in order, ``scores`` [n] their cumulative probabilities."""
        tokens = np.asarray(tokens, dtype=np.int32)
        parents = np.arange(-1, tokens.size - 1, dtype=np.int32)
        return cls(tokens, parents, np.asarray(scores, dtype=np.float32))

    def __len__(self) -> int:
        return self.tokens.size

    @property
    def is_chain(self) -> bool:
        """Whether every node is the child of the node before it."""
        return bool((self.parents == np.arange(-1, len(self) - 1)).all())

    @property
    def depths(self) -> npt.NDArray[np.int32]:
        """[n] distance of each node from the root: 1 for a child of the root."""
        depths = np.ones(len(self), np.int32)
        ancestors = self.parents  # the 2^k-th ancestor in round k (pointer jumping)
        while (live := ancestors >= 0).any():
            depths[live] += depths[ancestors[live]]
            ancestors = np.where(live, ancestors[ancestors], -1)
        return depths

    def ancestor_mask(self) -> npt.NDArray[np.bool_]:
        """[n, n] mask of attention within the tree: row i is true at i and at its ancestors."""
        mask = np.eye(len(self), dtype=np.bool_)
        ancestors = self.parents  # as in ``depths``: row i covers 2^k generations in round k
        while (live := ancestors >= 0).any():
            mask[live] |= mask[ancestors[live]]
            ancestors = np.where(live, ancestors[ancestors], -1)
        return mask

    def best(self, limit: int) -> npt.NDArray[np.int64]:
        """[min(limit, n)] the nodes of highest score, ascending; a node's parent is among them.

        Among equal scores the earlier node wins, so a parent ranks above its children.

        Raises:
            ValueError: ``limit`` is negative.
        """
        if limit < 0:
            raise ValueError(f"limit must not be negative, not {limit}")
        return np.sort(np.argsort(-self.scores, kind="stable")[:limit])

    def prune(self, limit: int) -> Self:
        """The tree of the `best` ``limit`` nodes, in their order.

        Raises:
            ValueError: ``limit`` is negative.
        """
        kept = self.best(limit)
        return self if kept.size == len(self) else self.select(kept)

    def select(self, nodes: npt.NDArray[np.integer]) -> Self:
        """The tree of some nodes, in their order.

        Args:
            nodes: [m] ascending, closed under parents.

        Raises:
            ValueError: a node's parent is not among them.
        """
        missing = -2  # no parent's number: the constructor refuses it
        renumbered = np.full(len(self) + 1, missing, np.int32)
        renumbered[nodes] = np.arange(len(nodes), dtype=np.int32)
        renumbered[-1] = -1  # the root's
        return type(self)(self.tokens[nodes], renumbered[self.parents[nodes]], self.scores[nodes])
