# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""The offloader: takes streamed layers out of device memory and brings them back through the ring.

vLLM asks its offloader to wrap the decoder layers as they are built. Those that are to be streamed
get modules whose weights have no memory of their own: while the checkpoint loads they lie in
(lazily committed) host memory, as soon as a layer is complete it is handed to an `Absorb` callback
that keeps it somewhere (`engine.loading`), and from then on they are views into a ring slot.

Around the forward of each streamed layer two operators wait for its block and release it. They are
custom operators that declare the hidden state as changed, so that a compiler keeps them in place.
"""

import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import nn
from vllm.forward_context import get_forward_context
from vllm.model_executor.model_loader.reload.meta import CopyCounter
from vllm.model_executor.offloader.base import BaseOffloader
from vllm.utils.torch_utils import direct_register_custom_op

from vllm_subspec.weights.ring import Ring
from vllm_subspec.weights.store import BlockLayout, TensorSpec
from vllm_subspec.weights.streamable import Streamable, streamables_of

RING_CONTEXT = "vllm_subspec.ring"
"""Key of the engine's ring in vLLM's static forward context, through which the operators find it.

Not a global and not an operator argument: several engines may live in one process, and a compiled
artefact may be loaded from a cache that another engine wrote.
"""


RING_OPERATORS = ("vllm::subspec_wait_block", "vllm::subspec_release_block")


@dataclass
class StreamedLayer:
    """One decoder layer whose weights go through the ring as one block.

    A weight's name is that of its module within the layer; of experts, which have two, followed by
    the parameter's.
    """

    index: int
    """Position among the model's decoder layers."""
    block: int
    """Position among the streamed layers."""
    module: nn.Module
    parts: dict[str, Streamable]
    """By name within the layer."""
    layout: BlockLayout
    absorbed: bool = False
    missing_numel: dict[str, int] = field(default_factory=dict)
    """Elements that the checkpoint has not yet delivered, by weight."""

    @property
    def order(self) -> str:
        """In which the weights are kept."""
        return "; ".join(sorted({part.order for part in self.parts.values()}))

    def parameters(self) -> Iterator[tuple[str, Streamable, Any]]:
        """Of every weight its name, its module's part and its parameter."""
        return _parameters(self.parts)

    def loaded(self) -> dict[Streamable, list[torch.Tensor]]:
        """The weights in the checkpoint's order; valid until absorbed."""
        return {part: [p.data for p in part.parameters] for part in self.parts.values()}

    def kept(self) -> dict[str, torch.Tensor]:
        """The loaded weights in the order in which the block holds them."""
        return {name: part.kept(parameter.data) for name, part, parameter in self.parameters()}

    def originals(self, block: torch.Tensor) -> dict[Streamable, list[torch.Tensor]]:
        """The weights that a block holds, in the checkpoint's order."""
        views = self.layout.views(block)
        found: dict[Streamable, list[torch.Tensor]] = {}
        for name, part, _ in self.parameters():
            found.setdefault(part, []).append(part.original(views[name]))
        return found

    def point_at(self, slot: torch.Tensor) -> None:
        """Make every weight a view into ``slot``."""
        views = self.layout.views(slot)
        for name, _, parameter in self.parameters():
            parameter.data = views[name]


Absorb = Callable[[StreamedLayer], None]


def block_layout(name: str, parts: Mapping[str, Streamable]) -> BlockLayout:
    """Of a layer's weights as they are kept."""
    return BlockLayout(
        name,
        tuple(
            TensorSpec(key, tuple(parameter.shape), parameter.dtype)
            for key, _, parameter in _parameters(parts)
        ),
    )


def _parameters(
    parts: Mapping[str, Streamable],
) -> Iterator[tuple[str, Streamable, nn.Parameter]]:
    for key, part in parts.items():
        for name in part.names:
            whole = key if len(part.names) == 1 else f"{key}.{name}"
            yield whole, part, part.parameter(name)


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
        planned = 0
        for index, module in enumerate(modules_generator):
            parts = streamables_of(module)
            nbytes = block_layout(f"layers.{index}", parts).nbytes if parts else 0
            if index == 0:
                chosen, planned = set(self._choose_streamed(module)), nbytes
            if nbytes != planned:
                raise ValueError(
                    f'method "subspec" streams models whose decoder layers are alike, but layer '
                    f"{index} has {nbytes} bytes of weights to stream and layer 0 {planned}: use "
                    "another model"
                )
            self.layers.append(module)
            if index in chosen:
                self._take_out(index, module, parts)
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

    def _take_out(self, index: int, module: nn.Module, parts: dict[str, Streamable]) -> None:
        layout = block_layout(f"layers.{index}", parts)
        layer = StreamedLayer(index, len(self.streamed), module, parts, layout)
        waiting = set(parts)

        def loaded(name: str) -> Callable[[], None]:
            def mark() -> None:
                # Reached after all loading: only weights that no weight loader delivered
                # (dummy weights, say) are still waiting here.
                waiting.discard(name)
                if not waiting:
                    self._complete(layer)

            return mark

        for name, part in parts.items():
            part.stream(loaded(name))
            for parameter in part.parameters:
                if parameter.device.type != "cpu":
                    parameter.data = torch.empty_like(parameter, device="cpu")
        self.streamed.append(layer)

    def _complete(self, layer: StreamedLayer) -> None:
        if layer.absorbed:
            return
        layer.absorbed = True
        self._absorb(layer)
        for _, _, parameter in layer.parameters():
            parameter.data = parameter.data.new_empty(0)

    def _count_loads(self, layer: StreamedLayer) -> None:
        """Notice when the checkpoint has delivered every element of the layer's weights."""
        # vLLM remembers how weights were loaded for as long as the process lives, and only of
        # methods of their modules it forgets the modules: nothing else may hold them.
        offloader, loading = weakref.ref(self), weakref.ref(layer)

        def counting(name: str, load: MethodType) -> MethodType:
            unbound = load.__func__

            def counted(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
                with CopyCounter() as counter:
                    result = unbound(module, *args, **kwargs)
                streaming, streamed = offloader(), loading()
                assert streaming is not None and streamed is not None
                left = streamed.missing_numel[name] - counter.copied_numel
                streamed.missing_numel[name] = max(left, 0)
                if not any(streamed.missing_numel.values()):
                    streaming._complete(streamed)
                return result

            return MethodType(counted, load.__self__)

        for name, _, parameter in layer.parameters():
            layer.missing_numel[name] = parameter.numel()
            parameter.weight_loader = counting(name, parameter.weight_loader)

    def _drop_loads(self, layer: StreamedLayer) -> None:
        layer.absorbed = True
        for _, _, parameter in layer.parameters():
            parameter.weight_loader = lambda *args, **kwargs: True


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
