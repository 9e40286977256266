# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""SubSpec (arXiv 2509.18344): the draft is the target with low-bit substitutes, on its own pages.

It grows a token tree for every row, all frontiers in one batched forward per level. The tree
predicts what the target will emit: for a greedy row the largest logits, for a sampled row the
largest after the noise that the target itself will add to its own (`core.noise`), so that sampled
text is drafted as well as greedy text is.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

from vllm_subspec.core.cost import DepthController
from vllm_subspec.core.draft_tokens import DraftTokens
from vllm_subspec.core.growth import Beam, Nodes, grow
from vllm_subspec.core.noise import gumbel
from vllm_subspec.drafters.base import DraftRow, Forward


@dataclass(frozen=True)
class Growing:
    """What growing the last trees took, step by step."""

    nodes: Sequence[int] = ()
    """Expanded, over all rows."""
    seconds: Sequence[float] = ()
    """From the beginning of each step to that of the next, or to the end."""
    forward_seconds: float = 0.0
    """In the draft model's forwards; with CUDA, in launching them."""


class SubstituteDrafter:
    """Grows token trees with a draft model, as deep and as wide as pays.

    Args:
        growth: decides level by level what is expanded, and learns from what happened.
        branching: nodes kept per level of a row; 1 drafts chains.
        draft_temperature: sharpens the probabilities that trees grow by.
    """

    def __init__(
        self,
        growth: DepthController,
        branching: int,
        draft_temperature: float,
        device: torch.device,
    ) -> None:
        self.growth = growth
        self.branching = branching
        self.last = Growing()
        self._draft_temperature = draft_temperature
        self._device = device

    def propose(self, rows: list[DraftRow], forward: Forward) -> list[DraftTokens]:
        beam = Beam(
            [row.root for row in rows],
            [row.depth for row in rows],
            [row.limit for row in rows],
            [row.slots for row in rows],
            self.branching,
            self._draft_temperature,
            self.growth.acceptance,
        )
        sampling = _Sampling(rows, self._device) if any(row.seeds for row in rows) else None
        sizes: list[int] = []
        clock: list[float] = []
        forward_seconds = 0.0

        def expand(nodes: Nodes) -> torch.Tensor:
            nonlocal forward_seconds
            sizes.append(nodes.rows.size)
            clock.append(time.perf_counter())
            logits = forward.step(nodes)
            forward_seconds += time.perf_counter() - clock[-1]
            if sampling is not None:
                logits = sampling.foresee(logits, nodes.rows, beam.depth)
            return logits

        drafts = grow(beam, self.growth, expand)
        clock.append(time.perf_counter())
        self.last = Growing(sizes, np.diff(clock).tolist(), forward_seconds)
        return drafts


class _Sampling:
    """The rows' own sampling parameters and seeds."""

    def __init__(self, rows: list[DraftRow], device: torch.device) -> None:
        self._device = device
        self._random = np.array([bool(row.seeds) for row in rows])
        self._temperatures = torch.tensor(
            [row.temperature if row.seeds else 1.0 for row in rows], device=device
        )
        self._top_k = torch.tensor([row.top_k for row in rows], dtype=torch.int32, device=device)
        self._limits_k = bool((self._top_k > 0).any())
        self._top_p = torch.tensor([row.top_p for row in rows], device=device)
        self._limits_p = bool((self._top_p < 1).any())
        depth = max(row.depth for row in rows)
        self._seeds = np.zeros((len(rows), depth), np.int64)
        for seeds, row in zip(self._seeds, rows, strict=True):
            seeds[: len(row.seeds)] = row.seeds

    def foresee(self, logits: torch.Tensor, rows: np.ndarray, depth: int) -> torch.Tensor:
        """The draft's guess of what the target's sampler will maximise.

        Temperature times (processed logits + noise): at low temperatures it becomes the logits
        themselves, so that what a difference means for acceptance does not depend on it.

        Args:
            logits: ``[m, vocab]`` of the draft.
            rows: ``[m]`` which row each belongs to.
            depth: levels between the root and the tokens before these.
        """
        owners = torch.as_tensor(rows, device=self._device)
        vocab = logits.shape[-1]
        temperature = self._temperatures[owners].unsqueeze(1)
        top_k = None
        if self._limits_k:
            top_k = self._top_k[owners]
            top_k = torch.where(top_k > 0, top_k, vocab)
        top_p = self._top_p[owners] if self._limits_p else None
        processed = apply_top_k_top_p(logits.float() / temperature, top_k, top_p)
        sampled = np.flatnonzero(self._random & np.isin(np.arange(self._random.size), rows))
        noise = torch.zeros((self._random.size, vocab), device=self._device)
        seeds = torch.as_tensor(self._seeds[sampled, depth], device=self._device)
        noise[torch.as_tensor(sampled, device=self._device)] = gumbel(seeds, vocab).float()
        return (processed + noise[owners]) * temperature
