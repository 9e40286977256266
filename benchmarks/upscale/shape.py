# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""How large an upscaled checkpoint becomes: the recipe, its configuration, and choosing one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.upscale.families import FAMILIES, parameter_count, sizes

GIB = 1 << 30
MAX_DEPTH_FACTOR = 3  # At most two added layers for each layer of the source, if the depth is free.
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Recipe:
    """What an upscaled checkpoint is made from; stored beside it as upscale.json.

    `width` copies are made of the hidden state, `heads` of the attention heads and `mlp` of the
    MLP; None means as many as of the hidden state. `family` is a key of FAMILIES; None means the
    source's own.
    """

    source: str
    width: int
    layers: int
    noise: float
    seed: int
    dtype: str
    heads: int | None = None
    mlp: int | None = None
    family: str | None = None

    @property
    def copies(self) -> dict[str, int]:
        """Copies of each named dimension; one of those that are not here."""
        heads = self.heads or self.width
        return {"hidden": self.width, "query": heads, "kv": heads, "mlp": self.mlp or self.width}


def converted_config(config: dict[str, Any], kind: str) -> dict[str, Any]:
    """The configuration of the same model as one of the family `kind`.

    Raises:
        ValueError: one sentence: that family cannot compute what this model computes.
    """
    ours, theirs = FAMILIES[config["model_type"]], FAMILIES[kind]
    if ours is theirs:
        return config
    become = f"a {config['model_type']} checkpoint cannot become {kind}"
    if ours.head_norms != theirs.head_norms:
        raise ValueError(
            f"{become}: qwen3 divides every query and key by its size, which no weights can bring "
            "about or undo"
        )
    # Of a key's linears all get a bias if one has: zeros are as good as none.
    biased = set(ours.biased(config))
    optional = theirs.optional_biases or {}
    foreign = set(ours.optional_biases or {}) - set(optional)
    kept = {key: value for key, value in config.items() if key not in foreign}
    kept |= {key: not biased.isdisjoint(names) for key, names in optional.items()}
    lost = biased.difference(theirs.biased(kept))
    if lost:
        raise ValueError(f"{become}, which has no biases in {', '.join(sorted(lost))}")
    return kept | {"model_type": kind, "architectures": [theirs.architecture]}


def upscaled_config(config: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """The configuration of the checkpoint that `recipe` makes of one with `config`.

    Raises:
        ValueError: one sentence: its family has no such model.
    """
    kind = recipe.family or config["model_type"]
    wide = converted_config(config, kind)
    copies = recipe.copies
    wide = wide | {
        "hidden_size": config["hidden_size"] * copies["hidden"],
        "intermediate_size": config["intermediate_size"] * copies["mlp"],
        "num_attention_heads": config["num_attention_heads"] * copies["query"],
        "num_key_value_heads": config["num_key_value_heads"] * copies["kv"],
        "num_hidden_layers": recipe.layers,
        "tie_word_embeddings": False,
        "dtype": recipe.dtype,
    }
    wide.pop("torch_dtype", None)  # The older name of `dtype`.
    size = sizes(wide)
    if not FAMILIES[kind].head_dim_is_free and size["query"] != size["hidden"]:
        raise ValueError(
            f"{kind} has heads of the hidden size over their number, not {size['hidden']} beside "
            f"{size['query'] // size['head']} heads of {size['head']}: choose another --family"
        )
    return wide


def size_in_bytes(config: Mapping[str, Any]) -> int:
    """Bytes of the weights of a checkpoint with this configuration."""
    return parameter_count(config) * DTYPES[config["dtype"]].itemsize


def pick_shape(config: dict[str, Any], gib: float, dtype: str) -> tuple[int, int]:
    """(width, layers) of the smallest checkpoint of at least `gib` GiB.

    The width is a power of two, so that W / width is exact, and the depth stays between one and
    MAX_DEPTH_FACTOR times the source's.

    Raises:
        ValueError: one sentence: the size is not above 0.
    """
    if not 0 < gib < math.inf:
        raise ValueError(f"--gib is {gib}: give a size above 0")
    source_layers = config["num_hidden_layers"]

    def size(width: int, layers: int) -> int:
        return size_in_bytes(upscaled_config(config, Recipe("", width, layers, 0.0, 0, dtype)))

    width, fitting = 1, list[tuple[int, int, int]]()
    while True:
        layer = size(width, 1) - size(width, 0)
        wanted = math.ceil((gib * GIB - size(width, 0)) / layer)
        layers = max(wanted, source_layers)
        if layers <= MAX_DEPTH_FACTOR * source_layers:
            fitting.append((size(width, layers), width, layers))
        if wanted <= source_layers:
            break
        width *= 2
    _, width, layers = min(fitting)
    return width, layers


def shaped_like(recipe: Recipe, config: dict[str, Any], like: dict[str, Any]) -> Recipe:
    """`recipe` with the numbers of copies and layers that come nearest to the model `like`.

    Its family is that of `like` unless the recipe names one. Vocabulary and head size stay those
    of the source.
    """
    own, wanted = sizes(config), sizes(like)

    def nearest(dimension: str) -> int:
        return max(1, round(wanted[dimension] / own[dimension]))

    return replace(
        recipe,
        width=nearest("hidden"),
        heads=nearest("query"),
        mlp=nearest("mlp"),
        layers=max(own["layers"], wanted["layers"]),
        family=recipe.family or like["model_type"],
    )
