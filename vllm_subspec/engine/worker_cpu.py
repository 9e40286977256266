# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""The workers on a CPU, whose memory is that of the machine or of a container."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from vllm import envs
from vllm.config import CompilationMode
from vllm.logger import init_logger
from vllm.utils import cpu_resource_utils
from vllm.v1.worker import cpu_worker

from vllm_subspec.core.plan import GIB
from vllm_subspec.engine.expected_costs import expected_costs
from vllm_subspec.engine.runner import TreeRunner
from vllm_subspec.engine.worker import DraftingWorker, SubspecWorker
from vllm_subspec.weights.host_memory import host_memory
from vllm_subspec.weights.resident_linear import resident_linears

logger = init_logger(__name__)


class TreeCPUModelRunner(TreeRunner, cpu_worker.CPUModelRunner):
    pass


class _OnCPU(DraftingWorker, cpu_worker.CPUWorker):
    def init_device(self) -> None:
        with _cpu_runner(TreeCPUModelRunner):
            super().init_device()

    def load_model(self, **kwargs: Any) -> None:
        with resident_linears():
            super().load_model(**kwargs)

    def determine_available_memory(self) -> int:
        with _page_cache_is_available():
            available: int = super().determine_available_memory()
        return available

    def compile_or_warm_up_model(self) -> Any:
        if envs.VLLM_USE_AOT_COMPILE and self.compilation_config.mode is not CompilationMode.NONE:
            logger.info(
                "On a CPU each start compiles the model again: vLLM keeps compiled code, but can "
                "load only what its own GPU backend has made"
            )
        return super().compile_or_warm_up_model()


class HierspecCPUWorker(_OnCPU):
    pass


class SubspecCPUWorker(_OnCPU, SubspecWorker):
    def compile_or_warm_up_model(self) -> Any:
        times = super().compile_or_warm_up_model()
        hidden = self.model_config.get_hidden_size()
        costs = expected_costs(self.loading, self.model_runner.get_model(), hidden)
        if costs is not None:
            self.proposer.expect(costs)
            logger.info(
                "Expected of one request: a draft step takes %.1f ms, a pass of the target %.1f ms",
                1000 * costs.step[1],
                1000 * costs.verify[1],
            )
        return times

    def determine_available_memory(self) -> int:
        available = super().determine_available_memory()
        if self.cache_config.kv_cache_memory_bytes is not None:
            return available
        # vLLM gives K/V whatever the process does not hold yet: also what full batches will need.
        plan = self.loading.plan
        planned = plan.kv_bytes + plan.device_bytes - plan.total
        if planned < available:
            logger.info("K/V gets %.2f GiB: what full batches need stays free", planned / GIB)
        return min(available, planned)


@contextlib.contextmanager
def _page_cache_is_available() -> Iterator[None]:
    """vLLM counts a container's page cache as memory in use. One that has just read a checkpoint
    larger than its limit would have no room left for any K/V."""
    original = cpu_worker.get_memory_node_info

    def info(node: int = 0) -> cpu_resource_utils.MemoryNodeInfo:
        found = original(node)
        if cpu_resource_utils.get_cgroup_memory_limit() is None:
            return found  # of the node alone: `host_memory` is of all nodes
        available = max(found.available_memory, host_memory().available)
        return replace(found, available_memory=min(available, found.total_memory))

    cpu_worker.get_memory_node_info = info
    try:
        yield
    finally:
        cpu_worker.get_memory_node_info = original


@contextlib.contextmanager
def _cpu_runner(kind: type[TreeCPUModelRunner]) -> Iterator[None]:
    """vLLM's CPU worker makes its runner in the middle of `init_device`, by this name."""
    original = cpu_worker.CPUModelRunner
    cpu_worker.CPUModelRunner = kind
    try:
        yield
    finally:
        cpu_worker.CPUModelRunner = original
