# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Drafts without any model: what followed earlier in the same text (`core.lookup`)."""

import time
from collections.abc import Sequence

import numpy as np

from vllm_subspec.core.acceptance import Walks, verdicts
from vllm_subspec.core.cost import DepthController, Round
from vllm_subspec.core.draft_tokens import DraftTokens
from vllm_subspec.core.lookup import lookup
from vllm_subspec.core.tree import TokenTree
from vllm_subspec.drafters.base import ComputedRow, Drafting, DraftRow


class NgramDrafter:
    """Merges the continuations of earlier occurrences into a tree.

    A lookup is free; the nodes are not, for whoever verifies them. So only those are drafted that
    are expected to pay.

    Args:
        shortest: newest tokens that must have occurred before.
        longest: tokens beyond which matches count as equally long.
        growth: how many nodes pay, and at most how many levels.
        branching: continuations of a tree at most.
    """

    def __init__(
        self, shortest: int, longest: int, growth: DepthController, branching: int
    ) -> None:
        self.growth = growth
        self.last = Drafting()
        self._shortest = shortest
        self._longest = longest
        self._branching = branching

    @property
    def max_depth(self) -> int:
        return self.growth.max_steps

    def propose(self, rows: list[DraftRow]) -> list[DraftTokens]:
        began = time.perf_counter()
        self.growth.begin_round(len(rows))
        drafts = [self._worth(self._found(row)) for row in rows]
        self.last = Drafting([len(rows)], [time.perf_counter() - began])
        return drafts

    def follow(self, rows: list[ComputedRow]) -> None:
        """The text is all there is to know."""

    def observe(self, drafts: Sequence[DraftTokens], walks: Walks) -> None:
        for draft, path in zip(drafts, walks.paths, strict=True):
            nodes, accepted, first = verdicts(draft.tree, path)
            self.growth.acceptance.observe(draft.confidence[nodes], accepted, first)

    def observe_round(self, done: Round) -> None:
        self.growth.observe_round(done)

    def _found(self, row: DraftRow) -> DraftTokens:
        depth = min(self.max_depth, row.depth)
        found = lookup(
            row.history, self._shortest, self._longest, depth, self._branching, row.limit
        )
        return DraftTokens(self._scored(found), found.confidence)

    def _scored(self, found: DraftTokens) -> TokenTree:
        """The tree with the probability that each node is on the text's path."""
        tree = found.tree
        given = self.growth.acceptance.estimate(found.confidence)
        reached = np.ones(len(tree) + 1)  # last: the root
        left = np.ones(len(tree) + 1)  # below each node, what its children so far leave over
        for node, parent in enumerate(tree.parents):
            reached[node] = reached[parent] * left[parent] * given[node]
            left[parent] *= 1 - given[node]
        return TokenTree(tree.tokens, tree.parents, reached[:-1].astype(np.float32))

    def _worth(self, draft: DraftTokens) -> DraftTokens:
        if not len(draft):
            return draft
        count = int(self.growth.lengths(draft.tree.scores[np.newaxis])[0])
        return draft.select(draft.tree.best(count))
