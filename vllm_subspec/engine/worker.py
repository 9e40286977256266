# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""vLLM's workers with streaming and drafting put in."""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import torch
from vllm.distributed import get_tp_group
from vllm.model_executor.offloader.base import set_offloader
from vllm.v1.worker import cpu_worker
from vllm.v1.worker.gpu_worker import Worker

from vllm_subspec.config import SubspecOptions
from vllm_subspec.engine import attention
from vllm_subspec.engine.failure import FailedOutput
from vllm_subspec.engine.loading import Loading
from vllm_subspec.engine.proposer import SubspecProposer
from vllm_subspec.engine.runner import SubspecCPUModelRunner, SubspecGPUModelRunner
from vllm_subspec.weights.streaming import RING_OPERATORS

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput


class SubspecWorker(Worker):
    """What both workers share; put before a platform's worker class among the bases."""

    @property
    def options(self) -> SubspecOptions:
        return SubspecOptions.parse(self.vllm_config.additional_config["subspec"])

    def init_device(self) -> None:
        super().init_device()
        runner = self.model_runner
        proposer = runner.drafter
        assert isinstance(proposer, SubspecProposer)
        # vLLM stops drafting for the whole batch when one request nears its limit; our proposer
        # clips each row by itself.
        runner.effective_drafter_max_model_len = sys.maxsize
        options = self.options
        if options.branching > 1:
            attention.install(runner.device)
        rank = get_tp_group().rank_in_group
        self.loading = Loading(self.vllm_config, options, rank, runner.device)
        proposer.bind(runner, self.loading.build_draft)
        self.proposer = proposer

    def load_model(self, **kwargs: Any) -> None:
        set_offloader(self.loading.offloader)
        with self.loading.active():
            super().load_model(**kwargs)

    def initialize_from_config(self, kv_cache_config: Any) -> Any:
        initialized = super().initialize_from_config(kv_cache_config)
        if self.options.branching > 1:
            attention.check(self.device, self.model_runner.attention_layers())
        return initialized

    def compile_or_warm_up_model(self) -> Any:
        times = super().compile_or_warm_up_model()
        if failure := self._pass_failure():
            raise RuntimeError(f'method "subspec" cannot read its streamed weights: {failure}')
        return times

    def execute_model(self, scheduler_output: "SchedulerOutput") -> Any:
        self.proposer.pass_begins()
        output = super().execute_model(scheduler_output)
        failure = self._pass_failure()
        if failure is None:
            return output
        self.model_runner.execute_model_state = None
        self.model_runner._draft_token_ids = None
        self.model_runner._draft_token_req_ids = None
        return FailedOutput.of(scheduler_output, failure)

    def _pass_failure(self) -> str | None:
        """Why the pass that has just run must not be believed, on any rank of the group."""
        ring = self.loading.ring
        if ring is None:
            return None
        failure = ring.take_failure()
        group = get_tp_group()
        if group.world_size > 1:
            # float32: vLLM's shared-memory all-reduce on the CPU has no integers.
            flag = torch.tensor([float(failure is not None)], device=self.device)
            if not group.all_reduce(flag).item():
                return None
            return str(failure or "another rank could not read its weights")
        return str(failure) if failure is not None else None

    def set_speculation(self, enabled: bool) -> None:
        """Switch drafting off or on while serving (a `collective_rpc`)."""
        self.proposer.enabled = enabled

    def set_drafting(
        self,
        branching: int | None = None,
        depth: int | None = None,
        pruning: Literal["dynamic", "none"] | None = None,
    ) -> None:
        """Draft by other options while serving (a `collective_rpc`); None: as configured.

        Raises:
            ValueError: a value that the option of that name does not allow, or trees in an engine
                that was started for chains.
        """
        changed = {"branching": branching, "depth": depth, "pruning": pruning}
        given = {name: value for name, value in changed.items() if value is not None}
        options = SubspecOptions.parse({**self.options.to_json_dict(), **given})
        if options.branching > 1 and self.options.branching == 1:
            raise ValueError('an engine started with "branching" 1 has no tree attention')
        self.proposer.configure(options.branching, options.depth, options.pruning)

    def drafting_stats(self) -> dict[str, float]:
        """Totals of drafting and verifying (`engine.metrics.DraftingStats`)."""
        return dict(vars(self.proposer.stats))

    def memory_plan(self) -> dict[str, Any]:
        """The memory plan (`core.plan.MemoryPlan`) and where the streamed weights come from."""
        plan = dataclasses.asdict(self.loading.plan)
        return plan | {"total": self.loading.plan.total, "store": self.loading.store_path}

    def streaming_stats(self) -> dict[str, float]:
        """Counters of this rank's ring (`weights.ring.RingStats`); empty when nothing streams."""
        ring = self.loading.ring
        return {} if ring is None else dict(vars(ring.stats))

    def shutdown(self) -> None:
        if self.loading.ring is not None:
            self.loading.ring.close()
        if self.options.branching > 1:
            attention.uninstall(self.device)
        super().shutdown()


class SubspecCPUWorker(SubspecWorker, cpu_worker.CPUWorker):
    def init_device(self) -> None:
        with _cpu_runner(SubspecCPUModelRunner):
            super().init_device()


class SubspecGPUWorker(SubspecWorker):
    def init_device(self) -> None:
        # Graphs are cut where blocks are awaited and released (see `method`).
        if self.vllm_config.compilation_config.splitting_ops:
            self.vllm_config.compilation_config.splitting_ops += RING_OPERATORS
        super().init_device()

    def _make_model_runner(self) -> SubspecGPUModelRunner:
        return SubspecGPUModelRunner(self.vllm_config, self.device)


@contextlib.contextmanager
def _cpu_runner(kind: type[SubspecCPUModelRunner]) -> Iterator[None]:
    """vLLM's CPU worker makes its runner in the middle of `init_device`, by this name."""
    original = cpu_worker.CPUModelRunner
    cpu_worker.CPUModelRunner = kind
    try:
        yield
    finally:
        cpu_worker.CPUModelRunner = original
