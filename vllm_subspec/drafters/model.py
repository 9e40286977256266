# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Token trees grown by a draft model, all rows' frontiers in one batched forward per level.

SubSpec (arXiv 2509.18344) grows them with the target's own substitute, on the target's own pages;
EAGLE (arXiv 2401.15077, 2503.01840) with a head on the features of the model it drafts for; classic
speculative decoding with a small model. They differ in their forwards only (`engine`).
"""

import time

import numpy as np
import torch

from vllm_subspec.core.depth import DepthController
from vllm_subspec.core.draft_tokens import DraftTokens
from vllm_subspec.core.growth import Beam, Nodes, grow
from vllm_subspec.drafters.base import ComputedRow, Drafting, DraftModel, DraftRow
from vllm_subspec.drafters.foresight import Foresight
from vllm_subspec.drafters.growing import GrowingDrafter


class ModelDrafter(GrowingDrafter):
    """Grows token trees with a draft model, as deep and as wide as pays.

    Args:
        model: its forwards.
        growth: decides level by level what is expanded, and learns from what happened.
        branching: nodes kept per level of a row; 1 drafts chains.
        draft_temperature: sharpens the probabilities that trees grow by.
        device: of the model's logits.
    """

    def __init__(
        self,
        model: DraftModel,
        growth: DepthController,
        branching: int,
        draft_temperature: float,
        device: torch.device,
    ) -> None:
        super().__init__(growth)
        self._model = model
        self._branching = branching
        self._draft_temperature = draft_temperature
        self._device = device

    def propose(self, rows: list[DraftRow]) -> list[DraftTokens]:
        forward, ready = self._model.begin(rows)
        beam = Beam(
            [row.root for row in rows],
            np.where(ready, [row.depth for row in rows], 0),
            [row.limit for row in rows],
            [row.slots for row in rows],
            self._branching,
            self._draft_temperature,
            self.growth.acceptance,
        )
        foresight = Foresight(rows, self._device)
        sizes: list[int] = []
        clock: list[float] = []
        forward_seconds = 0.0

        def expand(nodes: Nodes) -> torch.Tensor:
            nonlocal forward_seconds
            sizes.append(nodes.rows.size)
            clock.append(time.perf_counter())
            logits = forward.step(nodes)
            forward_seconds += time.perf_counter() - clock[-1]
            return foresight(logits, nodes.rows, np.full(nodes.rows.size, beam.depth))

        drafts = grow(beam, self.growth, expand)
        clock.append(time.perf_counter())
        self.last = Drafting(sizes, np.diff(clock).tolist(), forward_seconds)
        return drafts

    def follow(self, rows: list[ComputedRow]) -> None:
        self._model.follow(rows)
