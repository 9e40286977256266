# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""What happens to the weights while vLLM loads the target.

    layer built   -> the memory plan says: resident or streamed
    layer loaded  -> its substitutes are quantized; its full weights go into the store
    all loaded    -> the ring is made and streaming begins; the draft is built

A sound store of the same checkpoint is used again: the checkpoint is then not read for streamed
layers. Beside it lie the substitutes that an earlier start has quantized; those of other options
are quantized from the store.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from vllm import envs
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.offloader.base import get_offloader

from vllm_subspec.config import SubspecOptions
from vllm_subspec.core.plan import MemoryPlan, choose_tier
from vllm_subspec.engine.fingerprint import fingerprint, store_name, substitutes_path
from vllm_subspec.engine.residency import plan_residency
from vllm_subspec.engine.unread import holds, unread
from vllm_subspec.weights.host_memory import host_memory
from vllm_subspec.weights.page_lock import page_lock, page_unlock
from vllm_subspec.weights.ring import (
    BlockSource,
    CudaTransfer,
    HostSource,
    Ring,
    ThreadTransfer,
    Transfer,
)
from vllm_subspec.weights.store import (
    BlockLayout,
    StoreWriter,
    WeightStore,
    aligned_buffer,
    open_or_create,
)
from vllm_subspec.weights.streamable import Streamable, streamables_of
from vllm_subspec.weights.streaming import RING_CONTEXT, StreamedLayer, StreamingOffloader
from vllm_subspec.weights.substitute import build_draft
from vllm_subspec.weights.substitute_experts import Substitute
from vllm_subspec.weights.substitute_source import Keep, SubstituteSource, at_once, matrices
from vllm_subspec.weights.substitute_store import SubstituteStore

logger = init_logger(__name__)

PLAN = "subspec_plan"
"""Of the plan's part in the compiled code, in ``additional_config``."""


class Loading:
    """One worker's weights: where they lie, and how they got there.

    Args:
        vllm_config: the engine's configuration.
        options: ours.
        rank: this worker's tensor-parallel rank.
        device: where the model computes.
    """

    def __init__(
        self, vllm_config: VllmConfig, options: SubspecOptions, rank: int, device: torch.device
    ) -> None:
        self._config = vllm_config
        self._options = options
        self._rank = rank
        self._device = device
        self.offloader = StreamingOffloader(self._choose, self._absorb, self._begin)
        self.substitutes: dict[nn.Module, Substitute] = {}
        self.plan: MemoryPlan
        self.store_path: str | None = None
        self.store_reused = False
        self.ring: Ring | None = None
        self._source = SubstituteSource(vllm_config, options, rank, device)
        self._store: WeightStore | None = None
        self._writer: StoreWriter | None = None
        self._host_blocks: dict[int, torch.Tensor] = {}
        self._resident_substituted: dict[nn.Module, Streamable] = {}
        self._names: dict[Streamable, str] = {}  # of what has a substitute
        self._kept: SubstituteStore | None = None
        # Whether a tensor of the checkpoint, by its name, is in the store that is used again.
        self._stored: Callable[[str], bool] = lambda name: False
        self._tensors_left_out = 0

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """While vLLM loads the target."""
        self._progress = tqdm(
            desc="Quantizing substitutes", unit="module", disable=self._rank != 0, leave=True
        )
        try:
            with _before_packing(self._substitute_resident), unread(self._is_stored):
                yield
        except BaseException:
            if self._writer is not None:
                self._writer.abort()
            if self._kept is not None:
                self._kept.abort()
            raise
        finally:
            self._progress.close()

    def _is_stored(self, name: str) -> bool:
        """Models that draft are loaded meanwhile, too, without our offloader: their weights may
        have the same names."""
        stored = get_offloader() is self.offloader and self._stored(name)
        self._tensors_left_out += stored
        return stored

    def build_draft(self, target: nn.Module) -> nn.Module:
        """Raises ValueError if vLLM did not show the layers of this model to the offloader."""
        if not self.offloader.layers:
            raise ValueError(
                'method "subspec" streams decoder layers that vLLM can offload, and finds none in '
                f"{type(target).__name__}: use another model"
            )
        self._finish_store()
        return build_draft(target, self.substitutes)

    def _choose(self, first_layer: nn.Module) -> tuple[int, ...]:
        self.plan = plan_residency(
            self._config, self._options, first_layer, self._device, self._source
        )
        logger.info("Memory plan, per rank:\n%s", self.plan.describe())
        # Compiled code waits where this plan has streamed layers, and is kept under a key that
        # holds this dictionary and otherwise nothing of the plan.
        self._config.additional_config[PLAN] = {
            "streamed": list(self.plan.streamed),
            "slots": self.plan.ring_layers,
        }
        return self.plan.streamed

    def _begin(self, streamed: list[StreamedLayer]) -> bool:
        chosen = set(self.plan.substituted) - set(self.plan.streamed)
        for index in chosen:
            for name, part in streamables_of(self.offloader.layers[index]).items():
                self._resident_substituted[part.module] = part
                self._names[part] = f"layers.{index}.{name}"
        self._progress.total = len(self._resident_substituted) + sum(
            len(layer.parts) for layer in streamed
        )
        for layer in streamed:
            self._names |= {part: f"layers.{layer.index}.{n}" for n, part in layer.parts.items()}
        if not streamed:
            return False
        if self._tier() == "host":
            logger.info("Streaming from host memory")
            return False
        self._open_store()
        if self._source.searches:
            self._keep_substitutes()
        self.store_reused = self._store is not None
        if self.store_reused:
            self._stored = holds(part for layer in streamed for part in layer.parts.values())
        return self.store_reused

    def _keep_substitutes(self) -> None:
        """In a file beside the weight store."""
        shapes = {
            f"{name}.{matrix}": shape
            for part, name in self._names.items()
            for matrix, shape in matrices(part).items()
        }
        assert self.store_path is not None
        path = substitutes_path(self.store_path, self._options.bits)
        identity = {
            **fingerprint(self._config, self._rank),
            "bits": self._options.bits,
            "group_size": self._source.format.group_size,
            "quantizer": self._source.quantizer,
        }
        self._kept = SubstituteStore(path, identity, shapes, self._source.format)
        did = "Reading" if self._kept.complete else "Keeping"
        logger.info("%s the quantized substitutes in %s", did, path)

    def _open_store(self) -> None:
        """A sound store, or a writer of a new one."""
        blocks = [layer.layout for layer in self.offloader.streamed]
        folder = self._options.store_path()
        self.store_path = str(folder / store_name(self._config, self._rank))
        opened = open_or_create(self.store_path, self._identity(), blocks)
        if isinstance(opened, WeightStore):
            logger.info("Streaming from the weight store %s", self.store_path)
            self._store = opened
        else:
            logger.info("Writing the weight store %s", self.store_path)
            self._writer = opened.__enter__()

    def _identity(self) -> dict[str, str | int]:
        order = self.offloader.streamed[0].order
        return {**fingerprint(self._config, self._rank), "order": order}

    def _tier(self) -> str:
        """``host`` or ``disk``."""
        wanted = self._options.weight_source
        if wanted != "auto":
            return wanted
        ranks = self._config.parallel_config.tensor_parallel_size  # all of this machine
        available = host_memory().available
        return choose_tier(ranks * self.plan.store_bytes, available, self._device.type == "cpu")

    def _absorb(self, layer: StreamedLayer) -> None:
        self._substitute(layer.loaded())
        kept = layer.kept()
        if self.store_path is None:
            try:
                block = _host_block(layer.layout, self._device)
            except MemoryError as error:
                if self._options.weight_source == "host":
                    raise MemoryError(f'{error}, or set "weight_source" to "disk"') from error
                self._move_to_disk(error)
            else:
                for name, view in layer.layout.views(block).items():
                    view.copy_(kept[name])
                self._host_blocks[layer.block] = block
                return
        if self._writer is not None:
            self._writer.write_block(layer.block, kept)

    def _move_to_disk(self, reason: MemoryError) -> None:
        """What is left of the host's memory was less than it said: the next tier holds more."""
        logger.warning("Streaming from disk, not from host memory: %s", reason)
        self._open_store()
        for index, block in self._host_blocks.items():
            if self._writer is not None:
                layout = self.offloader.streamed[index].layout
                self._writer.write_block(index, layout.views(block))
            page_unlock(block)
        self._host_blocks.clear()

    def _substitute_resident(self, module: nn.Module) -> None:
        part = self._resident_substituted.get(module)
        if part is not None and module not in self.substitutes:
            self._substitute({part: [parameter.data for parameter in part.parameters]})

    def _substitute(self, weights: Mapping[Streamable, list[torch.Tensor]]) -> None:
        for part, tensors in weights.items():
            keep = at_once if self._kept is None else self._keeping(part, self._kept)
            self.substitutes[part.module] = self._source.substitute(part, tensors, keep)
            self._progress.update()

    def _keeping(self, part: Streamable, store: SubstituteStore) -> Keep:
        return lambda matrix, make: store.weight(f"{self._names[part]}.{matrix}", make)

    def _finish_store(self) -> None:
        """Everything is loaded: make the store final and start streaming from it."""
        if self._writer is not None:
            self._writer.__exit__(None, None, None)
            self._writer = None
            assert self.store_path is not None
            blocks = [layer.layout for layer in self.offloader.streamed]
            self._store = WeightStore.open(self.store_path, self._identity(), blocks)
        streamed = self.offloader.streamed
        if not streamed:
            return
        sizes = [layer.layout.nbytes for layer in streamed]
        source: BlockSource
        if self._store is not None:
            if self.store_reused:
                self._say_what_was_read()
                self._substitute_from(self._store)
            if self._kept is not None:
                self._kept.finish()
            source = self._store.open_reader()
            self._store.close()
        else:
            source = HostSource([self._host_blocks[layer.block] for layer in streamed])
            self._host_blocks.clear()
        slots = [_slot(max(sizes), self._device) for _ in range(self.plan.ring_layers)]
        # Half: vLLM gives up a worker process after the whole, and would not know why.
        patience = envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS / 2
        transfer: Transfer
        if self._device.type == "cuda":
            pinned = isinstance(source, HostSource)
            staging = [] if pinned else [page_lock(aligned_buffer(max(sizes))) for _ in range(2)]
            transfer = CudaTransfer(source, slots, sizes, staging, patience)
        else:
            transfer = ThreadTransfer(source, slots, sizes, patience)
        self.ring = Ring(transfer, sizes, len(slots))
        self.offloader.attach(self.ring, slots)
        context = self._config.compilation_config.static_forward_context
        context[RING_CONTEXT] = self.ring

    def _say_what_was_read(self) -> None:
        """A start from a store that read the checkpoint as well was slower than it need be."""
        parts = sum(len(layer.parts) for layer in self.offloader.streamed)
        if self._tensors_left_out < parts:
            logger.warning(
                "The checkpoint was read for streamed layers though the weight store holds them, "
                "so every start takes longer: its tensors have names that only vLLM's model knows, "
                "or --load-format or --model-loader-extra-config chose a reader that takes whole "
                "files"
            )

    def _substitute_from(self, store: WeightStore) -> None:
        streamed = self.offloader.streamed
        if self._kept is not None and self._kept.complete:
            for layer in streamed:
                self._substitute({part: [] for part in layer.parts.values()})
            return
        reader = store.open_reader()
        buffer = aligned_buffer(max(layer.layout.nbytes for layer in streamed))
        try:
            for layer in streamed:
                reader.read(layer.block, buffer)
                self._substitute(layer.originals(buffer))
        finally:
            reader.close()


@contextlib.contextmanager
def _before_packing(offer: Callable[[nn.Module], None]) -> Iterator[None]:
    """Show ``offer`` every unquantized linear and all experts when they are loaded, before vLLM
    packs their weights.

    On the CPU packing frees the plain weight, so this is the last moment to see it.
    """
    methods: tuple[Any, ...] = (UnquantizedLinearMethod, UnquantizedFusedMoEMethod)
    with contextlib.ExitStack() as stack:
        for method in methods:
            original = method.process_weights_after_loading

            def process(self: Any, layer: nn.Module, original: Any = original) -> None:
                offer(layer)
                original(self, layer)

            method.process_weights_after_loading = functools.wraps(original)(process)
            stack.callback(setattr, method, "process_weights_after_loading", original)
        yield


def _slot(nbytes: int, device: torch.device) -> torch.Tensor:
    if device.type == "cpu":
        return aligned_buffer(nbytes)
    return torch.empty(nbytes, dtype=torch.uint8, device=device)


def _host_block(layout: BlockLayout, device: torch.device) -> torch.Tensor:
    block = aligned_buffer(layout.nbytes)
    return page_lock(block) if device.type == "cuda" else block
