# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""The offloader: takes streamed layers out of device memory and brings them back through the ring.

vLLM asks its offloader to wrap the decoder layers as they are built. Those that are to be streamed
get linears whose weight has no memory of its own: while the checkpoint loads it lies in (lazily
committed) host memory, as soon as a layer is complete it is handed to an `Absorb` callback that
keeps it somewhere (`engine.loading`), and from then on it is a view into a ring slot.

Around the forward of each streamed layer two operators wait for its block and release it. They are
custom operators that declare the hidden state as changed, so that a compiler keeps them in place.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.model_loader.reload.meta import CopyCounter
from vllm.model_executor.offloader.base import BaseOffloader
from vllm.utils.torch_utils import direct_register_custom_op

from vllm_subspec.weights.plain_linear import plain_linear, stores_transposed
from vllm_subspec.weights.ring import Ring
from vllm_subspec.weights.store import BlockLayout, TensorSpec

RING_CONTEXT = "vllm_subspec.ring"
"""Key of the engine's ring in vLLM's static forward context, through which the operators find it.

Not a global and not an operator argument: several engines may live in one process, and a compiled
artefact may be loaded from a cache that another engine wrote.
"""


RING_OPERATORS = ("vllm::subspec_wait_block", "vllm::subspec_release_block")


class StreamedLinearMethod(UnquantizedLinearMethod):
    """An unquantized linear whose weight is a plain tensor in a ring slot.

    vLLM's own method would pack the weight into memory that the kernel owns, which cannot be
    re-filled.
    """

    # The weight is in host memory while it loads, and is not to be moved to a GPU and back.
    requires_device_loading = False

    def __init__(self, on_loaded: Callable[[], None]) -> None:
        super().__init__()
        self._on_loaded = on_loaded

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self._on_loaded()

    def apply(
        self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        return plain_linear(x, weight, bias)


@dataclass
class StreamedLayer:
    """One decoder layer whose linear weights go through the ring as one block."""

    index: int
    """Position among the model's decoder layers."""
    block: int
    """Position among the streamed layers."""
    module: nn.Module
    linears: dict[str, LinearBase]
    """By name within the layer."""
    layout: BlockLayout
    transposed: bool
    """Whether the block holds the weights as [in, out]."""
    absorbed: bool = False
    missing_numel: dict[str, int] = field(default_factory=dict)
    """Elements that the checkpoint has not yet delivered, by linear."""

    def loaded(self) -> dict[str, torch.Tensor]:
        """The full-precision weights, ``[out, in]`` each, by linear; valid until absorbed."""
        return {name: linear.weight.data for name, linear in self.linears.items()}

    def weights_in(self, block: torch.Tensor) -> dict[str, torch.Tensor]:
        """Views of a block as weights, ``[out, in]`` each."""
        views = self.layout.views(block)
        return {name: view.t() for name, view in views.items()} if self.transposed else views

    def stored(self, name: str) -> torch.Tensor:
        """The loaded weight ``name`` in the order in which the block holds it."""
        weight = self.linears[name].weight.data
        return weight.t() if self.transposed else weight

    def point_at(self, slot: torch.Tensor) -> None:
        """Make every weight a view into ``slot``."""
        for name, view in self.weights_in(slot).items():
            self.linears[name].weight.data = view


Absorb = Callable[[StreamedLayer], None]


def linears_of(layer: nn.Module) -> dict[str, LinearBase]:
    """The linears of a decoder layer that hold an unquantized weight, by name within it."""
    return {
        name: module
        for name, module in layer.named_modules()
        if isinstance(module, LinearBase) and type(module.quant_method) is UnquantizedLinearMethod
    }


def block_layout(name: str, linears: dict[str, LinearBase], transposed: bool) -> BlockLayout:
    def spec(key: str, weight: torch.Tensor) -> TensorSpec:
        shape = weight.t().shape if transposed else weight.shape
        return TensorSpec(key, tuple(shape), weight.dtype)

    return BlockLayout(name, tuple(spec(key, x.weight) for key, x in linears.items()))


class StreamingOffloader(BaseOffloader):
    """vLLM's offloader interface over a `Ring`.

    Args:
        choose_streamed: called once with the first decoder layer built; returns the indices of
            the layers to stream.
        absorb: called once per streamed layer, when its weights are complete.
        begin: called once when all layers are built, with the streamed ones; returns True when
            their weights are already kept somewhere, so that what the checkpoint delivers for
            them is dropped unread.
    """

    def __init__(
        self,
        choose_streamed: Callable[[nn.Module], Sequence[int]],
        absorb: Absorb,
        begin: Callable[[list[StreamedLayer]], bool],
    ) -> None:
        self._choose_streamed = choose_streamed
        self._absorb = absorb
        self._begin = begin
        self.layers: list[nn.Module] = []
        self.streamed: list[StreamedLayer] = []

    def wrap_modules(
        self, modules_generator: Generator[nn.Module, None, None], prefix: str = ""
    ) -> list[nn.Module]:
        if self.layers:
            raise ValueError("subspec cannot stream a model with more than one stack of layers")
        chosen: set[int] = set()
        for index, module in enumerate(modules_generator):
            if index == 0:
                chosen = set(self._choose_streamed(module))
            self.layers.append(module)
            if index in chosen:
                self._take_out(index, module)
        if self._begin(self.streamed):
            for layer in self.streamed:
                self._drop_loads(layer)
        else:
            for layer in self.streamed:
                self._count_loads(layer)
        return self.layers

    def attach(self, ring: Ring, slots: Sequence[torch.Tensor]) -> None:
        """Start streaming: weights become views of ``slots``, forwards wait and release."""
        for layer in self.streamed:
            if not layer.absorbed:
                raise RuntimeError(
                    f"decoder layer {layer.index} was not completely loaded from the checkpoint"
                )
            layer.point_at(slots[layer.block % ring.slots])
            layer.module.register_forward_pre_hook(_waiter(layer.block), with_kwargs=True)
            layer.module.register_forward_hook(_releaser(layer.block))

    def _take_out(self, index: int, module: nn.Module) -> None:
        linears = linears_of(module)
        weight = next(iter(linears.values())).weight
        transposed = stores_transposed(weight.device, weight.dtype)
        layout = block_layout(f"layers.{index}", linears, transposed)
        layer = StreamedLayer(index, len(self.streamed), module, linears, layout, transposed)
        waiting = set(linears)

        def loaded(name: str) -> Callable[[], None]:
            def mark() -> None:
                # Reached after all loading: only weights that no weight loader delivered
                # (dummy weights, say) are still waiting here.
                waiting.discard(name)
                if not waiting:
                    self._complete(layer)

            return mark

        for name, linear in linears.items():
            linear.quant_method = StreamedLinearMethod(loaded(name))
            if linear.weight.device.type != "cpu":
                linear.weight.data = torch.empty_like(linear.weight, device="cpu")
        self.streamed.append(layer)

    def _complete(self, layer: StreamedLayer) -> None:
        if layer.absorbed:
            return
        layer.absorbed = True
        self._absorb(layer)
        for linear in layer.linears.values():
            linear.weight.data = linear.weight.data.new_empty(0)

    def _count_loads(self, layer: StreamedLayer) -> None:
        """Notice when the checkpoint has delivered every element of the layer's weights."""

        def counting(name: str, load: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*args: Any, **kwargs: Any) -> Any:
                with CopyCounter() as counter:
                    result = load(*args, **kwargs)
                left = layer.missing_numel[name] - counter.copied_numel
                layer.missing_numel[name] = max(left, 0)
                if not any(layer.missing_numel.values()):
                    self._complete(layer)
                return result

            return counted

        for name, linear in layer.linears.items():
            layer.missing_numel[name] = linear.weight.numel()
            linear.weight.weight_loader = counting(name, linear.weight.weight_loader)

    def _drop_loads(self, layer: StreamedLayer) -> None:
        layer.absorbed = True
        for linear in layer.linears.values():
            linear.weight.weight_loader = lambda *args, **kwargs: None


def _waiter(block: int) -> Callable[..., None]:
    def wait(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        torch.ops.vllm.subspec_wait_block(_hidden_state((*args, *kwargs.values())), block)

    return wait


def _releaser(block: int) -> Callable[..., None]:
    def release(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        torch.ops.vllm.subspec_release_block(_hidden_state(outputs), block)

    return release


def _hidden_state(values: Sequence[Any]) -> torch.Tensor:
    for value in values:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value
    raise TypeError("a decoder layer was called without a floating point tensor")


def _ring() -> Ring:
    ring: Ring = get_forward_context().no_compile_layers[RING_CONTEXT]
    return ring


def _wait_block(hidden: torch.Tensor, block: int) -> None:
    _ring().wait(block)


def _release_block(hidden: torch.Tensor, block: int) -> None:
    _ring().release(block)


direct_register_custom_op("subspec_wait_block", _wait_block, mutates_args=["hidden"])
direct_register_custom_op("subspec_release_block", _release_block, mutates_args=["hidden"])
