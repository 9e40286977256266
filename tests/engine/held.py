# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""What engines hold in memory. Whoever made a tensor, it is counted."""

import gc
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.v1.utils import CpuGpuBuffer

from vllm_subspec.weights.kernels import SubstituteKernel
from vllm_subspec.weights.resident_linear import resident_linear


def held_bytes() -> int:
    """Bytes of all living tensors of this process, and of what vLLM and a kernel packed for oneDNN,
    which shows no tensor; without the buffers of vLLM's batches, which are planned as workspace."""
    gc.unfreeze()  # an engine's objects are frozen when it is ready
    for _ in range(2):  # once more for what finalizers let go of
        gc.collect()
    held: dict[int, int] = {}  # by something that is shared where memory is
    buffers = set()
    for made in _made():
        if isinstance(made, torch.Tensor):
            if not made.is_meta and not isinstance(made, FakeTensor):
                held[made.untyped_storage().data_ptr()] = made.untyped_storage().nbytes()
        elif isinstance(made, CpuGpuBuffer):
            buffers |= {side.untyped_storage().data_ptr() for side in (made.cpu, made.gpu)}
        elif isinstance(made, SubstituteKernel):
            held[id(made)] = made.nbytes - sum(buffer.nbytes for buffer in made.buffers())
        elif (
            getattr(made, "cpu_linear", resident_linear) is not resident_linear
        ):  # ours packs nothing
            held[id(made.cpu_linear)] = _packed_bytes(made)
    gc.freeze()
    return sum(size for place, size in held.items() if place not in buffers)


def _made() -> list[Any]:
    kinds = (torch.Tensor, CpuGpuBuffer, SubstituteKernel, LinearBase, VocabParallelEmbedding)
    # Not by `isinstance`: it asks the object itself, and some import what they stand for.
    return [made for made in gc.get_objects() if issubclass(type(made), kinds)]


def _packed_bytes(module: Any) -> int:
    if isinstance(module, VocabParallelEmbedding):
        return int(module.weight.nbytes)  # which stays beside the packed one
    return int(module.output_size * module.input_size * module.params_dtype.itemsize)
