# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Where substitutes come from: quantized while the target loads, or a low-bit checkpoint."""

from collections.abc import Callable, Collection, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import (
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)

from vllm_subspec.config import SubspecOptions
from vllm_subspec.weights import kernels
from vllm_subspec.weights.checkpoint import SubstituteCheckpoint
from vllm_subspec.weights.kernels import SubstituteKernel
from vllm_subspec.weights.quantize import Quantizer, quantize
from vllm_subspec.weights.quantized_weight import QuantFormat, QuantizedWeight
from vllm_subspec.weights.streamable import Streamable
from vllm_subspec.weights.substitute_experts import Substitute, SubstituteExperts

if TYPE_CHECKING:
    from transformers import PretrainedConfig

logger = init_logger(__name__)

Keep = Callable[[str, Callable[[], QuantizedWeight]], QuantizedWeight]
"""Gets a matrix's name and what makes it, and returns the matrix, made now or before."""


def at_once(name: str, make: Callable[[], QuantizedWeight]) -> QuantizedWeight:
    """Keeps nothing."""
    return make()


def matrices(part: Streamable) -> dict[str, tuple[int, int]]:
    """Name and shape [out, in] of every matrix that is quantized for a part."""
    found: dict[str, tuple[int, int]] = {}
    for name in part.names:
        *experts, rows, columns = part.parameter(name).shape
        if experts:
            found |= {f"{name}.{i}": (rows, columns) for i in range(experts[0])}
        else:
            found[name] = rows, columns
    return found


FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""vLLM's fused linears and the checkpoint's parts of them, in the order of their rows."""


class SubstituteSource:
    """Makes the substitute of a linear or of experts, for this rank's shard of them.

    Args:
        rank: tensor-parallel rank.
        device: where the draft computes.

    Raises:
        ValueError: ``substitute`` names a checkpoint that is not of this model.
    """

    def __init__(
        self, config: VllmConfig, options: SubspecOptions, rank: int, device: torch.device
    ) -> None:
        self._options = options
        self._rank = rank
        self._device = device
        self._dtype = config.model_config.dtype
        self._checkpoint: SubstituteCheckpoint | None = None
        if options.substitute is not None:
            self._checkpoint = SubstituteCheckpoint.open(_local(options.substitute))
            target: PretrainedConfig = config.model_config.hf_text_config
            self._checkpoint.check_matches(target.to_dict())

    @property
    def format(self) -> QuantFormat:
        """Of what it quantizes."""
        return self._choice[1]

    @property
    def quantizer(self) -> Quantizer:
        return self._options.quantizer or ("hqq" if self._options.bits < 8 else "rtn")

    @property
    def searches(self) -> bool:
        """Whether making a substitute takes so long that the result is worth keeping."""
        return self._checkpoint is None and self.quantizer == "hqq"

    def estimate_nbytes(self, parts: Collection[Streamable]) -> int:
        """Bytes that the substitutes of a layer's ``parts`` will take.

        Raises ValueError when no kernel can hold one of them.
        """
        bits: int = self._options.bits
        group_size: int | None = self._options.group_size
        if self._checkpoint is not None:
            # One linear speaks for all: to ask each takes as long as loading them.
            some = next(iter(parts)).module
            assert isinstance(some, LinearBase)
            coded = self._checkpoint.weight(_checkpoint_names(some)[0]).format
            bits, group_size = coded.bits, coded.group_size
        shapes = [parameter.shape for part in parts for parameter in part.parameters]
        return sum(
            prod(stack)
            * kernels.estimate_nbytes(bits, group_size, self._device, self._dtype, rows, columns)
            for *stack, rows, columns in shapes
        )

    def substitute(
        self, part: Streamable, weights: Sequence[torch.Tensor], keep: Keep = at_once
    ) -> Substitute:
        """What stands in for ``part``'s module.

        Args:
            weights: full ones: a linear's [out, in], or those of experts, [experts, out, in] each;
                none at all if ``keep`` makes nothing.
            keep: called for every matrix with its name (`matrices`) and what quantizes it.
        """
        if isinstance(part.module, LinearBase):
            linear = part.module
            return self._linear(linear, weights, keep)
        gate_up, down = (
            [
                self._kept(keep, f"{name}.{expert}", weights, place, expert)
                for expert in range(part.parameter(name).shape[0])
            ]
            for place, name in enumerate(part.names)
        )
        return SubstituteExperts(gate_up, down)

    @property
    def _choice(self) -> tuple[type[SubstituteKernel], QuantFormat]:
        return kernels.choose(
            self._options.bits, self._options.group_size, self._device, self._dtype
        )

    def _quantize(self, weight: torch.Tensor) -> QuantizedWeight:
        return quantize(weight.to(self._device), self.format, self.quantizer)

    def _kept(
        self, keep: Keep, name: str, weights: Sequence[torch.Tensor], place: int, expert: int
    ) -> SubstituteKernel:
        return self._kernel(keep(name, lambda: self._quantize(weights[place][expert])))

    def _kernel(self, weight: QuantizedWeight) -> SubstituteKernel:
        return self._choice[0](weight.to(self._device), self._dtype)

    def _linear(
        self, linear: LinearBase, weights: Sequence[torch.Tensor], keep: Keep
    ) -> SubstituteKernel:
        if self._checkpoint is None:
            return self._kernel(keep("weight", lambda: self._quantize(weights[0])))
        (weight,) = weights
        coded = self._load(linear)
        kernel, _ = kernels.choose(
            coded.format.bits, coded.format.group_size, self._device, self._dtype
        )
        if tuple(coded.codes.shape) != tuple(weight.shape):
            raise ValueError(
                f'"substitute": {linear.prefix} has shape {tuple(coded.codes.shape)} there, '
                f"but {tuple(weight.shape)} in the model"
            )
        return kernel(coded, self._dtype)

    def _load(self, linear: LinearBase) -> QuantizedWeight:
        assert self._checkpoint is not None
        parts = [self._checkpoint.weight(name) for name in _checkpoint_names(linear)]
        if linear.tp_size > 1:
            parts = [self._shard(linear, i, part) for i, part in enumerate(parts)]
        return QuantizedWeight.concatenate([part.to(self._device) for part in parts])

    def _shard(self, linear: LinearBase, part: int, whole: QuantizedWeight) -> QuantizedWeight:
        """This rank's rows (or, of a row-parallel linear, columns) of one checkpoint tensor."""
        rank, size = self._rank, linear.tp_size
        if isinstance(linear, RowParallelLinear):
            width = whole.codes.shape[1] // size
            return whole.columns(rank * width, width)
        if isinstance(linear, QKVParallelLinear) and part > 0:
            rank, size = rank // linear.num_kv_head_replicas, size // linear.num_kv_head_replicas
        elif not isinstance(linear, QKVParallelLinear | MergedColumnParallelLinear):
            raise ValueError(
                f'"substitute" with tensor parallelism does not know how {linear.prefix} is '
                "sharded: remove it and quantize while loading"
            )
        height = whole.codes.shape[0] // size
        return whole.rows(rank * height, height)


def _checkpoint_names(linear: LinearBase) -> list[str]:
    parent, _, leaf = linear.prefix.rpartition(".")
    return [f"{parent}.{part}" for part in FUSED.get(leaf, (leaf,))]


def _local(name: str) -> Path:
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name))
