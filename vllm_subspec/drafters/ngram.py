# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Drafts without any model: what followed earlier in the same text (`core.lookup`)."""

import time

import numpy as np

from vllm_subspec.core.depth import DepthController
from vllm_subspec.core.draft_tokens import DraftTokens
from vllm_subspec.core.lookup import lookup
from vllm_subspec.drafters.base import ComputedRow, Drafting, DraftRow
from vllm_subspec.drafters.growing import GrowingDrafter


class NgramDrafter(GrowingDrafter):
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
        super().__init__(growth)
        self._shortest = shortest
        self._longest = longest
        self._branching = branching

    def propose(self, rows: list[DraftRow]) -> list[DraftTokens]:
        began = time.perf_counter()
        self.growth.begin_round(len(rows))
        drafts = [self._worth(self._found(row)) for row in rows]
        self.last = Drafting([len(rows)], [time.perf_counter() - began])
        return drafts

    def follow(self, rows: list[ComputedRow]) -> None:
        """The text is all there is to know."""

    def _found(self, row: DraftRow) -> DraftTokens:
        return lookup(
            row.history,
            self._shortest,
            self._longest,
            min(self.max_depth, row.depth),
            self._branching,
            row.limit,
            self.growth.acceptance.estimate,
        )

    def _worth(self, draft: DraftTokens) -> DraftTokens:
        if not len(draft):
            return draft
        count = int(self.growth.lengths(draft.tree.scores[np.newaxis])[0])
        return draft.select(draft.tree.best(count))
