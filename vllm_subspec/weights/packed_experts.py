# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""The order of expert weights that vLLM's fused kernel reads, and back.

On CUDA the Triton kernel reads them as the checkpoint has them. On a CPU they are packed into a
tensor of the same size, in tiles of 32 output rows. Unlike a packed linear this is a plain tensor,
which may lie anywhere.
"""

import functools
from typing import Any, Self

import torch
from vllm import _custom_ops as ops
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)

_TILE = 32  # rows: no kernel of vLLM's packs across more
_ACTIVATIONS = (MoEActivation.SILU, MoEActivation.GELU, MoEActivation.GELU_TANH)


def refusal(experts: RoutedExperts) -> str | None:
    """Why these cannot be streamed and substituted, and what to do; None if they can."""
    method = experts.quant_method
    config = experts.moe_config
    if not isinstance(method, UnquantizedFusedMoEMethod):
        return "its experts are quantized; serve the full-precision model"
    if config.moe_parallel_config.use_ep:
        return "its experts are spread over ranks; remove --enable-expert-parallel"
    if method.unquantized_backend not in (
        UnquantizedMoeBackend.CPU,
        UnquantizedMoeBackend.TRITON,
    ):
        return (
            f"vLLM's {method.unquantized_backend.value} kernel keeps experts in an order of its "
            "own; set --moe-backend triton"
        )
    if config.has_bias or experts.apply_router_weight_on_input:
        return "experts with biases or weighted inputs have not been tested; use another model"
    if config.activation not in _ACTIVATIONS or experts.swiglu_limit is not None:
        return f"{config.activation.value} experts have not been tested; use another model"
    if experts.w13_weight.shape[1] % (2 * _TILE) or experts.w2_weight.shape[1] % _TILE:
        return (
            f"its experts have {experts.w13_weight.shape[1] // 2} x "
            f"{experts.w2_weight.shape[1]} channels on a rank, no multiples of {_TILE}; use "
            "another --tensor-parallel-size or another model"
        )
    return None


class Order:
    """How a kernel's experts lie in memory.

    Args:
        isa: of vLLM's packing for a CPU; None: as in the checkpoint.
    """

    def __init__(self, isa: str | None) -> None:
        self._isa = isa
        self.name = isa or "out, in"

    @classmethod
    def of(cls, experts: RoutedExperts) -> Self:
        method = experts.quant_method
        packs = method.unquantized_backend is UnquantizedMoeBackend.CPU
        return cls(method.experts_cls.isa if packs else None)

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        """``[experts, out, in]``, a new tensor if packed at all."""
        return weight if self._isa is None else ops.cpu_prepack_moe_weight(weight, self._isa)

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """The inverse of `pack`.

        Raises RuntimeError where a kernel of vLLM's packs otherwise than in tiles.
        """
        if self._isa is None:
            return packed
        source = _sources(self._isa, packed.shape[2], packed.dtype)
        tiles = packed.reshape(-1, source.numel())
        weight = torch.empty_like(tiles).index_copy_(1, source, tiles).view(packed.shape)
        if not torch.equal(self.pack(weight[:1]), packed[:1]):
            raise RuntimeError(f"vLLM packs experts for {self._isa} in an unknown order")
        return weight


@functools.lru_cache(maxsize=4)
def _sources(isa: str, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Where each element of a packed tile was before, ``[32 * columns]`` int64.

    Found out by packing numbered elements: their numbers' bits, as elements hold them.
    """
    numbers = torch.arange(_TILE * columns, dtype=torch.int32)
    word: Any = torch.int16 if dtype.itemsize == 2 else torch.int32
    packed = [
        ops.cpu_prepack_moe_weight(part.contiguous().view(dtype).view(1, _TILE, columns), isa)
        for part in numbers.view(word).view(numbers.numel(), -1).unbind(1)
    ]
    words = torch.stack([part.flatten().view(word) for part in packed], dim=1)
    return words.view(torch.int32).flatten().long()
