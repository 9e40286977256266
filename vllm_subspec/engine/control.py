# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""What may be asked of a running worker, and told to it: vLLM's ``collective_rpc``.

``llm.collective_rpc("statistics")``; of a server that runs with ``VLLM_SERVER_DEV_MODE=1``,
``POST /collective_rpc`` with ``{"method": "set_speculation", "args": [false]}``. All ranks answer.
"""

import dataclasses
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group

from vllm_subspec.config import HierspecOptions, SubspecOptions
from vllm_subspec.engine.drafting import Pruning
from vllm_subspec.engine.loading import Loading
from vllm_subspec.engine.method import options_of
from vllm_subspec.engine.proposer import DraftProposer
from vllm_subspec.weights.host_memory import peak_memory
from vllm_subspec.weights.ring import RingStats


class DraftingControl:
    """Of a worker that drafts."""

    vllm_config: VllmConfig
    device: torch.device
    proposer: DraftProposer

    @property
    def options(self) -> SubspecOptions | HierspecOptions:
        options = options_of(self.vllm_config)
        assert options is not None
        return options

    def set_speculation(self, enabled: bool) -> None:
        """Switch drafting off or on while serving (a `collective_rpc`)."""
        self.proposer.enabled = enabled

    def set_drafting(
        self,
        branching: int | None = None,
        depth: int | None = None,
        pruning: Pruning | None = None,
        hierarchy: bool = True,
    ) -> None:
        """Draft by other options while serving (a `collective_rpc`); None: as configured.

        Args:
            branching, depth: of the trees that method "subspec" grows.
            hierarchy: False leaves the option "drafter" out.

        Raises:
            ValueError: a value that the option of that name does not allow, or trees in an engine
                that was started for chains.
        """
        changed = {"branching": branching, "depth": depth, "pruning": pruning}
        given = {name: value for name, value in changed.items() if value is not None}
        options = type(self.options).parse({**self.options.to_json_dict(), **given})
        if options.trees and not self.options.trees:
            raise ValueError('an engine started with "branching" 1 has no tree attention')
        if isinstance(options, SubspecOptions):
            size = options.branching, options.depth
        else:
            size = 1, options.num_speculative_tokens
        self.proposer.configure(*size, options.pruning, hierarchy)

    def round_log(self, since: float = 0.0) -> dict[str, Any]:
        """All that is known of rounds (`core.round_log.RoundLog.to_json_dict`)."""
        return self.proposer.log.to_json_dict(since)

    def peak_memory(self) -> int:
        """Bytes of the device that this rank has ever had at once. Without a GPU those of host
        memory since it was loaded, the interpreter and its libraries included."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_reserved(self.device)
        return peak_memory()

    def statistics(self, seen: int = 0) -> dict[str, Any]:
        """What the server's metrics are made of (`core.metrics` has their meanings).

        Args:
            seen: rounds whose times are known already; the newest thousands are remembered.

        Returns:
            "rank" and "rounds", the number of rounds so far; totals since the start in "counters"
            and, by depth or by value, in "by_depth" and "distributions"; the times of the rounds
            not seen in "seconds"; "gauges".
        """
        log = self.proposer.log
        new = log.newest(seen)
        return {
            "rank": get_tp_group().rank_in_group,
            "rounds": log.totals.rounds,
            "counters": {
                "rounds": log.totals.rounds,
                "rested_rounds": log.totals.rested,
                "draft_tokens": log.totals.draft_nodes,
                "emitted_tokens": log.totals.emitted_tokens,
            },
            "by_depth": {
                "tested_tokens": log.by_depth.tested.tolist(),
                "accepted_tokens": log.by_depth.accepted.tolist(),
            },
            "distributions": {
                "accepted_depth": log.emitted.tolist()[1:],
                "draft_nodes": log.draft_nodes.tolist(),
                "draft_depth": log.draft_depths.tolist(),
            },
            "seconds": {
                "draft_seconds": [record.draft_seconds for record in new],
                "verify_seconds": [record.verify_seconds for record in new],
                "stall_seconds": [record.stall_seconds for record in new],
            },
            "gauges": {
                "speculating": int(self.proposer.enabled),
                "peak_memory_bytes": self.peak_memory(),
            },
        }


class StreamingControl(DraftingControl):
    """Of a worker whose target's weights are streamed."""

    loading: Loading

    def memory_plan(self) -> dict[str, Any]:
        """The memory plan (`core.plan.MemoryPlan`) and where the streamed weights come from."""
        plan = dataclasses.asdict(self.loading.plan)
        return plan | {"total": self.loading.plan.total, "store": self.loading.store_path}

    def streaming_stats(self) -> dict[str, float]:
        """Counters of this rank's ring (`weights.ring.RingStats`); empty when nothing streams."""
        return {} if self.loading.ring is None else dict(vars(self.loading.ring.stats))

    def block_intervals(self, since: float = 0.0) -> dict[str, list[dict[str, float]]]:
        """When blocks were read and waited for (`weights.ring.Interval`), from ``since`` on.

        Returns:
            "loads": reads by a background thread; none where the device copies by itself.
            "waits": times that the pass stood still for a block; with CUDA only for its read.
        """
        ring = self.loading.ring
        if ring is None:
            return {"loads": [], "waits": []}
        kinds = {"loads": ring.transfer.loads, "waits": list(ring.waits)}
        return {
            kind: [dataclasses.asdict(one) for one in intervals if one.began >= since]
            for kind, intervals in kinds.items()
        }

    def statistics(self, seen: int = 0) -> dict[str, Any]:
        """See `DraftingControl.statistics`; "store" says where streamed weights come from."""
        ring, loading = self.loading.ring, self.loading
        stats = RingStats() if ring is None else ring.stats
        known = super().statistics(seen)
        known["counters"] |= {
            "streamed_bytes": stats.bytes_streamed,
            "passes": stats.passes,
            "ring_blocks": stats.blocks,
            "ring_misses": stats.misses,
            "stream_stall_seconds": stats.stall_seconds,
            "read_seconds": 0.0 if ring is None else ring.transfer.read_seconds,
            "read_failures": stats.failures,
        }
        known["gauges"]["planned_memory_bytes"] = loading.plan.total
        source = "resident" if ring is None else "host" if loading.store_path is None else "disk"
        known["store"] = {"source": source, "reused": str(loading.store_reused).lower()}
        return known
