# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""What the target will sample, as far as a draft model can tell."""

import numpy as np
import numpy.typing as npt
import torch
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

from vllm_subspec.core.noise import gumbel
from vllm_subspec.drafters.base import DraftRow


class Foresight:
    """The rows' own sampling parameters and seeds, applied to a draft model's logits.

    For a greedy row the target emits the largest logit, for a sampled row the largest after the
    noise that the target itself will add (`core.noise`), so that sampled text is drafted as well
    as greedy text is.

    Args:
        rows: of one round.
    """

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
        self._seeds = np.zeros((len(rows), max(row.depth for row in rows) + 1), np.int64)
        for seeds, row in zip(self._seeds, rows, strict=True):
            seeds[: len(row.seeds)] = row.seeds

    def __call__(
        self, logits: torch.Tensor, rows: npt.NDArray[np.int64], depths: npt.NDArray[np.int64]
    ) -> torch.Tensor:
        """The draft's guess ``[m, vocab]`` of what the target's sampler will maximise.

        Temperature times (processed logits + noise): at low temperatures it becomes the logits
        themselves, so that what a difference means for acceptance does not depend on it.

        Args:
            logits: ``[m, vocab]`` of the draft.
            rows: ``[m]`` which row each belongs to.
            depths: ``[m]`` drafted tokens before each.
        """
        if not self._random.any():
            return logits
        owners = torch.as_tensor(rows, device=self._device)
        vocab = logits.shape[-1]
        temperature = self._temperatures[owners].unsqueeze(1)
        top_k = None
        if self._limits_k:
            top_k = self._top_k[owners]
            top_k = torch.where(top_k > 0, top_k, vocab)
        top_p = self._top_p[owners] if self._limits_p else None
        processed = apply_top_k_top_p(logits.float() / temperature, top_k, top_p)
        # Nodes of one depth share their noise; beyond the row's last token no seed is known.
        places = rows * self._seeds.shape[1] + np.minimum(depths, self._seeds.shape[1] - 1)
        distinct, which = np.unique(places, return_inverse=True)
        noise = torch.zeros((distinct.size, vocab), device=self._device)
        sampled = np.flatnonzero(self._random[distinct // self._seeds.shape[1]])
        seeds = torch.as_tensor(self._seeds.ravel()[distinct[sampled]], device=self._device)
        noise[torch.as_tensor(sampled, device=self._device)] = gumbel(seeds, vocab).float()
        return (processed + noise[torch.as_tensor(which, device=self._device)]) * temperature
