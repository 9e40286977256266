# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Sizes of this rank's share of the model, and the memory plan made from them."""

import psutil
import torch
from torch import nn
from vllm.config import VllmConfig

from vllm_subspec.config import SubspecOptions
from vllm_subspec.core.plan import (
    GATHERED,
    PACKED_VOCABULARIES,
    WORKSPACE,
    Budget,
    MemoryPlan,
    ModelSizes,
    largest_pass,
    plan_memory,
)
from vllm_subspec.engine.drafter_memory import drafter_memory, kv_per_token
from vllm_subspec.weights.host_memory import host_memory
from vllm_subspec.weights.resident_linear import replaces_vllm
from vllm_subspec.weights.streamable import streamables_of
from vllm_subspec.weights.streaming import block_layout
from vllm_subspec.weights.substitute_source import SubstituteSource

_KV_TOKENS = 16384


def plan_residency(
    config: VllmConfig,
    options: SubspecOptions,
    first_layer: nn.Module,
    device: torch.device,
    substitutes: SubstituteSource,
) -> MemoryPlan:
    """Which layers stay and which are streamed, from the first decoder layer as built.

    Args:
        substitutes: knows how large they are.

    Raises ValueError when no plan fits or the layers hold most of their weight outside linears
    and experts.
    """
    model, parallel = config.model_config, config.parallel_config
    parts = streamables_of(first_layer)
    streamable = block_layout("layer", parts).nbytes if parts else 0
    whole = sum(p.numel() * p.element_size() for p in first_layer.parameters())
    if streamable < 0.9 * whole:
        raise ValueError(
            f'method "subspec" streams unquantized linear layers and experts, but they are only '
            f"{streamable} of the {whole} bytes of a decoder layer of this model: "
            "use another model"
        )
    layers = model.get_num_layers(parallel)
    substitute = substitutes.estimate_nbytes(parts.values())
    if device.type == "cuda":
        packed, workspace = 0, WORKSPACE
    else:
        packed = 0 if replaces_vllm(model.dtype) else PACKED_VOCABULARIES
        workspace = _process_bytes() + GATHERED + _activations(config)
    drafter = drafter_memory(config, options, packed > 0)
    kv = kv_per_token(model, config) + drafter.kv_per_token
    heads = 1 if getattr(model.hf_text_config, "tie_word_embeddings", False) else 2
    vocabulary = model.get_vocab_size() // parallel.tensor_parallel_size
    other = (heads + packed) * vocabulary * model.get_hidden_size() * model.dtype.itemsize
    plan = plan_memory(
        ModelSizes(
            [streamable] * layers, [substitute] * layers, other, kv, workspace, drafter.weights
        ),
        Budget(_device_bytes(config, device), _kv_tokens(config, kv)),
        resident_weights_gib=options.resident_weights_gib,
        ring_layers=options.ring_layers,
        substitute_layers=options.substitute_layers,
    )
    if not plan.substituted:
        raise ValueError(
            'method "subspec" found room for the model but not for any substitute beside it: '
            'raise --gpu-memory-utilization, or set "resident_weights_gib" to stream some layers'
        )
    return plan


def _process_bytes() -> int:
    """Bytes that this process holds before the model is there: the interpreter, its libraries."""
    return int(psutil.Process().memory_info().rss)


def _activations(config: VllmConfig) -> int:
    text, model = config.model_config.hf_text_config, config.model_config
    sampled = config.scheduler_config.max_num_seqs
    if config.speculative_config is not None:
        sampled *= 1 + config.speculative_config.num_speculative_tokens
    hidden = model.get_hidden_size()
    return largest_pass(
        config.scheduler_config.max_num_batched_tokens,
        sampled,
        hidden=hidden,
        widest=max(getattr(text, "intermediate_size", 0) or 0, hidden),
        vocabulary=model.get_vocab_size(),
        itemsize=model.dtype.itemsize,
    )


def _kv_tokens(config: VllmConfig, per_token: int) -> int:
    """Tokens to keep room for: what the user asked for, or one request of full length, and up to
    four where that is little.

    Args:
        per_token: bytes of K and V.
    """
    blocks = config.cache_config.num_gpu_blocks_override
    if blocks is not None:
        return int(blocks * config.cache_config.block_size)
    explicit = config.cache_config.kv_cache_memory_bytes
    if explicit is not None:
        return int(explicit) // per_token
    longest = config.model_config.max_model_len
    # Whole blocks, and one that vLLM never gives out.
    return max(longest + 2 * config.cache_config.block_size, min(4 * longest, _KV_TOKENS))


def _device_bytes(config: VllmConfig, device: torch.device) -> int:
    fraction = config.cache_config.gpu_memory_utilization
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory * fraction)
    ranks = config.parallel_config.tensor_parallel_size
    return int(host_memory().total * fraction / ranks)
