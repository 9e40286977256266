# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Drafts without any model: what followed earlier in the same text (`core.lookup`)."""

import time
from collections.abc import Sequence

from vllm_subspec.core.acceptance import Walks
from vllm_subspec.core.cost import Round
from vllm_subspec.core.draft_tokens import DraftTokens
from vllm_subspec.core.lookup import lookup
from vllm_subspec.drafters.base import ComputedRow, Drafting, DraftRow


class NgramDrafter:
    """Merges the continuations of earlier occurrences into a tree.

    Args:
        shortest: newest tokens that must have occurred before.
        longest: tokens beyond which matches count as equally long.
        depth: levels of a tree at most.
        branching: continuations of a tree at most.
    """

    def __init__(self, shortest: int, longest: int, depth: int, branching: int) -> None:
        self.last = Drafting()
        self._shortest = shortest
        self._longest = longest
        self._depth = depth
        self._branching = branching

    @property
    def max_depth(self) -> int:
        return self._depth

    def propose(self, rows: list[DraftRow]) -> list[DraftTokens]:
        began = time.perf_counter()
        drafts = [
            lookup(
                row.history,
                self._shortest,
                self._longest,
                min(self._depth, row.depth),
                self._branching,
                row.limit,
            )
            for row in rows
        ]
        self.last = Drafting([len(rows)], [time.perf_counter() - began])
        return drafts

    def follow(self, rows: list[ComputedRow]) -> None:
        """The text is all there is to know."""

    def observe(self, drafts: Sequence[DraftTokens], walks: Walks) -> None:
        """Nothing is learnt: a lookup is free, so it is always worth it."""

    def observe_round(self, done: Round) -> None:
        """As `observe`."""
