# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""vLLM's ``custom_class`` proposer over a `Drafter`.

vLLM calls `propose` after each step with the tokens it has just emitted. A row that is still in
prefill has emitted none and drafts nothing; every other row may draft as much as it can still
verify and emit: one row near its end shortens only its own draft.
"""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group

from vllm_subspec.config import SubspecOptions
from vllm_subspec.core.acceptance import verdicts
from vllm_subspec.core.cost import DepthController, FullGrowth, Round
from vllm_subspec.core.draft_tokens import DraftTokens
from vllm_subspec.drafters.base import DraftRow
from vllm_subspec.drafters.substitute import SubstituteDrafter
from vllm_subspec.engine.draft_forward import DraftForward
from vllm_subspec.engine.metrics import DraftingStats
from vllm_subspec.engine.verification import Verification

if TYPE_CHECKING:
    from vllm_subspec.engine.runner import TreeRunner


class SubspecProposer:
    """Constructed by vLLM's runner; `bind` and `load_model` complete it before first use."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        self.options = SubspecOptions.parse(vllm_config.additional_config["subspec"])
        self.enabled = True
        self.stats = DraftingStats()
        self._max_model_len = vllm_config.model_config.max_model_len
        self._tp_size = vllm_config.parallel_config.tensor_parallel_size
        self._drafters: dict[tuple[int, int, str], SubstituteDrafter] = {}
        self._pass_began: float | None = None
        self._last_draft_seconds = 0.0

    def bind(self, runner: "TreeRunner", build_draft: Callable[[nn.Module], nn.Module]) -> None:
        self._runner = runner
        self._build_draft = build_draft
        options = self.options
        self.configure(options.branching, options.depth, options.pruning)

    def configure(self, branching: int, depth: int, pruning: Literal["dynamic", "none"]) -> None:
        """Draft by these options from now on; what was learnt under them before is still known."""
        key = (branching, depth, pruning)
        if key not in self._drafters:
            growth = DepthController(depth) if pruning == "dynamic" else FullGrowth(depth)
            self._drafters[key] = SubstituteDrafter(
                growth, branching, self.options.draft_temperature, self._runner.device
            )
        self.drafter = self._drafters[key]

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
    ) -> list[DraftTokens]:
        """The draft of every row of the batch; an empty one for rows that draft nothing."""
        began = time.perf_counter()
        self._learn(sampled_token_ids, began)
        drafts = [DraftTokens.none() for _ in sampled_token_ids]
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
        forward = DraftForward(
            self._runner,
            self._draft,
            np.array(indices),
            np.array(positions),
            np.array([row.slots for row in rows]),
        )
        for index, draft in zip(indices, self.drafter.propose(rows, forward), strict=True):
            drafts[index] = draft
        self._last_draft_seconds = time.perf_counter() - began
        return drafts

    def _row(self, index: int, root: int, position: int) -> DraftRow | None:
        """The row whose newest token sits at ``position``; None if it may not draft."""
        request_id = self._runner.input_batch.req_ids[index]
        request = self._runner.requests[request_id]
        params = request.sampling_params
        # The scheduler fills a sequence up to max_model_len - 1 computed tokens, and a round emits
        # at most one token more than the draft is deep.
        limit = min(self.options.num_speculative_tokens, self._max_model_len - 2 - position)
        depth = min(self.drafter.growth.max_steps, limit)
        if params.max_tokens is not None:
            depth = min(depth, params.max_tokens - len(request.output_token_ids) - 1)
        if depth < 1:
            return None
        slots = min(self.options.num_speculative_tokens, self._max_model_len - position)
        if params.temperature < 1e-5:
            return DraftRow(request_id, root, depth, limit, slots)
        return DraftRow(
            request_id,
            root,
            depth,
            limit,
            slots,
            params.temperature,
            params.top_k,
            params.top_p,
            self._runner.seed_stream(request_id).ahead(depth),
        )

    def _learn(self, sampled_token_ids: list[list[int]], now: float) -> None:
        """What became of the last drafts, and what the round cost."""
        verification = self._runner.verification
        walks = verification.walks
        assert walks is not None
        drafted = verification.sizes > 0
        for draft, path in zip(verification.drafts, walks.paths, strict=True):
            nodes, accepted, first = verdicts(draft.tree, path)
            self.drafter.growth.acceptance.observe(draft.confidence[nodes], accepted, first)
        # Prompt chunks and rows without a draft cost time that says nothing about draft tokens.
        if drafted.all() and all(sampled_token_ids) and self._pass_began is not None:
            emitted = sum(len(tokens) for tokens in sampled_token_ids)
            self._record(verification, emitted, now - self._pass_began)

    def _record(self, verification: Verification, emitted: int, verify_seconds: float) -> None:
        rows, nodes = len(verification.drafts), int(verification.sizes.sum())
        last = self.drafter.last
        # Between the steps and the pass lies a little that belongs to neither: the round's rest.
        rest = self._last_draft_seconds - sum(last.seconds) + verify_seconds
        rest, *step_seconds = self._agree(rest, *last.seconds)
        self.drafter.growth.observe_round(
            Round(rows, last.nodes, step_seconds, nodes + rows, emitted, rest)
        )
        stats = self.stats
        stats.rounds += 1
        stats.request_rounds += rows
        stats.draft_nodes += nodes
        stats.draft_depth += sum(int(draft.tree.depths.max()) for draft in verification.drafts)
        stats.emitted_tokens += emitted
        stats.steps += len(last.nodes)
        stats.expanded_nodes += sum(last.nodes)
        stats.forward_seconds += last.forward_seconds
        stats.draft_seconds += self._last_draft_seconds
        stats.verify_seconds += verify_seconds

    def _agree(self, *seconds: float) -> list[float]:
        """Rank 0's clock: all ranks must decide alike."""
        if self._tp_size == 1:
            return list(seconds)
        clock = torch.tensor(seconds, dtype=torch.float64, device=self._runner.device)
        agreed: list[float] = get_tp_group().broadcast(clock, src=0).tolist()
        return agreed
