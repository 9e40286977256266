# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""The workers on CUDA."""

from vllm_subspec.engine.runner import TreeRunner
from vllm_subspec.engine.worker import DraftingWorker, SubspecWorker
from vllm_subspec.weights.streaming import RING_OPERATORS


class _OnGPU(DraftingWorker):
    def _make_model_runner(self) -> TreeRunner:
        return TreeRunner(self.vllm_config, self.device)


class HierspecGPUWorker(_OnGPU):
    pass


class SubspecGPUWorker(_OnGPU, SubspecWorker):
    def init_device(self) -> None:
        # Graphs are cut where blocks are awaited and released (see `method`).
        if self.vllm_config.compilation_config.splitting_ops:
            self.vllm_config.compilation_config.splitting_ops += RING_OPERATORS
        super().init_device()
