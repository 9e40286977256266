# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""What a drafter is asked and what it answers; what it is given to compute with.

Drafters know nothing of schedulers, pages or devices. They compose: a `Hierarchy` is a drafter
that asks another one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from vllm_subspec.core.acceptance import Walks
from vllm_subspec.core.cost import ExpectedCosts, Round
from vllm_subspec.core.draft_tokens import DraftTokens
from vllm_subspec.core.growth import Nodes
from vllm_subspec.core.resting import Reading


@dataclass(frozen=True, eq=False)
class DraftRow:
    """A request that wants drafts."""

    index: int
    """In the engine's batch."""
    request_id: str
    history: npt.NDArray[np.int32]
    """[position + 1] all tokens so far; the newest, the root of the draft, at the end."""
    depth: int
    """At most this many of the drafted tokens can be emitted; at least 1."""
    limit: int
    """At most this many nodes can be verified; at least 1."""
    slots: int
    """At most this many tokens, the root included, have a place for their K/V; at least 1."""
    temperature: float = 0.0
    """Of the request's own sampling; 0 is greedy."""
    top_k: int = 0
    """0: no limit."""
    top_p: float = 1.0
    seeds: Sequence[int] = ()
    """Of a sampled request, the seeds of the next ``depth`` tokens (`core.noise`)."""

    @property
    def root(self) -> int:
        return int(self.history[-1])

    @property
    def position(self) -> int:
        """Of the root in the request's text."""
        return self.history.size - 1

    def after(self, tokens: npt.NDArray[np.int32]) -> "DraftRow":
        """The row as it is when ``tokens`` [n] have been drafted, fewer than ``depth``."""
        n = tokens.size
        return replace(
            self,
            history=np.concatenate([self.history, tokens]),
            depth=self.depth - n,
            limit=self.limit - n,
            slots=self.slots - n,
            seeds=self.seeds[n:],
        )

    def within(self, depth: int, limit: int) -> "DraftRow":
        """The row for a draft of at most ``depth`` levels and ``limit`` nodes."""
        return replace(
            self,
            depth=min(self.depth, depth),
            limit=min(self.slots - 1, limit),
            seeds=self.seeds[:depth],
        )


@dataclass(frozen=True)
class ComputedRow:
    """A request that does not draft now, whose text has grown nevertheless."""

    index: int
    """In the engine's batch."""
    request_id: str
    history: npt.NDArray[np.int32]
    """[end + 1] tokens, all of which but the last have K/V of the target."""

    @property
    def end(self) -> int:
        return self.history.size - 1


@dataclass(frozen=True)
class Drafting:
    """What the last drafts took, step by step."""

    nodes: Sequence[int] = ()
    """Expanded, over all rows."""
    seconds: Sequence[float] = ()
    """From the beginning of each step to that of the next, or to the end."""
    forward_seconds: float = 0.0
    """In the drafting models' forwards; with CUDA, in launching them."""


class Drafter(Protocol):
    last: Drafting

    @property
    def max_depth(self) -> int:
        """Levels that are drafted at most."""

    def pays(self, rows: int, reading: Reading | None = None) -> bool:
        """Whether so many rows are to draft now: asked before each round that could.

        Args:
            reading: the last pass, if it read a part of a prompt and the next one will read on.
        """

    def propose(self, rows: list[DraftRow]) -> list[DraftTokens]:
        """One tree per row, in the order asked; a row may get an empty one."""

    def follow(self, rows: list[ComputedRow]) -> None:
        """Requests that do not draft in this round: compute what later rounds will need."""

    def observe(self, drafts: Sequence[DraftTokens], walks: Walks) -> None:
        """What was accepted of drafts."""

    def expect(self, costs: ExpectedCosts) -> None:
        """What rounds will cost, before the first one."""

    def observe_round(self, done: Round) -> None:
        """What a round cost whose drafts are the last ones."""

    def observe_plain(self, rows: int, seconds: float, pure: bool) -> None:
        """What a round cost in which nothing was drafted; ``pure``: one token for each row."""


class Forward(Protocol):
    """A draft model at the frontier of every drafting row."""

    def step(self, nodes: Nodes) -> torch.Tensor:
        """Logits ``[m, vocab]`` of the tokens after each of m ``nodes``, the whole frontier."""


class DraftModel(Protocol):
    """A model that grows trees, level by level."""

    def begin(self, rows: list[DraftRow]) -> tuple[Forward, npt.NDArray[np.bool_]]:
        """The forwards of one round, and which of the rows [n] the model can draft for now."""

    def follow(self, rows: list[ComputedRow]) -> None:
        """As `Drafter.follow`."""


class Intermediate(Protocol):
    """A model that verifies a drafter's trees and itself drafts for the target."""

    def verify(self, rows: list[DraftRow], drafts: list[DraftTokens]) -> torch.Tensor:
        """Logits ``[rows + all nodes, vocab]`` of the tokens after each row's root and after each
        node of its draft, row after row. A pass over the model, all rows in one batch."""

    def keep(self, walks: Walks) -> None:
        """Of what was verified last, the accepted paths are the rows' text from now on."""

    def follow(self, rows: list[ComputedRow]) -> None:
        """As `Drafter.follow`."""
