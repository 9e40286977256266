# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Models that draft beside the target: loaded by vLLM, on the engine's own KV blocks."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.compilation.backends import set_model_tag
from vllm.config import ModelConfig, SpeculativeConfig, VllmConfig, replace
from vllm.model_executor.model_loader import get_model
from vllm.model_executor.model_loader.utils import get_draft_load_config
from vllm.model_executor.models.interfaces import supports_eagle3
from vllm.model_executor.offloader.base import NoopOffloader, get_offloader, set_offloader
from vllm.v1.spec_decode.eagle import EagleProposer

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner


@contextlib.contextmanager
def _layers_of(config: VllmConfig, found: set[str]) -> Iterator[None]:
    """Adds to ``found`` the attention layers that are built meanwhile; they are not streamed."""
    context: dict[str, Any] = config.compilation_config.static_forward_context
    before = set(context)
    offloader = get_offloader()
    set_offloader(NoopOffloader())
    try:
        yield
    finally:
        set_offloader(offloader)
    found |= context.keys() - before


def load(config: VllmConfig, model: ModelConfig, name: str) -> tuple[nn.Module, frozenset[str]]:
    """A drafting model and the names of its attention layers.

    Args:
        config: the engine's.
        model: of the model to load.
        name: of it among the engine's layers.
    """
    own = replace(config, model_config=model, quant_config=None)
    layers: set[str] = set()
    with _layers_of(config, layers), set_model_tag(name):
        module = get_model(vllm_config=own, prefix=name)
    return module, frozenset(layers)


def load_head(
    runner: "GPUModelRunner", own: SpeculativeConfig, base: nn.Module, model: ModelConfig, name: str
) -> tuple[Any, frozenset[str]]:
    """An EAGLE head, which shares embedding and output layer with ``base`` if it has none.

    Args:
        runner: the target's.
        own: the head's configuration.
        base: the model that it drafts for, with configuration ``model``.
        name: of the head among the engine's layers.

    Raises:
        ValueError: the checkpoint is no such head, or the model cannot feed one.
    """
    config = replace(
        runner.vllm_config, model_config=model, quant_config=None, speculative_config=own
    )
    layers: set[str] = set()
    with _layers_of(runner.vllm_config, layers):
        loader = _HeadLoader(config, runner.device, name)
        try:
            loader.load_model(base)
        except (AttributeError, KeyError, ValueError) as error:
            reason = str(error).split(". ")[0].rstrip(".")
            raise ValueError(
                f'speculative_config key "drafter.model" is {own.model!r}, which is no head of '
                f'"{own.method}" for {model.model}: {reason}'
            ) from error
    if own.method == "eagle3":
        if not supports_eagle3(base):
            raise ValueError(
                f"{type(base).__name__} cannot give an EAGLE-3 head its hidden states: use "
                'another drafter, such as "ngram"'
            )
        taught: Any = base  # what the check above says is no class
        chosen = _auxiliary_layers(own) or taught.get_eagle3_default_aux_hidden_state_layers()
        taught.set_aux_hidden_state_layers(tuple(chosen))
    return loader.model, frozenset(layers)


class _HeadLoader(EagleProposer):
    """vLLM's own loading of heads, under a name of ours."""

    def __init__(self, config: VllmConfig, device: torch.device, name: str) -> None:
        self._name = name
        super().__init__(config, device)

    def _get_model(self) -> nn.Module:
        config = self._create_draft_vllm_config()
        with set_model_tag(self._name):
            return get_model(
                vllm_config=config,
                model_config=self.speculative_config.draft_model_config,
                load_config=get_draft_load_config(config),
                prefix=self._name,
            )


def _auxiliary_layers(own: SpeculativeConfig) -> list[int] | None:
    """Layers before which an EAGLE-3 head wants the hidden states, if its checkpoint says so."""
    config = own.draft_model_config.hf_config
    nested = getattr(config, "eagle_config", None) or {}
    found: list[int] | None = getattr(
        config, "eagle_aux_hidden_state_layer_ids", nested.get("eagle_aux_hidden_state_layer_ids")
    )
    return found
