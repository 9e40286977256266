# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""What a model that drafts beside the target will take, before it is loaded."""

from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from vllm.config import ModelConfig, VllmConfig
from vllm.logger import init_logger
from vllm.transformers_utils.config import get_safetensors_params_metadata
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype

from vllm_subspec.config import SubspecOptions
from vllm_subspec.core.plan import PACKED_VOCABULARIES
from vllm_subspec.engine import draft_configs

logger = init_logger(__name__)

_FLOATS = ("F64", "F32", "F16", "BF16")
"""Names of safetensors; loaded as numbers of the model's own type."""


# Heads use the target's embedding; EAGLE-3's have an output layer of their own.
_PACKED = {"draft_model": PACKED_VOCABULARIES, "eagle": 0, "eagle3": 1}


class DrafterMemory(NamedTuple):
    """Bytes of one rank."""

    weights: int
    kv_per_token: int


def drafter_memory(config: VllmConfig, options: SubspecOptions, packs: bool) -> DrafterMemory:
    """Of the option "drafter"; nothing where it names no model.

    A checkpoint of unknown size is told of, and counts nothing.

    Args:
        packs: whether embeddings and output layers are packed as well (`PACKED_VOCABULARIES`).
    """
    drafter = options.drafter
    if drafter is None or drafter.model is None:
        return DrafterMemory(0, 0)
    own: ModelConfig = draft_configs.speculative_config(
        drafter.model, drafter.method, config.model_config, config.parallel_config
    ).draft_model_config
    weights = _checkpoint_bytes(own)
    if not weights:
        logger.warning(
            'The memory plan leaves out the drafting model: nobody can tell the size of "%s"',
            drafter.model,
        )
    if packs:
        vocabulary = getattr(own.hf_config, "draft_vocab_size", None) or own.get_vocab_size()
        copy = vocabulary * own.get_hidden_size() * own.dtype.itemsize
        weights += _PACKED[drafter.method] * copy
    ranks = config.parallel_config.tensor_parallel_size
    return DrafterMemory(weights // ranks, kv_per_token(own, config))


def kv_per_token(model: ModelConfig, config: VllmConfig) -> int:
    """Bytes of one token's K and V in all layers, of one rank."""
    heads = model.get_num_kv_heads(config.parallel_config)
    layers: int = model.get_num_layers(config.parallel_config)
    element = kv_cache_dtype_str_to_dtype(config.cache_config.cache_dtype, model)
    return 2 * heads * model.get_head_size() * element.itemsize * layers


def _checkpoint_bytes(model: ModelConfig) -> int:
    """Of all its tensors, as they are loaded; 0 if they cannot be found."""
    entries = get_safetensors_params_metadata(model.model, revision=model.revision).values()
    tensors = [entry for entry in entries if "shape" in entry]  # a file has other entries, too
    if tensors:
        return sum(_loaded_bytes(tensor, model.dtype.itemsize) for tensor in tensors)
    files = [file for kind in ("*.bin", "*.pt") for file in Path(model.model).glob(kind)]
    return sum(file.stat().st_size for file in files)


def _loaded_bytes(tensor: dict[str, Any], itemsize: int) -> int:
    if tensor["dtype"] in _FLOATS:
        return prod(tensor["shape"]) * itemsize
    begin, end = tensor["data_offsets"]  # what a quantized model keeps as it is
    return int(end - begin)
