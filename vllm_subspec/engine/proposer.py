# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""vLLM's ``custom_class`` proposer over a `Drafter`.

vLLM calls `propose` after each step with the tokens it has just emitted. A row that is still in
prefill has emitted none and drafts nothing; every other row may draft as many tokens as it can
still verify: one row near its end shortens only its own draft.
"""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group

from vllm_subspec.config import SubspecOptions
from vllm_subspec.core.cost import DepthController, Round
from vllm_subspec.drafters.base import DraftRow
from vllm_subspec.drafters.substitute import SubstituteDrafter
from vllm_subspec.engine.draft_forward import DraftForward
from vllm_subspec.engine.metrics import DraftingStats

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner


class SubspecProposer:
    """Constructed by vLLM's runner; `bind` and `load_model` complete it before first use."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        self.options = SubspecOptions.parse(vllm_config.additional_config["subspec"])
        self.enabled = True
        self.stats = DraftingStats()
        self._seed = vllm_config.model_config.seed
        self._max_model_len = vllm_config.model_config.max_model_len
        self._tp_size = vllm_config.parallel_config.tensor_parallel_size
        self._pass_began: float | None = None
        self._drafted: dict[str, int] = {}
        self._last_draft_seconds = 0.0
        self._last_steps = 0

    def bind(self, runner: "GPUModelRunner", build_draft: Callable[[nn.Module], nn.Module]) -> None:
        self._runner = runner
        self._build_draft = build_draft
        self.drafter = SubstituteDrafter(
            DepthController(self.options.num_speculative_tokens),
            self.options.draft_temperature,
            self._seed,
            runner.device,
        )

    def load_model(self, target: nn.Module) -> None:
        """Called by vLLM when the target's weights are loaded."""
        self._draft = self._build_draft(target)

    def pass_begins(self) -> None:
        """The target's next pass starts now."""
        self._pass_began = time.perf_counter()

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: np.ndarray,
        token_ids_cpu: np.ndarray,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Draft token ids for every row of the batch, ``[]`` for rows that draft nothing."""
        began = time.perf_counter()
        self._learn(sampled_token_ids, began)
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        self._drafted = {}
        if not self.enabled:
            return drafts
        rows, indices, positions = [], [], []
        for index, emitted in enumerate(sampled_token_ids):
            if not emitted:
                continue
            position = int(num_tokens_no_spec[index]) - 1
            row = self._row(index, int(token_ids_cpu[index, position]), position)
            if row is not None:
                rows.append(row)
                indices.append(index)
                positions.append(position)
        if not rows:
            return drafts
        forward = DraftForward(self._runner, self._draft, np.array(indices), np.array(positions))
        proposal = self.drafter.propose(rows, forward)
        for row, index, tree in zip(rows, indices, proposal.trees, strict=True):
            drafts[index] = tree.tokens.tolist()
            self._drafted[row.request_id] = len(tree)
        if proposal.probabilities is not None:
            # vLLM clears these before it calls the proposer and reads them when it samples next.
            self._runner._draft_probs = proposal.probabilities
            self._runner._draft_prob_req_ids = [row.request_id for row in rows]
        self._last_steps = self.drafter.steps
        self._last_draft_seconds = time.perf_counter() - began
        return drafts

    def _row(self, index: int, root: int, position: int) -> DraftRow | None:
        """The row whose newest token sits at ``position``; None if it may not draft."""
        request_id = self._runner.input_batch.req_ids[index]
        request = self._runner.requests[request_id]
        params = request.sampling_params
        # The scheduler fills a sequence up to max_model_len - 1 computed tokens, and a round emits
        # at most one token more than it drafted.
        limit = self._max_model_len - 2 - position
        if params.max_tokens is not None:
            limit = min(limit, params.max_tokens - len(request.output_token_ids) - 1)
        limit = min(limit, self.options.num_speculative_tokens)
        if limit < 1:
            return None
        greedy = params.temperature < 1e-5
        return DraftRow(
            request_id,
            root,
            limit,
            0.0 if greedy else params.temperature,
            params.top_k,
            params.top_p,
            params.seed,
        )

    def _learn(self, sampled_token_ids: list[list[int]], now: float) -> None:
        """What became of the last drafts, and what the round cost."""
        batch = self._runner.input_batch
        emitted = 0
        for index, tokens in enumerate(sampled_token_ids):
            if (request_id := batch.req_ids[index]) in self._drafted and tokens:
                self.drafter.learn(request_id, len(tokens) - 1)
                emitted += len(tokens)
        verified = sum(self._drafted.values()) + len(self._drafted)
        pure = set(self._drafted) == set(batch.req_ids) and all(sampled_token_ids)
        self.drafter.forget(self.drafter.tracked - set(batch.req_ids))
        if not self._drafted or not pure or self._pass_began is None:
            return
        draft_seconds, verify_seconds = self._agree(
            self._last_draft_seconds, now - self._pass_began
        )
        rows = len(self._drafted)
        self.drafter.depth.observe_round(
            Round(rows, self._last_steps, verified, emitted, draft_seconds, verify_seconds)
        )
        self.stats.rounds += 1
        self.stats.draft_tokens += verified - rows
        self.stats.emitted_tokens += emitted
        self.stats.steps += self._last_steps
        self.stats.draft_seconds += draft_seconds
        self.stats.verify_seconds += verify_seconds

    def _agree(self, *seconds: float) -> list[float]:
        """Rank 0's clock: all ranks must decide alike."""
        if self._tp_size == 1:
            return list(seconds)
        clock = torch.tensor(seconds, dtype=torch.float64, device=self._runner.device)
        agreed: list[float] = get_tp_group().broadcast(clock, src=0).tolist()
        return agreed
