# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Growing trees on KV pages, level by level.

A draft step computes the next level's logits at the frontier of every drafting row, all rows in one
batch. Each node that is expanded gets the next free slot of its row, the root the first one, at or
above the root's position: in the slots that the scheduler reserved behind the committed tokens (the
lookahead). On the target's own pages the verification that follows writes the target's K/V over
what it needs of them.
"""

import numpy as np
import numpy.typing as npt
import torch

from vllm_subspec.core.growth import Nodes
from vllm_subspec.core.tree_attention import TreeRows
from vllm_subspec.drafters.base import ComputedRow, DraftRow
from vllm_subspec.engine.coverage import Coverage
from vllm_subspec.engine.paged_model import PagedModel, Queries


class TreeModel:
    """A draft model: the target's substitute, or a model with pages of its own.

    Args:
        model: of one KV group with the target.
        coverage: of its pages.
    """

    def __init__(self, model: PagedModel, coverage: Coverage) -> None:
        self._model = model
        self._coverage = coverage

    def begin(self, rows: list[DraftRow]) -> tuple["DraftForward", npt.NDArray[np.bool_]]:
        forward = DraftForward(
            self._model, rows, [self._coverage.of(row.request_id, row.position) for row in rows]
        )
        for row in rows:
            self._coverage.reach(row.request_id, row.position + 1)
        return forward, np.ones(len(rows), np.bool_)

    def follow(self, rows: list[ComputedRow]) -> None:
        self._model.follow(self._coverage, rows)


class DraftForward:
    """The rows of one round and the forwards over their frontiers.

    Args:
        model: whose K/V may be missing for the newest tokens before a row's root.
        rows: that draft.
        begins: [rows] first place of each row whose K/V is missing.
        ahead: places by which a token stands behind its K/V.
    """

    def __init__(
        self, model: PagedModel, rows: list[DraftRow], begins: list[int], ahead: int = 0
    ) -> None:
        self._model = model
        self._texts = [row.history[b + ahead :] for row, b in zip(rows, begins, strict=True)]
        self._begins = begins
        self._index = np.array([row.index for row in rows])
        self._roots = np.array([row.position - ahead for row in rows])
        most = max(row.slots for row in rows)
        self._used = np.zeros(len(rows), np.int64)
        # What each expanded node, by its slot behind the committed tokens, attends to there.
        self._seen = np.zeros((len(rows), most, most), np.bool_)
        # The slot of the nodes expanded last, by index; the root's own is the last entry.
        self._slot_of = np.zeros((len(rows), 1), np.int64)
        self._depth = 0

    def step(self, nodes: Nodes) -> torch.Tensor:
        """Expand ``nodes``, the whole frontier: logits ``[m, vocab]`` of the tokens after them.

        The frontiers of a round follow each other, level by level.
        """
        rows, counts = np.unique(nodes.rows, return_counts=True)
        starts = np.append(0, np.cumsum(counts))
        slots = self._take_slots(nodes, np.arange(nodes.rows.size) - starts[:-1].repeat(counts))
        if self._depth == 0:
            # What lacks K/V before the roots gets it.
            texts = [self._texts[row] for row in rows]
            queries = Queries.of_sequences(
                self._index[rows].tolist(), texts, [self._begins[row] for row in rows]
            )
            wanted = queries.starts[1:] - 1
        else:
            queries = Queries(
                rows=self._index[rows],
                starts=starts,
                tokens=nodes.tokens,
                positions=self._roots[nodes.rows] + self._depth,
                places=self._roots[nodes.rows] + slots,
                lengths=self._roots[rows] + self._used[rows],
                trees=self._trees(rows, starts, slots),
            )
            wanted = np.arange(nodes.rows.size)
        hidden = self._run(queries, nodes, wanted)
        self._depth += 1
        return self._model.logits(hidden)

    def _run(self, queries: Queries, nodes: Nodes, wanted: np.ndarray) -> torch.Tensor:
        """Hidden states ``[m, hidden]`` after ``nodes``, the ``wanted`` [m] of the queries."""
        return self._model.run(queries)[0][torch.as_tensor(wanted)]

    def _take_slots(self, nodes: Nodes, rank: np.ndarray) -> np.ndarray:
        """[m] the slots of ``nodes``, the ``rank``-th of their row in this step."""
        rows = nodes.rows
        slots = self._used[rows] + rank
        if self._depth:
            parents = self._slot_of[rows, nodes.parents]
            self._seen[rows, slots] = self._seen[rows, parents]
        self._seen[rows, slots, slots] = True
        self._used += np.bincount(rows, minlength=self._used.size)
        self._slot_of = np.zeros((self._used.size, int(nodes.indices.max()) + 2), np.int64)
        self._slot_of[rows, nodes.indices] = slots
        return slots

    def _trees(self, rows: np.ndarray, starts: np.ndarray, slots: np.ndarray) -> TreeRows:
        """Those of ``rows`` whose queries are no plain sequence: not a single query that attends
        to everything before it."""
        found = []
        for i, row in enumerate(rows):
            own = slots[starts[i] : starts[i + 1]]
            mask = self._seen[row, own, : self._used[row]]
            if not mask.all():
                found.append((i, int(self._roots[row]), torch.from_numpy(mask)))
        indices, prefixes, masks = zip(*found, strict=True) if found else ((), (), ())
        return TreeRows(indices, prefixes, masks)
