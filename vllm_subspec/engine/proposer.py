# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""vLLM's ``custom_class`` proposer over a `Drafter`.

vLLM calls `propose` after each step, when the tokens that it has emitted are sent. A row that is
still in prefill has emitted none and drafts nothing; every other row may draft as much as it can
still verify and emit: one row near its end shortens only its own draft.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig

from vllm_subspec.core.cost import ExpectedCosts, Round
from vllm_subspec.core.draft_tokens import DraftTokens
from vllm_subspec.core.resting import Reading
from vllm_subspec.core.round_log import RoundLog, RoundRecord
from vllm_subspec.drafters.base import ComputedRow, Drafter, DraftRow
from vllm_subspec.engine import ranks, spans
from vllm_subspec.engine.drafting import Models, Pruning
from vllm_subspec.engine.method import WORKERS, options_of
from vllm_subspec.engine.verification import Verification
from vllm_subspec.weights.ring import RingStats

if TYPE_CHECKING:
    from vllm_subspec.engine.runner import TreeRunner


class DraftProposer:
    """Constructed by vLLM's runner; `bind` and `load_model` complete it before first use."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        options = options_of(vllm_config)
        assert options is not None
        worker = vllm_config.parallel_config.worker_cls
        if worker not in WORKERS.values():
            raise ValueError(
                f'method "{options.METHOD}" brings its own worker, but another plugin has put '
                f"{worker} in its place: remove that plugin, or name it in --worker-cls"
            )
        self.options = options
        self.enabled = True
        self.log = RoundLog(options.limit)
        self._traced = vllm_config.observability_config.otlp_traces_endpoint is not None
        self._drafters: dict[tuple[int, int, Pruning, bool], Drafter] = {}
        self.expected: ExpectedCosts | None = None
        self._pass_began: float | None = None
        self._pass_ended = 0.0
        self._drafted = (0.0, 0.0)  # when the last drafting began and ended
        self._before_pass = RingStats()

    def bind(
        self,
        runner: "TreeRunner",
        build_substitute: Callable[[nn.Module], nn.Module] | None,
        ring_stats: Callable[[], RingStats] = RingStats,
    ) -> None:
        """What it drafts with, and the counters of the ring if the target's weights stream."""
        self._runner = runner
        self._models = Models(runner, self.options, build_substitute)
        self._ring_stats = ring_stats

    @property
    def target_layers(self) -> frozenset[str]:
        """The target's own attention layers."""
        return self._models.target_layers

    def load_model(self, target: nn.Module) -> None:
        """Called by vLLM when the target's weights are loaded."""
        self._models.load(target)

    def configure(self, branching: int, depth: int, pruning: Pruning, hierarchy: bool) -> None:
        """Draft by these options from now on; what was learnt under them before is still known.

        Called for the first time when the pages exist.
        """
        key = (branching, depth, pruning, hierarchy)
        if key not in self._drafters:
            self._drafters[key] = self._models.drafter(*key)
            if self.expected is not None:
                self._drafters[key].expect(self.expected)
        self.drafter = self._drafters[key]

    def expect(self, costs: ExpectedCosts) -> None:
        """What rounds of all drafters are expected to cost, before the first one."""
        self.expected = costs
        for drafter in self._drafters.values():
            drafter.expect(costs)

    def pass_begins(self) -> None:
        """The target's next pass starts now."""
        self._before_pass = replace(self._ring_stats())
        self._pass_began = time.perf_counter()

    def target_computed(
        self,
        verification: Verification,
        hidden: torch.Tensor,
        auxiliary: list[torch.Tensor] | None,
    ) -> None:
        """The target's pass is over and sampled from (`Models.settle`); `propose` follows, when the
        tokens have been sent."""
        self._models.settle(verification, hidden, auxiliary)
        self._pass_ended = time.perf_counter()

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: np.ndarray,
        token_ids_cpu: np.ndarray,
        slot_mappings: Any = None,
    ) -> list[DraftTokens]:
        """The draft of every row of the batch; an empty one for rows that draft nothing."""
        began = time.perf_counter()
        verification = self._runner.verification
        self._learn(verification, sampled_token_ids)
        drafts = [DraftTokens.none() for _ in sampled_token_ids]
        rows: list[DraftRow] = []
        ends: dict[int, int] = {}  # of the texts of requests that do not draft
        for index, emitted in enumerate(sampled_token_ids):
            end = int(num_tokens_no_spec[index])
            row = self._row(index, token_ids_cpu[index, :end]) if emitted else None
            if row is not None:
                rows.append(row)
            else:  # of a part of a prompt the token behind it is known
                ends[index] = end if emitted else int(verification.roots[index]) + 2
        reading = self._reading(verification) if rows and not all(sampled_token_ids) else None
        if rows and not self.drafter.pays(len(rows), reading):
            ends |= {row.index: row.history.size for row in rows}
            rows = []
            self.log.totals.rested += 1
        if ends:
            longest = self._models.max_length + 1
            self.drafter.follow(
                [
                    ComputedRow(
                        index,
                        verification.request_ids[index],
                        token_ids_cpu[index, : min(end, longest)].copy(),
                    )
                    for index, end in sorted(ends.items())
                ]
            )
        if rows:
            for row, draft in zip(rows, self.drafter.propose(rows), strict=True):
                drafts[row.index] = draft
            self._drafted = began, time.perf_counter()
        return drafts

    def _reading(self, verification: Verification) -> Reading | None:
        """The pass that is over read parts of prompts, and the next one goes on with it."""
        if self._pass_began is None:
            return None
        waited = self._ring_stats().stall_seconds - self._before_pass.stall_seconds
        seconds, waited = ranks.agree([self._pass_ended - self._pass_began, waited])
        return Reading(seconds, waited, tokens=int(verification.starts[-1]))

    def _row(self, index: int, history: np.ndarray) -> DraftRow | None:
        """The row whose text is ``history``; None if it may not draft."""
        if not self.enabled:
            return None
        options, position = self.options, history.size - 1
        request_id = self._runner.input_batch.req_ids[index]
        request = self._runner.requests[request_id]
        params = request.sampling_params
        # The scheduler fills a sequence up to max_model_len - 1 computed tokens, and a round emits
        # at most one token more than the draft is deep.
        limit = min(options.limit, self._runner.max_model_len - 2 - position)
        depth = min(self.drafter.max_depth, limit)
        if params.max_tokens is not None:
            depth = min(depth, params.max_tokens - len(request.output_token_ids) - 1)
        slots = min(options.lookahead, self._models.max_length - position)
        if depth < 1 or slots < 1:
            return None
        row = DraftRow(index, request_id, history.copy(), depth, limit, slots)
        if params.temperature < 1e-5:
            return row
        return replace(
            row,
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            seeds=self._runner.seed_stream(request_id).ahead(depth),
        )

    def _learn(self, verification: Verification, sampled_token_ids: list[list[int]]) -> None:
        """What became of the last drafts, and what the round cost."""
        assert verification.walks is not None
        self.drafter.observe(verification.drafts, verification.walks)
        if self._pass_began is None:
            return
        drafted = verification.sizes > 0
        if not drafted.any():
            (seconds,) = ranks.agree([self._pass_ended - self._pass_began])
            # A prompt costs more than its last token.
            pure = bool((np.diff(verification.starts) == 1).all())
            self.drafter.observe_plain(len(sampled_token_ids), seconds, pure)
            return
        emitted = sum(len(sampled_token_ids[row]) for row in drafted.nonzero()[0])
        record = self._record(verification, emitted, self._pass_began)
        # Prompt chunks and rows without a draft cost time that says nothing about draft tokens.
        if drafted.all() and all(sampled_token_ids):
            self._learn_costs(record)

    def _record(self, verification: Verification, emitted: int, pass_began: float) -> RoundRecord:
        drafts = [draft for draft in verification.drafts if draft]
        last, ring = self.drafter.last, self._ring_stats()
        record = RoundRecord(
            *self._drafted,
            pass_began,
            self._pass_ended,
            forward_seconds=last.forward_seconds,
            steps=len(last.nodes),
            expanded_nodes=sum(last.nodes),
            requests=len(drafts),
            nodes=sum(map(len, drafts)),
            depth=sum(int(draft.tree.depths.max()) for draft in drafts),
            emitted=emitted,
            stall_seconds=ring.stall_seconds - self._before_pass.stall_seconds,
            streamed_bytes=ring.bytes_streamed - self._before_pass.bytes_streamed,
        )
        assert verification.walks is not None
        self.log.add(record, verification.drafts, verification.walks)
        if self._traced:
            spans.record(record)
        return record

    def _learn_costs(self, record: RoundRecord) -> None:
        """Of a round in which all requests of the pass drafted."""
        last, rows = self.drafter.last, record.requests
        # Between the steps and the pass lies a little that belongs to neither: the round's rest.
        rest = record.draft_seconds - sum(last.seconds) + record.verify_seconds
        rest, *step_seconds = ranks.agree([rest, *last.seconds])
        self.drafter.observe_round(
            Round(rows, last.nodes, step_seconds, record.nodes + rows, record.emitted, rest)
        )
