# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""How the trees of a batch grow: a beam over sharpened probability, as deep as pays.

As published for SubSpec (arXiv 2509.18344), a level of a row's tree is the ``branching`` best of
all children of the level before, by the product of softmax(logits / draft temperature) along the
path. Products are kept as float64 sums of float32 logarithms: a path of 48 levels may lie below
the smallest float32, where products would tie at 0 and the order would be lost.

Which nodes are expanded, whether a level is started and which nodes are verified is decided by
*survival*, the learnt probability that the target's text runs through a node (`core.depth`); the
sum of it over a tree is the number of its tokens that are expected to be accepted. A chain is grown
by the same code with ``branching`` 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Self

import numpy as np
import numpy.typing as npt
import torch

from vllm_subspec.core.acceptance_model import AcceptanceModel
from vllm_subspec.core.depth import DepthController
from vllm_subspec.core.draft_tokens import DraftTokens
from vllm_subspec.core.tree import TokenTree

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

_CHUNK = 512  # logits


@dataclass(frozen=True, eq=False)
class Nodes:
    """Nodes of several rows' trees, ordered by row and within a row by index. All arrays [m]."""

    rows: Ints
    indices: Ints  # within the row's tree; -1: the root
    parents: Ints  # index of the parent
    tokens: Ints
    scores: Floats  # log of the cumulative sharpened probability
    survival: Floats
    confidence: Floats  # of the node against its worse siblings (`AcceptanceModel`)

    def __getitem__(self, chosen: Ints | Bools | slice) -> Self:
        return type(self)(*(getattr(self, field.name)[chosen] for field in fields(self)))

    @classmethod
    def join(cls, parts: Sequence["Nodes"]) -> "Nodes":
        """All nodes of ``parts``, each part a later level than the one before, in order."""
        names = [field.name for field in fields(cls)]
        joined = cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))
        return joined[np.argsort(joined.rows, kind="stable")]


class Beam:
    """The growing trees of a batch.

    Args:
        roots: [rows] newest token of each row.
        depths: [rows] most levels of each row's tree.
        limits: [rows] most nodes of each row's tree that can be verified.
        slots: [rows] nodes that can be expanded, the root included: each needs a place for its K/V.
        branching: children kept per level of a row.
        draft_temperature: sharpens the draft's probabilities; above 0.
        acceptance: what confidence has been worth.

    Raises:
        ValueError: ``branching`` is below 1 or ``draft_temperature`` not above 0.
    """

    def __init__(
        self,
        roots: npt.ArrayLike,
        depths: npt.ArrayLike,
        limits: npt.ArrayLike,
        slots: npt.ArrayLike,
        branching: int,
        draft_temperature: float,
        acceptance: AcceptanceModel,
    ) -> None:
        if branching < 1:
            raise ValueError(f"branching must be at least 1, not {branching}")
        if draft_temperature <= 0:
            raise ValueError(f"draft_temperature must be above 0, not {draft_temperature}")
        tokens = np.asarray(roots, np.int64)
        rows = np.arange(tokens.size)
        root, one = np.full(tokens.size, -1), np.ones(tokens.size)
        self._branching = branching
        self._sharpness = 1.0 / draft_temperature
        self._acceptance = acceptance
        self._depths = np.asarray(depths, np.int64)
        self._limits = np.asarray(limits, np.int64)
        self._slots = np.array(slots, np.int64)
        self._sizes = np.zeros(tokens.size, np.int64)
        self._levels: list[Nodes] = []
        self.frontier = Nodes(rows, root, root, tokens, np.zeros(tokens.size), one, one)
        """The nodes that the next level is grown from."""
        self.keep((self._depths > 0) & (self._limits > 0) & (self._slots > 0))

    @property
    def depth(self) -> int:
        """Levels grown so far."""
        return len(self._levels)

    def keep(self, chosen: Bools) -> None:
        """Grow on from the ``chosen`` [m] of the frontier only."""
        if not chosen.all():
            self.frontier = self.frontier[chosen]

    def extend(self, logits: torch.Tensor) -> None:
        """Grow one level from ``logits`` [m, vocab], the draft's after each node of the frontier.

        A row's new nodes are appended in descending order of score, so parents precede children;
        among equal scores a better parent's child comes first, then the likelier token. A token of
        probability 0 (logit -inf) is no child.
        """
        frontier = self.frontier
        self._slots -= np.bincount(frontier.rows, minlength=self._slots.size)
        tokens, logs = best_tokens(logits, self._sharpness, self._branching)
        confidence = _confidence(np.exp(logs))
        survival = frontier.survival[:, None] * self._acceptance.children(confidence)
        width = tokens.shape[1]
        children = Nodes(
            frontier.rows.repeat(width),
            np.full(tokens.size, -1),
            frontier.indices.repeat(width),
            tokens.ravel(),
            (frontier.scores[:, None] + logs).ravel(),
            survival.ravel(),
            confidence.ravel(),
        )
        order = np.lexsort((-children.scores, children.rows))  # stable: ties stay as they are
        rows = children.rows[order]
        rank = np.arange(rows.size) - np.searchsorted(rows, rows)
        best = (rank < self._branching) & (children.scores[order] > -np.inf)
        level = children[order[best]]
        level.indices[:] = self._sizes[level.rows] + rank[best]
        self._sizes += np.bincount(level.rows, minlength=self._sizes.size)
        self._levels.append(level)
        self.frontier = level
        self.keep(self._depths[level.rows] > self.depth)

    @property
    def fits(self) -> Bools:
        """[m] whether there is a slot for each node of the frontier; a row's best ones come first
        among its frontier's."""
        rows = self.frontier.rows
        return np.arange(rows.size) - np.searchsorted(rows, rows) < self._slots[rows]

    @property
    def survival(self) -> Floats:
        """[rows, nodes] survival of every node; -1 where a row has fewer."""
        table = np.full((self._sizes.size, int(self._sizes.max(initial=0))), -1.0)
        for level in self._levels:
            table[level.rows, level.indices] = level.survival
        return table

    @property
    def displaced(self) -> Floats:
        """[m] for each node of the frontier, the survival of the node that one more would push out
        of its row's draft: the last that can be verified, 0 while there is room."""
        rows = self.frontier.rows
        full = self._sizes[rows] >= self._limits[rows]
        if not full.any():
            return np.zeros(rows.size)
        ranked = -np.sort(-self.survival, axis=1)
        last = np.minimum(self._limits, ranked.shape[1]) - 1
        return np.where(full, ranked[rows, last[rows]], 0.0)

    def drafts(self, lengths: npt.ArrayLike) -> list[DraftTokens]:
        """For each row the tree of its best nodes, closed under parents.

        The scores of a tree are the survival of its nodes.

        Args:
            lengths: [rows] nodes worth verifying (`DepthController.lengths`); what the row's limit
                exceeds is cut as well.
        """
        keep = np.minimum(np.asarray(lengths, np.int64), self._limits)
        nodes = Nodes.join([self.frontier[:0], *self._levels])  # a join of none has no arrays
        ends = np.cumsum(self._sizes)
        drafts = []
        for row, (begin, end) in enumerate(zip(ends - self._sizes, ends, strict=True)):
            own = slice(begin, end)
            tree = TokenTree(
                nodes.tokens[own].astype(np.int32),
                nodes.parents[own].astype(np.int32),
                nodes.survival[own].astype(np.float32),
            )
            size = max(0, int(keep[row]))
            drafts.append(DraftTokens(tree, nodes.confidence[own]).select(tree.best(size)))
        return drafts


def grow(
    beam: Beam, controller: DepthController, expand: Callable[[Nodes], torch.Tensor]
) -> list[DraftTokens]:
    """Grow the trees of one round as long as that pays, and cut them to what is worth verifying.

    Args:
        beam: not grown yet.
        controller: its costs and rates decide.
        expand: the draft's logits [m, vocab] after each of m nodes: one draft step.
    """
    controller.begin_round(beam.frontier.rows.size)
    while True:
        beam.keep(controller.expands(beam.frontier.survival, beam.displaced))
        beam.keep(beam.fits)
        if not controller.keep_drafting(beam.frontier.survival, beam.displaced):
            return beam.drafts(controller.lengths(beam.survival))
        beam.extend(expand(beam.frontier))


def best_tokens(logits: torch.Tensor, sharpness: float, count: int) -> tuple[Ints, Floats]:
    """Of each row of ``logits`` [m, vocab] the best tokens and the logs of their sharpened
    probabilities, [m, min(count, vocab)], best first. The first is the argmax, also in a tie."""
    values, tokens = logits, torch.arange(logits.shape[1], device=logits.device)
    tokens = tokens.expand_as(logits)
    if (body := logits.shape[1] // _CHUNK * _CHUNK) > count * _CHUNK:
        # The best tokens lie in the chunks of the highest peaks: one fast pass over the vocabulary
        # in place of a selection from all of it. Chunks stay in order, for the argmax.
        chunks = logits[:, :body].unflatten(1, (-1, _CHUNK))
        picked = _top(chunks.amax(dim=2), count).sort(dim=1).values.unsqueeze(2)
        picked = picked.expand(-1, -1, _CHUNK)
        inside = tokens[:, :body].unflatten(1, (-1, _CHUNK)).gather(1, picked).flatten(1)
        values = torch.cat([chunks.gather(1, picked).flatten(1), logits[:, body:]], dim=1)
        tokens = torch.cat([inside, tokens[:, body:]], dim=1)
    best = _top(values, count)
    values, tokens = values.gather(1, best).float(), tokens.gather(1, best)
    largest = values[:, :1]
    total = (logits - largest).mul_(sharpness).exp_().sum(dim=1, keepdim=True)  # in float32
    logs = (values - largest) * sharpness - total.log()
    # One transfer for both; float64 holds tokens and float32 logs exactly.
    both = torch.stack([tokens.double(), logs.double().clamp(max=0.0)]).cpu().numpy()
    return both[0].astype(np.int64), both[1]


def _top(values: torch.Tensor, count: int) -> torch.Tensor:
    """[m, min(count, n)] places of the largest of ``values`` [m, n]; the argmax first."""
    places = values.topk(min(count, values.shape[1]), dim=1).indices
    first = values.argmax(dim=1, keepdim=True)
    places = torch.where(places == first, places[:, :1], places)
    places[:, :1] = first
    return places


def _confidence(probabilities: Floats) -> Floats:
    """[m, b] share of each child in what the ones before it leave over, of their [m, b]
    probabilities, best first."""
    left = 1.0 - (np.cumsum(probabilities, axis=1) - probabilities)
    return np.clip(probabilities / np.maximum(left, np.finfo(np.float64).tiny), 0.0, 1.0)
