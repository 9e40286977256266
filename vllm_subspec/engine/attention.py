# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Tree attention inside vLLM's attention layers, on the CPU and on CUDA.

vLLM's backend of the platform is replaced by a subclass of it. A pass without trees runs as in
vLLM; `attach` tells the metadata of a pass which requests are trees.
"""

import importlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from vllm.v1.attention import selector

from vllm_subspec.core.tree_attention import TreeRows

_PLATFORMS = {
    "cpu": "vllm_subspec.engine.attention_cpu",
    "cuda": "vllm_subspec.engine.attention_cuda",
}


def _platform(device: torch.device) -> Any:
    """The module that does it there: they import what only one platform has."""
    return importlib.import_module(_PLATFORMS[device.type])


def install(device: torch.device) -> None:
    """Replace vLLM's attention backend in this process, before a model is built."""
    _platform(device).install()
    selector._cached_get_attn_backend.cache_clear()  # of an engine that lived here before


def uninstall(device: torch.device) -> None:
    """Models built from now on get vLLM's own backend again."""
    _platform(device).BACKEND.clear_override()
    selector._cached_get_attn_backend.cache_clear()


def check(
    device: torch.device, layers: Mapping[str, Any], method: str, widths: Sequence[str]
) -> None:
    """Raises ValueError, in one sentence, if trees cannot run on one of vLLM's attention layers.

    Args:
        layers: by their names.
        method: the engine's.
        widths: the options by which it drafts trees.
    """
    remedy = " and ".join(f'"{width}"' for width in widths)
    for name, layer in layers.items():
        if feature := _platform(device).refusal(layer.impl):
            raise ValueError(
                f'method "{method}" drafts token trees, but {name} has {feature}, which tree '
                f"attention cannot do: set {remedy} to 1"
            )


def attach(
    groups: Iterable[Any], metadata: Mapping[str, Any], trees: TreeRows, starts: Sequence[int]
) -> None:
    """Make a pass attend along trees.

    Args:
        groups: vLLM's attention groups, whose builders made ``metadata``.
        metadata: of the pass, by layer name.
        trees: the requests that are trees; none is allowed.
        starts: [requests + 1] first query of each request of the pass, and the end.
    """
    if trees.rows:
        for group in groups:
            builder = group.get_metadata_builder(0)
            builder.attach(metadata[group.layer_names[0]], trees, starts)


def move_pages(
    device: torch.device, layers: Iterable[Any], sources: torch.Tensor, destinations: torch.Tensor
) -> None:
    """Copy the K/V of slots ``sources`` [m] to ``destinations`` [m], both int64, in each of vLLM's
    attention ``layers``; all sources are read before anything is written."""
    _platform(device).move_pages(layers, sources, destinations)
