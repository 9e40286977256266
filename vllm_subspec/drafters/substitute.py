# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""SubSpec (arXiv 2509.18344): the draft is the target with low-bit substitutes, on its own pages.

Here it grows a chain for every row, all rows in one batched forward per step. A greedy row takes
the draft's most likely token; a sampled row draws from the draft's distribution under the request's
own temperature, top-k and top-p and hands that distribution over, so that rejection sampling
(arXiv 2211.17192) reproduces the target's distribution exactly, whatever the draft proposes.
"""

import numpy as np
import torch
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

from vllm_subspec.core.cost import AcceptanceModel, DepthController
from vllm_subspec.core.tree import TokenTree
from vllm_subspec.drafters.base import DraftRow, Forward, Proposal

# Keeps a drafting stream apart from every stream the target samples with: shared noise would tie
# the draft to the verdict on it and bias the output.
_STREAM = 0x5B5BEC

# A request with a seed drafts on while its next token is this likely to be accepted.
_SEEDED_SURVIVAL = 0.5


class SubstituteDrafter:
    """Drafts chains with a draft model, as deep as pays.

    How deep a row drafts decides how many random numbers verifying it takes. So the depth of a
    request that has a seed of its own follows from its own text alone, by an acceptance table that
    never learns: the same seed gives the same output, whatever the clock and its neighbours do.

    Args:
        depth: decides step by step whether another token pays, and learns from what happened.
        draft_temperature: sharpens the top-1 probability that is judged as confidence.
        seed: of the drafting stream; equal on all ranks of a tensor-parallel group.
    """

    def __init__(
        self, depth: DepthController, draft_temperature: float, seed: int, device: torch.device
    ) -> None:
        self.depth = depth
        self.steps = 0
        self._sharpness = 1.0 / draft_temperature
        self._device = device
        self._stream = torch.Generator(device=device).manual_seed(seed ^ _STREAM)
        self._seeded: dict[str, torch.Generator] = {}
        self._tested: dict[str, np.ndarray] = {}
        self._unlearned = AcceptanceModel()

    def learn(self, request_id: str, accepted: int) -> None:
        """``accepted`` tokens of the request's last chain were accepted by the target."""
        top1 = self._tested.pop(request_id, None)
        if top1 is not None and top1.size:
            verdicts = np.arange(top1.size) < accepted
            self.depth.acceptance.observe(top1[: accepted + 1], verdicts[: accepted + 1])

    @property
    def tracked(self) -> set[str]:
        """Requests about which something is remembered."""
        return self._seeded.keys() | self._tested.keys()

    def forget(self, request_ids: set[str]) -> None:
        for request_id in request_ids:
            self._seeded.pop(request_id, None)
            self._tested.pop(request_id, None)

    def propose(self, rows: list[DraftRow], forward: Forward) -> Proposal:
        n = len(rows)
        sampling = _Sampling(rows, self._device) if any(r.temperature > 0 for r in rows) else None
        limits = np.array([row.limit for row in rows])
        seeded = np.array([row.seed is not None and row.temperature > 0 for row in rows])
        drafted: list[torch.Tensor] = []
        distributions: list[torch.Tensor] = []
        top1 = np.zeros((n, int(limits.max())))
        survival = np.zeros_like(top1)
        frontier = np.arange(n)  # the rows that are drafted on
        alive = np.ones(n)
        tokens = torch.tensor([row.root for row in rows], device=self._device)
        self.depth.begin_round(n)
        step = 0
        while self.depth.keep_drafting(alive) or seeded[frontier].any():
            logits = forward.step(tokens).float()
            confidence = torch.softmax(logits * self._sharpness, dim=-1).amax(dim=-1)
            tokens = logits.argmax(dim=-1)
            if sampling is not None:
                probabilities = sampling.distribution(logits, frontier)
                picked = self._draw(probabilities, rows, frontier)
                tokens = torch.where(sampling.random(frontier), picked, tokens)
                distributions.append(_scatter(probabilities, frontier, n))
            drafted.append(_scatter(tokens, frontier, n))
            top1[frontier, step] = confidence.double().cpu().numpy()
            alive[frontier] = np.where(
                seeded[frontier],
                alive[frontier] * self._unlearned.estimate(top1[frontier, step]),
                self.depth.survival(alive[frontier], top1[frontier, step]),
            )
            survival[:, step] = alive * (np.isin(np.arange(n), frontier))
            step += 1
            going = limits[frontier] > step
            going &= ~seeded[frontier] | (alive[frontier] >= _SEEDED_SURVIVAL)
            if not going.all():
                alive[frontier[~going]] = 0.0
                frontier = frontier[going]
                if not frontier.size:
                    break
                kept = torch.as_tensor(np.flatnonzero(going), device=self._device)
                forward.keep(kept)
                tokens = tokens[kept]
        self.steps = step
        lengths = self.depth.lengths(survival[:, :step])
        own = (survival[:, :step] >= _SEEDED_SURVIVAL).sum(axis=1)
        lengths = np.minimum(np.where(seeded, np.maximum(own, 1), lengths), limits)
        chosen = torch.stack(drafted, dim=1).cpu().numpy()
        trees = []
        for i, row in enumerate(rows):
            end = int(lengths[i])
            trees.append(TokenTree.chain(chosen[i, :end], np.minimum.accumulate(survival[i, :end])))
            self._tested[row.request_id] = top1[i, :end].copy()
        return Proposal(trees, torch.stack(distributions, dim=1) if sampling else None)

    def _draw(
        self, probabilities: torch.Tensor, rows: list[DraftRow], frontier: np.ndarray
    ) -> torch.Tensor:
        """One token per row ``[m]`` of ``probabilities`` ``[m, vocab]``, by an exponential race."""
        race = torch.empty_like(probabilities).exponential_(generator=self._stream)
        for i, row in enumerate(frontier):
            request = rows[row]
            if request.seed is not None:
                generator = self._seeded.get(request.request_id)
                if generator is None:
                    generator = torch.Generator(device=self._device)
                    generator.manual_seed(request.seed ^ _STREAM)
                    self._seeded[request.request_id] = generator
                race[i].exponential_(generator=generator)
        return (probabilities / race).argmax(dim=-1)


class _Sampling:
    """The rows' own sampling parameters as tensors on the device."""

    def __init__(self, rows: list[DraftRow], device: torch.device) -> None:
        temperatures = torch.tensor([row.temperature for row in rows], device=device)
        self._random = temperatures > 0
        self._temperature = torch.where(self._random, temperatures, 1.0).unsqueeze(1)
        self._top_k = torch.tensor([row.top_k for row in rows], dtype=torch.int32, device=device)
        self._limits_k = bool((self._top_k > 0).any())
        self._top_p = torch.tensor([row.top_p for row in rows], device=device)
        self._limits_p = bool((self._top_p < 1).any())
        self._device = device

    def random(self, frontier: np.ndarray) -> torch.Tensor:
        return self._random[torch.as_tensor(frontier, device=self._device)]

    def distribution(self, logits: torch.Tensor, frontier: np.ndarray) -> torch.Tensor:
        """``[m, vocab]`` float32 probabilities under each row's temperature, top-k and top-p."""
        rows = torch.as_tensor(frontier, device=self._device)
        vocab = logits.shape[-1]
        top_k = None
        if self._limits_k:
            top_k = self._top_k[rows]
            top_k = torch.where(top_k > 0, top_k, vocab)
        top_p = self._top_p[rows] if self._limits_p else None
        logits = apply_top_k_top_p(logits / self._temperature[rows], top_k, top_p)
        return torch.softmax(logits, dim=-1, dtype=torch.float32)


def _scatter(values: torch.Tensor, frontier: np.ndarray, n: int) -> torch.Tensor:
    """``values`` ``[m, ...]`` of the frontier's rows as ``[n, ...]``, 0 elsewhere."""
    if len(frontier) == n:
        return values
    out = values.new_zeros((n, *values.shape[1:]))
    out[torch.as_tensor(frontier, device=values.device)] = values
    return out
