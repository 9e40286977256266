# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Hidden states that an EAGLE head drafts from, kept until it has looked at them."""

from collections.abc import Callable
from collections.abc import Set as AbstractSet

import torch


class Features:
    """Of each request those of consecutive positions of its text, the newest at the end."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[int, torch.Tensor]] = {}

    def add(self, request_id: str, begin: int, features: torch.Tensor) -> None:
        """``features`` ``[n, hidden]`` of the positions from ``begin`` on; later ones are void."""
        first, kept = self._kept.get(request_id, (begin, features[:0]))
        if not first <= begin <= first + kept.shape[0]:
            first, kept = begin, features[:0]
        self._kept[request_id] = first, torch.cat([kept[: begin - first], features])

    def between(self, request_id: str, begin: int, end: int) -> torch.Tensor | None:
        """``[end - begin, hidden]`` of those positions; None if some are not known."""
        first, kept = self._kept.get(request_id, (0, None))
        if kept is None or begin < first or end > first + kept.shape[0]:
            return None
        return kept[begin - first : end - first]

    def first(self, request_id: str) -> int | None:
        """The first position whose features are kept."""
        found = self._kept.get(request_id)
        return None if found is None else found[0]

    def cut(self, request_id: str, begin: int, end: int) -> None:
        """Keep only what lies in positions ``begin`` to ``end``."""
        if request_id in self._kept:
            first, kept = self._kept[request_id]
            begin = max(begin, first)
            # A copy: a slice would hold the whole pass's hidden states in memory.
            self._kept[request_id] = begin, kept[begin - first : max(end - first, 0)].clone()

    def forget(self, living: AbstractSet[str]) -> None:
        """Requests that are not ``living`` have ended."""
        for name in self._kept.keys() - living:
            del self._kept[name]


class Tap:
    """Takes the features that a head needs from the passes of the model that it drafts for.

    Args:
        features: where they go.
        combine: makes features ``[n, hidden]`` of the auxiliary hidden states of several layers,
            ``[n, layers * hidden]`` (EAGLE-3); None: the final hidden states are the features.
    """

    def __init__(
        self, features: Features, combine: Callable[[torch.Tensor], torch.Tensor] | None
    ) -> None:
        self.features = features
        self._combine = combine

    def of(self, hidden: torch.Tensor, auxiliary: list[torch.Tensor] | None) -> torch.Tensor:
        """``[n, hidden]`` of a pass's n tokens."""
        if self._combine is None:
            return hidden
        assert auxiliary is not None
        return self._combine(torch.cat(auxiliary, dim=-1))
