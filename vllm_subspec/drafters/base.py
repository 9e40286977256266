# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""What a drafter is asked and what it answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from vllm_subspec.core.draft_tokens import DraftTokens
from vllm_subspec.core.growth import Nodes


class Forward(Protocol):
    """The draft model at the frontier of every drafting row (`engine.draft_forward`)."""

    def step(self, nodes: Nodes) -> torch.Tensor:
        """Logits ``[m, vocab]`` of the tokens after each of m ``nodes``, the whole frontier."""


@dataclass(frozen=True)
class DraftRow:
    """A request that wants drafts."""

    request_id: str
    root: int
    """The newest token."""
    depth: int
    """At most this many of the drafted tokens can be emitted; at least 1."""
    limit: int
    """At most this many nodes can be verified; at least 1."""
    slots: int
    """At most this many nodes, the root included, can be expanded; at least 1."""
    temperature: float = 0.0
    """Of the request's own sampling; 0 is greedy."""
    top_k: int = 0
    """0: no limit."""
    top_p: float = 1.0
    seeds: Sequence[int] = ()
    """Of a sampled request, the seeds of the next ``depth`` tokens (`core.noise`)."""


class Drafter(Protocol):
    def propose(self, rows: list[DraftRow], forward: Forward) -> list[DraftTokens]:
        """One tree per row, in the order asked; a row may get an empty one."""
