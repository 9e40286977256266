# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""The modules of a decoder layer whose weights can be streamed: linears and fused experts.

Experts have two orders: the checkpoint's, from which substitutes are made, and the one that their
kernel reads, in which they are kept and streamed. So a block is computed from where it lies.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.linear import (
    LinearBase,
    ReplicatedLinear,
    UnquantizedLinearMethod,
)

from vllm_subspec.weights import packed_experts
from vllm_subspec.weights.plain_linear import Linear, plain_linear


class Streamable(ABC):
    """A module and those of its parameters that are streamed.

    A weight is ``[out, in]``, or ``[experts, out, in]``.
    """

    names: ClassVar[tuple[str, ...]]
    """Of the parameters."""
    order: str
    """Of kept weights. A weight store of another order cannot be used."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def parameter(self, name: str) -> nn.Parameter:
        parameter = getattr(self.module, name)
        assert isinstance(parameter, nn.Parameter)
        return parameter

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [self.parameter(name) for name in self.names]

    @abstractmethod
    def stream(self, on_loaded: Callable[[], None]) -> None:
        """From now on compute from weights that are refilled.

        Args:
            on_loaded: called by vLLM after all loading.
        """

    @abstractmethod
    def kept(self, weight: torch.Tensor) -> torch.Tensor:
        """A loaded weight in the order in which it is kept."""

    @abstractmethod
    def original(self, kept: torch.Tensor) -> torch.Tensor:
        """A kept weight in the checkpoint's order."""


class StreamableLinear(Streamable):
    names = ("weight",)
    order = "out, in"

    def __init__(self, module: LinearBase) -> None:
        super().__init__(module)

    def stream(self, on_loaded: Callable[[], None]) -> None:
        weight = self.parameter("weight")
        linear = plain_linear(weight.device, weight.dtype)
        self.module.quant_method = StreamedLinearMethod(linear, on_loaded)

    def kept(self, weight: torch.Tensor) -> torch.Tensor:
        return weight

    def original(self, kept: torch.Tensor) -> torch.Tensor:
        return kept


class StreamableExperts(Streamable):
    """Raises ValueError when these experts cannot be streamed."""

    names = ("w13_weight", "w2_weight")

    def __init__(self, module: RoutedExperts) -> None:
        super().__init__(module)
        reason = packed_experts.refusal(module)
        if reason is not None:
            raise ValueError(f'method "subspec" cannot stream {module.layer_name}: {reason}')
        self._order = packed_experts.Order.of(module)
        self.order = f"experts {self._order.name}"

    def stream(self, on_loaded: Callable[[], None]) -> None:
        # Registered as a submodule by vLLM, hence replaced as one.
        self.module.quant_method = StreamedExpertsMethod(self.module.moe_config, on_loaded)

    def kept(self, weight: torch.Tensor) -> torch.Tensor:
        return self._order.pack(weight)

    def original(self, kept: torch.Tensor) -> torch.Tensor:
        return self._order.unpack(kept)


def streamables_of(layer: nn.Module) -> dict[str, Streamable]:
    """The modules of a decoder layer that hold unquantized weights to stream, by name within it.

    Beside experts, replicated linears are routers and gates. These stay as they are: they are
    small, and a draft that routes like the target is a better one.

    Raises:
        ValueError: it has experts that cannot be streamed.
    """
    modules = dict(layer.named_modules())
    routed = any(isinstance(module, RoutedExperts) for module in modules.values())
    found: dict[str, Streamable] = {}
    for name, module in modules.items():
        if isinstance(module, RoutedExperts):
            found[name] = StreamableExperts(module)
        elif not isinstance(module, LinearBase) or (
            routed and isinstance(module, ReplicatedLinear)
        ):
            continue
        elif type(module.quant_method) is UnquantizedLinearMethod:
            found[name] = StreamableLinear(module)
    return found


class StreamedLinearMethod(UnquantizedLinearMethod):
    """An unquantized linear whose weight is a plain tensor in a ring slot.

    vLLM's own method would pack the weight into memory that the kernel owns, which cannot be
    re-filled.
    """

    # The weight is in host memory while it loads, and is not to be moved to a GPU and back.
    requires_device_loading = False

    def __init__(self, linear: Linear, on_loaded: Callable[[], None]) -> None:
        super().__init__()
        self._linear = linear
        self._on_loaded = on_loaded

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self._on_loaded()

    def apply(
        self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        rows = x.reshape(-1, x.shape[-1])
        return self._linear(rows, weight, bias).view(*x.shape[:-1], weight.shape[0])


class StreamedExpertsMethod(UnquantizedFusedMoEMethod):
    """Unquantized experts whose weights are plain tensors in a ring slot, packed as vLLM would.

    So vLLM's own kernel computes from them, and what it computes is the same to the last bit.
    """

    requires_device_loading = False

    def __init__(self, config: FusedMoEConfig, on_loaded: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_loaded = on_loaded

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        self._on_loaded()
        self._init_moe_kernel(layer)
