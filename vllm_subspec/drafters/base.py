# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""What a drafter is asked and what it answers."""

from dataclasses import dataclass
from typing import Protocol

import torch

from vllm_subspec.core.tree import TokenTree


class Forward(Protocol):
    """The draft model at the frontier of every drafting row (`engine.draft_forward`)."""

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """``[n]`` tokens in, logits ``[n, vocab]`` of the tokens after them out."""

    def keep(self, rows: torch.Tensor) -> None: ...


@dataclass(frozen=True)
class DraftRow:
    """A request that wants drafts."""

    request_id: str
    root: int
    """The newest token."""
    limit: int
    """At most this many tokens can be verified and used; at least 1."""
    temperature: float = 0.0
    """Of the request's own sampling; 0 is greedy."""
    top_k: int = 0
    """0: no limit."""
    top_p: float = 1.0
    seed: int | None = None
    """The request's own seed, if it gave one: its drafts must not depend on its neighbours."""


@dataclass(frozen=True)
class Proposal:
    """One tree per row, in the order asked; a row may get an empty one.

    ``probabilities`` is the distribution ``[rows, depth, vocab]`` (float32) that the tokens of the
    sampled rows were drawn from, for true rejection sampling; None when no row was sampled.
    """

    trees: list[TokenTree]
    probabilities: torch.Tensor | None


class Drafter(Protocol):
    def propose(self, rows: list[DraftRow], forward: Forward) -> Proposal: ...
