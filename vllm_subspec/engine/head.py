# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""EAGLE heads (arXiv 2401.15077, 2503.01840) as draft models.

A head drafts from the features of the model that it drafts for: at place i it takes the feature of
position i and the token behind it, and its output is the guess of the next feature. So a root at
position p stands at place p - 1 of the head's pages.
"""

import numpy as np
import numpy.typing as npt
import torch

from vllm_subspec.core.growth import Nodes
from vllm_subspec.drafters.base import ComputedRow, DraftRow
from vllm_subspec.engine.coverage import Coverage
from vllm_subspec.engine.draft_forward import DraftForward
from vllm_subspec.engine.features import Features
from vllm_subspec.engine.paged_model import PagedModel, Queries


class HeadModel:
    """Grows trees with a head.

    Args:
        model: the head.
        coverage: of its pages.
        features: of the model that it drafts for.
    """

    def __init__(self, model: PagedModel, coverage: Coverage, features: Features) -> None:
        self._model = model
        self._coverage = coverage
        self._features = features

    def begin(self, rows: list[DraftRow]) -> tuple["HeadForward", npt.NDArray[np.bool_]]:
        """A row is ready if the features before its root are known."""
        begins, texts, ready = [], [], np.zeros(len(rows), np.bool_)
        for i, row in enumerate(rows):
            begin, features = self._missing(row.request_id, row.position)
            ready[i] = features is not None and features.shape[0] > 0
            begins.append(begin)
            texts.append(features)
            if ready[i]:
                self._coverage.reach(row.request_id, row.position)
        return HeadForward(self._model, rows, begins, texts), ready

    def follow(self, rows: list[ComputedRow]) -> None:
        found = [(row, *self._missing(row.request_id, row.end)) for row in rows]
        behind = [(r, b, f) for r, b, f in found if f is not None and f.shape[0]]
        if not behind:
            return
        queries = Queries.of_sequences(
            [row.index for row, _, _ in behind],
            [row.history[begin + 1 :] for row, begin, _ in behind],
            [begin for _, begin, _ in behind],
        )
        self._model.run(queries, hidden_states=torch.cat([f for _, _, f in behind]))
        for row, _, _ in behind:
            self._coverage.reach(row.request_id, row.end)

    def _missing(self, request_id: str, end: int) -> tuple[int, torch.Tensor | None]:
        """The first place below ``end`` without K/V, and the features from there on."""
        begin = self._coverage.of(request_id, end)
        # Of a prefix that another request has computed the features are gone; its K/V is there.
        begin = max(begin, self._features.first(request_id) or 0)
        return begin, self._features.between(request_id, begin, end)

    def settle(self, request_id: str, committed: int) -> None:
        """Of the first ``committed`` tokens all is right; keep what is still to be looked at."""
        self._features.cut(request_id, self._coverage.of(request_id, committed), committed)


class HeadForward(DraftForward):
    """The rows of one round, their newest features first, then the head's own guesses.

    Args:
        features: [rows] of each row's text that lacks K/V, ``[n, hidden]``.
    """

    def __init__(
        self,
        model: PagedModel,
        rows: list[DraftRow],
        begins: list[int],
        features: list[torch.Tensor | None],
    ) -> None:
        super().__init__(model, rows, begins, ahead=1)
        self._given = features
        # The head's guesses after the nodes expanded last, and where each stands, by index.
        self._guesses = torch.empty(0)
        self._guess_of = np.zeros((len(rows), 1), np.int64)

    def _run(self, queries: Queries, nodes: Nodes, wanted: np.ndarray) -> torch.Tensor:
        if self._depth == 0:
            features = torch.cat([g for r in nodes.rows if (g := self._given[r]) is not None])
        else:
            parents = self._guess_of[nodes.rows, nodes.parents]
            features = self._guesses[torch.as_tensor(parents)]
        hidden, guesses = self._model.run(queries, hidden_states=features)
        chosen = torch.as_tensor(wanted)
        self._guesses = guesses[chosen]
        self._guess_of = np.zeros((self._guess_of.shape[0], int(nodes.indices.max()) + 2), np.int64)
        self._guess_of[nodes.rows, nodes.indices] = np.arange(nodes.rows.size)
        return hidden[chosen]
