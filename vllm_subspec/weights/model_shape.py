# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""A model's shape from its config.json alone: built without any weight by transformers."""

import re
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from vllm_subspec.core.shapes import Linear, ModelShape

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)$")


def read_shape(model: str) -> tuple[ModelShape, Any]:
    """The shape of ``model``, a folder or a name on the hub, and its text configuration.

    Raises:
        ValueError: one sentence: there is no readable configuration, or no model of that kind.
    """
    config = read_config(model)
    try:
        with torch.device("meta"):
            module = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise _no_configuration(model, error) from error
    return shape_of(module, config), config


def read_config(model: str) -> Any:
    """The text configuration of ``model``, a folder or a name on the hub.

    Raises:
        ValueError: one sentence: there is no readable one.
    """
    try:
        return AutoConfig.from_pretrained(model).get_text_config()
    except (OSError, ValueError, KeyError) as error:
        raise _no_configuration(model, error) from error


def _no_configuration(model: str, error: Exception) -> ValueError:
    reason = (str(error).strip() or repr(error)).splitlines()[0].rstrip(".")
    return ValueError(f"{model} has no configuration of a language model: {reason}")


def shape_of(module: torch.nn.Module, config: Any) -> ModelShape:
    """The shape of a transformers model, on whatever device.

    Args:
        config: its text configuration.

    Raises:
        ValueError: it has no decoder layers under the name that streaming knows them by.
    """
    layers: dict[int, list[Linear]] = {}
    other = 0
    for name, parameter in module.named_parameters():
        found = _LAYER.search(name)
        if found and parameter.dim() >= 2 and min(parameter.shape) > 1:
            *count, rows, columns = parameter.shape
            linear = Linear(rows, columns, count[0] if count else 1)
            layers.setdefault(int(found[1]), []).append(linear)
        else:
            other += parameter.numel()
    if not layers:
        raise ValueError(
            f"{type(module).__name__} has no weights named layers.<number>., which are what is "
            "streamed: use another model"
        )
    head = config.vocab_size * config.hidden_size
    heads = config.num_attention_heads
    return ModelShape(
        layers=[layers[index] for index in sorted(layers)],
        other=other,
        head=head,
        experts_used=getattr(config, "num_experts_per_tok", None) or 0,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
    )
