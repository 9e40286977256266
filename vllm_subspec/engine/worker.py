# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""vLLM's workers with streaming and drafting put in."""

import contextlib
import sys
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.model_executor.offloader.base import NoopOffloader, get_offloader, set_offloader
from vllm.v1.worker.gpu_worker import Worker

from vllm_subspec.config import SubspecOptions
from vllm_subspec.engine import attention, beside, in_use
from vllm_subspec.engine.control import DraftingControl, StreamingControl
from vllm_subspec.engine.failure import FailedOutput
from vllm_subspec.engine.loading import Loading
from vllm_subspec.engine.proposer import DraftProposer
from vllm_subspec.engine.runner import TreeRunner
from vllm_subspec.weights.host_memory import forget_peak
from vllm_subspec.weights.ring import RingStats

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput


class DraftingWorker(DraftingControl, Worker):
    """What all workers share; put before a platform's worker class among the bases."""

    def __new__(cls, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> "DraftingWorker":
        return super().__new__(beside.joined(cls, vllm_config))

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        in_use.worker_begins(self.options.METHOD)
        self._begun = True

    def init_device(self) -> None:
        super().init_device()
        runner = self.model_runner
        if not (isinstance(runner, TreeRunner) and isinstance(runner.drafter, DraftProposer)):
            raise ValueError(
                f'method "{self.options.METHOD}" works in a model runner of its own, but '
                f"{self._others()} made {type(runner).__name__}: remove it"
            )
        # vLLM stops drafting for the whole batch when one request nears its limit; our proposer
        # clips each row by itself.
        runner.effective_drafter_max_model_len = sys.maxsize
        if self.options.trees:
            attention.install(runner.device)
        self.proposer = runner.drafter
        self._bind()

    def _others(self) -> str:
        extra: Any = self.vllm_config.additional_config
        return str(extra.get(beside.KEY, "another plugin"))

    def _bind(self) -> None:
        """Give the proposer what it drafts with."""
        self.proposer.bind(self.model_runner, None)

    def initialize_from_config(self, kv_cache_config: Any) -> Any:
        initialized = super().initialize_from_config(kv_cache_config)
        runner, options = self.model_runner, self.options
        if len(runner.attn_groups) != 1:
            raise ValueError(
                f'method "{options.METHOD}" needs the same kind of attention in all layers of the '
                "target and of the models that draft for it: use models without sliding windows"
            )
        if options.trees:
            names = [name for group in runner.attn_groups[0] for name in group.layer_names]
            layers = runner.compilation_config.static_forward_context
            paged = {name: layers[name] for name in names}
            attention.check(self.device, paged, options.METHOD, options.trees)
        self.set_drafting()
        return initialized

    def execute_model(self, scheduler_output: "SchedulerOutput") -> Any:
        self.proposer.pass_begins()
        return super().execute_model(scheduler_output)

    def shutdown(self) -> None:
        if self.options.trees:
            attention.uninstall(self.device)
        super().shutdown()
        if self._begun:  # vLLM may say it twice
            self._begun = False
            in_use.worker_ends()


class SubspecWorker(StreamingControl, DraftingWorker):
    """Streams the target's weights and drafts with their substitutes."""

    def _bind(self) -> None:
        options = self.options
        assert isinstance(options, SubspecOptions)
        rank = get_tp_group().rank_in_group
        self.loading = Loading(self.vllm_config, options, rank, self.model_runner.device)
        self.proposer.bind(self.model_runner, self.loading.build_draft, self._ring_stats)

    def load_model(self, **kwargs: Any) -> None:
        set_offloader(self.loading.offloader)
        with self.loading.active():
            super().load_model(**kwargs)
        # While loading, pages of the checkpoint's files count, which the kernel can take back.
        forget_peak()

    def reload_weights(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            'method "subspec" streams the weights that it was started with: restart to serve others'
        )

    update_weights = reload_weights

    def determine_available_memory(self) -> Any:
        with self._quiet_ring():
            return super().determine_available_memory()

    def _quiet_ring(self) -> contextlib.AbstractContextManager[None]:
        """While CUDA graphs are captured no other thread may wait for an event."""
        ring = self.loading.ring
        return contextlib.nullcontext() if ring is None else ring.transfer.quiet()

    def compile_or_warm_up_model(self) -> Any:
        with self._quiet_ring():
            times = super().compile_or_warm_up_model()
        if failure := self._pass_failure():
            raise RuntimeError(f'method "subspec" cannot use its streamed weights: {failure}')
        return times

    def execute_model(self, scheduler_output: "SchedulerOutput") -> Any:
        output = super().execute_model(scheduler_output)
        failure = self._pass_failure(scheduler_output.total_num_scheduled_tokens > 0)
        if failure is None:
            return output
        self.model_runner.execute_model_state = None
        self.model_runner._draft_token_ids = None
        self.model_runner._draft_token_req_ids = None
        return FailedOutput.of(scheduler_output, failure)

    def _pass_failure(self, ran: bool = False) -> str | None:
        """Why the pass that has just run must not be believed, on any rank of the group."""
        ring = self.loading.ring
        if ring is None:
            return None
        failure = ring.take_failure(ran)
        group = get_tp_group()
        if group.world_size > 1:
            # float32: vLLM's shared-memory all-reduce on the CPU has no integers.
            flag = torch.tensor([float(failure is not None)], device=self.device)
            if not group.all_reduce(flag).item():
                return None
            return str(failure or "another rank could not use its weights")
        return str(failure) if failure is not None else None

    def _ring_stats(self) -> RingStats:
        return RingStats() if self.loading.ring is None else self.loading.ring.stats

    def shutdown(self) -> None:
        if self.loading.ring is not None:
            self.loading.ring.close()
        if get_offloader() is self.loading.offloader:  # vLLM's own, of the process, outlives this
            set_offloader(NoopOffloader())
        super().shutdown()
