# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""The families of models that can be tiled, and what a checkpoint of each consists of.

Every dimension of every tensor has a name; all that is known about shapes, sizes and tiling follows
from these names and the sizes that a configuration gives them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LINEARS = {
    "self_attn.q_proj": ("query", "hidden"),
    "self_attn.k_proj": ("kv", "hidden"),
    "self_attn.v_proj": ("kv", "hidden"),
    "self_attn.o_proj": ("hidden", "query"),
    "mlp.gate_proj": ("mlp", "hidden"),
    "mlp.up_proj": ("mlp", "hidden"),
    "mlp.down_proj": ("hidden", "mlp"),
}
"""Linears of a decoder layer: rows (outputs) and columns (inputs)."""

RESIDUAL_OUTPUTS = ("self_attn.o_proj", "mlp.down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_ATTENTION = (*_QKV, "self_attn.o_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@dataclass(frozen=True)
class Family:
    """What distinguishes an architecture.

    `biases` are linears that always have one; `optional_biases` are those that have one where the
    key of the configuration is true. `head_norms` are norms over each head of queries or keys.
    """

    architecture: str
    biases: tuple[str, ...] = ()
    optional_biases: Mapping[str, tuple[str, ...]] | None = None
    head_norms: tuple[str, ...] = ()
    head_dim_is_free: bool = True
    """Whether config.json may give a head size other than the hidden size over the heads."""
    own_tokenizer: bool = False
    """Whether transformers cuts text as this family does, whatever tokenizer.json says."""

    def biased(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """The linears that have a bias in a checkpoint with this configuration."""
        optional = self.optional_biases or {}
        return self.biases + tuple(
            name for key, names in optional.items() if config.get(key) for name in names
        )


FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM", optional_biases={"attention_bias": _ATTENTION, "mlp_bias": _MLP}
    ),
    "qwen2": Family("Qwen2ForCausalLM", biases=_QKV, head_dim_is_free=False, own_tokenizer=True),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        optional_biases={"attention_bias": _ATTENTION},
        head_norms=("self_attn.q_norm", "self_attn.k_norm"),
    ),
}
"""By the `model_type` of config.json."""


def load_config(source: Path) -> dict[str, Any]:
    """Read config.json of a folder, or that file itself; head size and KV heads are filled in.

    Raises:
        ValueError: one sentence: there is none, or an architecture whose function tiling would not
            preserve.
    """
    path = source if source.is_file() else source / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} does not exist: name the folder of a checkpoint")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in FAMILIES:
        raise ValueError(f"{path}: model_type is {kind!r}; handled are {', '.join(FAMILIES)}")
    if config.get("use_sliding_window"):
        raise ValueError(f"{path}: use_sliding_window is true; only full attention is handled")
    # Derived from the number of layers, which is going to change.
    if set(config.pop("layer_types", None) or ()) - {"full_attention"}:
        raise ValueError(
            f"{path}: layer_types has others than full_attention, which are not handled"
        )
    if "quantization_config" in config:
        raise ValueError(f"{path}: the checkpoint is quantised; name the full-precision one")
    try:
        heads = config["num_attention_heads"]
        config["head_dim"] = config.get("head_dim") or config["hidden_size"] // heads
        config["num_key_value_heads"] = config.get("num_key_value_heads") or heads
        sizes(config)
    except KeyError as error:
        raise ValueError(f"{path} does not give {error}") from None
    return config


def sizes(config: Mapping[str, Any]) -> dict[str, int]:
    """The size of every named dimension."""
    return {
        "vocabulary": config["vocab_size"],
        "hidden": config["hidden_size"],
        "query": config["num_attention_heads"] * config["head_dim"],
        "kv": config["num_key_value_heads"] * config["head_dim"],
        "mlp": config["intermediate_size"],
        "head": config["head_dim"],
        "layers": config["num_hidden_layers"],
    }


def layer_tensors(config: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The tensors of a decoder layer, by their names in it, with the names of their dimensions."""
    family = FAMILIES[config["model_type"]]
    tensors: dict[str, tuple[str, ...]] = {}
    tensors |= {f"{name}.weight": ("hidden",) for name in NORMS}
    tensors |= {f"{name}.weight": ("head",) for name in family.head_norms}
    tensors |= {f"{name}.bias": LINEARS[name][:1] for name in family.biased(config)}
    tensors |= {f"{name}.weight": dimensions for name, dimensions in LINEARS.items()}
    return tensors


def outer_tensors(config: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The tensors outside the decoder layers, with the names of their dimensions."""
    tensors: dict[str, tuple[str, ...]] = {"model.embed_tokens.weight": ("vocabulary", "hidden")}
    if not config.get("tie_word_embeddings", False):
        tensors["lm_head.weight"] = ("vocabulary", "hidden")
    return tensors | {"model.norm.weight": ("hidden",)}


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a checkpoint with this configuration, in the model's order."""
    named, size = outer_tensors(config), sizes(config)
    for layer in range(size["layers"]):
        prefix = f"model.layers.{layer}."
        named |= {prefix + name: dimensions for name, dimensions in layer_tensors(config).items()}
    return {
        name: tuple(size[dimension] for dimension in dimensions)
        for name, dimensions in named.items()
    }


def parameter_count(config: Mapping[str, Any]) -> int:
    """Parameters of a checkpoint with this configuration."""
    return sum(math.prod(shape) for shape in tensor_shapes(config).values())
