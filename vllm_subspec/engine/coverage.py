# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""How much of each request's text a drafting model has K/V for."""

from collections.abc import Set as AbstractSet
from typing import Protocol


class Coverage(Protocol):
    def of(self, request_id: str, end: int) -> int:
        """Of a request's first ``end`` tokens, those from its beginning on that have K/V."""

    def reach(self, request_id: str, end: int) -> None:
        """K/V of the first ``end`` tokens exists now."""


class TargetCoverage:
    """A model on the target's pages: the target has computed what is committed."""

    def of(self, request_id: str, end: int) -> int:
        return end

    def reach(self, request_id: str, end: int) -> None:
        pass


class OwnCoverage:
    """A model with pages of its own, in the blocks that vLLM gives to each request.

    They are filled as far as the target's at the end of every step. So a block that vLLM shares
    between requests, because the target's K/V of it is computed, holds this model's K/V too.

    Args:
        ahead: tokens behind its own that a place's K/V depends on.
        keeps_drafts: whether K/V that was computed while drafting is the text's where the draft
            turned out right. It is not where it came of another model's features than the text's
            will.
    """

    def __init__(self, ahead: int = 0, keeps_drafts: bool = True) -> None:
        self._ahead = ahead
        self._keeps_drafts = keeps_drafts
        self._ends: dict[str, int] = {}

    def of(self, request_id: str, end: int) -> int:
        return min(self._ends[request_id], end)

    def reach(self, request_id: str, end: int) -> None:
        self._ends[request_id] = end

    def settle(self, request_id: str, before: int, committed: int) -> None:
        """A pass of the target over a request.

        Args:
            before: tokens whose K/V the target had before it. At first, and when the request
                resumes in other blocks, these are what a shared prefix brought.
            committed: tokens of which what was drafted turned out right: ``before`` if nothing was
                verified.
        """
        known = self._ends.get(request_id)
        right = max(before, committed - self._ahead) if self._keeps_drafts else before
        self._ends[request_id] = before if known is None else min(known, right)

    def forget(self, living: AbstractSet[str]) -> None:
        """Requests that are not ``living`` have ended."""
        for name in self._ends.keys() - living:
            del self._ends[name]
