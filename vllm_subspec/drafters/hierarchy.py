# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""HierSpec (arXiv 2505.22179): an intermediate model turns another drafter's trees into a sequence.

A wide tree costs a small intermediate model little, and a large target much if it is quantised. So
the intermediate verifies the trees, again and again, and the target verifies the sequence that they
add up to. With the target's own substitute as the intermediate (SubSpec, arXiv 2509.18344) a pass
over the substitute verifies a tree where it would have grown one level.

Where the drafter below differs from the intermediate, the one that has been right more often is
followed (`core.opinions`).

The sequence is a guess like any other draft: what the target emits does not depend on it.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from vllm_subspec.core.acceptance import Walks, walk_batch
from vllm_subspec.core.cost import Round
from vllm_subspec.core.draft_tokens import DraftTokens
from vllm_subspec.core.growth import best_tokens
from vllm_subspec.core.opinions import Judge, Opinions
from vllm_subspec.core.sequence import SequenceController
from vllm_subspec.core.tree import TokenTree
from vllm_subspec.drafters.base import ComputedRow, Drafter, Drafting, DraftRow, Intermediate
from vllm_subspec.drafters.foresight import Foresight
from vllm_subspec.drafters.growing import GrowingDrafter


@dataclass
class _Sequence:
    """What is drafted for one row so far."""

    row: DraftRow
    """As it is behind the newest drafted token."""
    tokens: list[int] = field(default_factory=list)
    probability: list[float] = field(default_factory=list)
    survival: list[float] = field(default_factory=list)
    said: list[Opinions] = field(default_factory=list)

    def draft(self, length: int) -> "SequenceDraft":
        tree = TokenTree.chain(self.tokens[:length], self.survival[:length])
        said = Opinions.join(self.said).select(np.arange(length))
        return SequenceDraft(tree, self.probability[:length], said)


class SequenceDraft(DraftTokens):
    """A sequence that remembers what was said of each of its tokens."""

    def __init__(self, tree: TokenTree, confidence: npt.ArrayLike, said: Opinions) -> None:
        super().__init__(tree, confidence)
        self.said = said

    def select(self, nodes: npt.NDArray[np.integer]) -> "SequenceDraft":
        if len(nodes) == len(self):
            return self
        return SequenceDraft(
            self.tree.select(nodes), self.confidence[nodes], self.said.select(nodes)
        )


class Hierarchy(GrowingDrafter):
    """Drafts sequences: the inner drafter's trees, as the intermediate model accepts them.

    Args:
        intermediate: verifies trees.
        inner: drafts them.
        growth: how long the sequences become.
        nodes: of an inner tree at most.
        draft_temperature: sharpens the intermediate's probabilities, which are the confidence in
            its tokens.
        device: of the intermediate's logits.
        agree: gives the same seconds on all ranks, so that they decide alike.
    """

    growth: SequenceController

    def __init__(
        self,
        intermediate: Intermediate,
        inner: Drafter,
        growth: SequenceController,
        nodes: int,
        draft_temperature: float,
        device: torch.device,
        agree: Callable[[Sequence[float]], list[float]] = list,
    ) -> None:
        super().__init__(growth)
        self.judge = Judge()
        self._intermediate = intermediate
        self._inner = inner
        self._nodes = nodes
        self._sharpness = 1.0 / draft_temperature
        self._device = device
        self._agree = agree

    def propose(self, rows: list[DraftRow]) -> list[DraftTokens]:
        self.growth.begin_round(len(rows))
        foresight = Foresight(rows, self._device)
        sequences = [_Sequence(row) for row in rows]
        going = np.arange(len(rows))
        sizes: list[int] = []
        clock = [time.perf_counter()]
        forward_seconds = 0.0
        while going.size:
            forward_seconds += self._extend([sequences[i] for i in going], going, foresight, sizes)
            clock.append(time.perf_counter())
            survival = np.zeros(len(rows))
            for i in going:
                row = sequences[i].row
                if min(row.depth, row.limit, row.slots) > 0:
                    survival[i] = sequences[i].survival[-1]
            lengths = [len(sequence.tokens) for sequence in sequences]
            going = np.flatnonzero(self.growth.goes_on(survival, lengths))
        self.last = Drafting(sizes, np.diff(clock).tolist(), forward_seconds)
        return self._cut(sequences)

    def follow(self, rows: list[ComputedRow]) -> None:
        self._intermediate.follow(rows)
        self._inner.follow(rows)

    def observe(self, drafts: Sequence[DraftTokens], walks: Walks) -> None:
        for draft, count, last in zip(drafts, walks.counts, walks.last, strict=True):
            if not isinstance(draft, SequenceDraft):
                continue  # a row without one
            tested = min(int(count) + 1, len(draft))
            truth = np.append(draft.tree.tokens[:count], last)[:tested]
            self.growth.acceptance.observe(draft.confidence[:tested], np.arange(tested) < count)
            self.judge.observe(draft.said.select(np.arange(tested)), truth)

    def _extend(
        self,
        sequences: list[_Sequence],
        owners: np.ndarray,
        foresight: Foresight,
        sizes: list[int],
    ) -> float:
        """One pass over the intermediate model; returns the seconds of the models' forwards.

        Args:
            sequences: of the rows that go on; each grows by at least one token.
            owners: [rows] their numbers in the round.
            foresight: of all rows of the round.
            sizes: gets the tokens of the pass.
        """
        rows = [sequence.row for sequence in sequences]
        # The intermediate adds a token of its own to every accepted path.
        asked = [row.within(max(row.depth - 1, 1), self._nodes) for row in rows]
        open_ = [i for i, row in enumerate(asked) if row.depth > 0 and row.limit > 0]
        drafts = [DraftTokens.none() for _ in rows]
        if open_:
            proposed = self._inner.propose([asked[i] for i in open_])
            for i, draft in zip(open_, proposed, strict=True):
                drafts[i] = draft
        began = time.perf_counter()
        logits = self._intermediate.verify(rows, drafts)
        forward_seconds = self._inner.last.forward_seconds + time.perf_counter() - began
        trees = [draft.tree for draft in drafts]
        counts = [1 + len(tree) for tree in trees]
        sizes.append(sum(counts))
        before = np.repeat([len(sequence.tokens) for sequence in sequences], counts)
        depths = before + np.concatenate([np.append(0, tree.depths) for tree in trees])
        foreseen = foresight(logits, np.repeat(owners, counts), depths)
        best, logs = best_tokens(foreseen, self._sharpness, 1)
        starts = np.append(0, np.cumsum(counts))
        parts = [slice(*pair) for pair in pairwise(starts)]
        confidence = np.exp(logs[:, 0]).astype(np.float64)
        said = Opinions.join(
            [
                Opinions.of_tree(draft.tree, draft.confidence, best[part, 0], confidence[part])
                for draft, part in zip(drafts, parts, strict=True)
            ]
        )
        chosen, probability = self.judge.choose(said)
        walks = walk_batch(trees, chosen)
        self._intermediate.keep(walks)
        self._learn(drafts, walks, time.perf_counter() - began)
        for sequence, path, part in zip(sequences, walks.paths, parts, strict=True):
            room = min(sequence.row.depth, sequence.row.limit)
            visited = part.start + np.append(0, path + 1)[:room]
            reached = sequence.survival[-1] if sequence.survival else 1.0
            sequence.tokens += chosen[visited].tolist()
            sequence.probability += probability[visited].tolist()
            sequence.survival += (reached * np.cumprod(probability[visited])).tolist()
            sequence.said.append(said.select(visited))
            sequence.row = sequence.row.after(chosen[visited].astype(np.int32))
        return forward_seconds

    def _learn(self, drafts: list[DraftTokens], walks: Walks, seconds: float) -> None:
        """What the pass says about the inner drafter; ``seconds`` are the pass's own."""
        self._inner.observe(drafts, walks)
        if all(len(draft) for draft in drafts):
            inner, rows, nodes = self._inner.last, len(drafts), sum(map(len, drafts))
            emitted = int(walks.counts.sum()) + rows
            seconds, *steps = self._agree([seconds, *inner.seconds])
            self._inner.observe_round(
                Round(rows, inner.nodes, steps, nodes + rows, emitted, seconds)
            )

    def _cut(self, sequences: list[_Sequence]) -> list[DraftTokens]:
        table = np.full((len(sequences), max(len(s.tokens) for s in sequences)), -1.0)
        for line, sequence in zip(table, sequences, strict=True):
            line[: len(sequence.survival)] = sequence.survival
        lengths = self.growth.lengths(table)
        return [s.draft(int(length)) for s, length in zip(sequences, lengths, strict=True)]
