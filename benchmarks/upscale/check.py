# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Does an upscaled checkpoint compute its source's function, and how well does it bear 4 bits?

Both run on real text, teacher-forced, with weights as stored and arithmetic in float32: in bfloat16
a model of this size changes a percent of its own tokens, which would hide a wrong function. One
decoder layer is in memory at a time.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks.upscale.checkpoint import Source
from benchmarks.upscale.families import LINEARS, layer_tensors, load_config
from vllm_subspec.weights.quantize import quantize
from vllm_subspec.weights.quantized_weight import QuantFormat

REQUIRED = 0.995
POSITIONS = 1000
WINDOW = 256  # tokens; the bundled model was trained on windows of this length.
FORMAT = QuantFormat(4, 64)

Recode = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Agreement:
    """Shares of positions with the same most likely next token."""

    positions: int
    function: float
    """The upscaled model and its source."""
    source_4bit: float | None = None
    """The source and its own 4-bit copy."""
    upscaled_4bit: float | None = None
    """The upscaled model and its own 4-bit copy."""


def compare(
    source: Path, upscaled: Path, positions: int = POSITIONS, copies: bool = True
) -> Agreement:
    """Measure the agreement on at least `positions` positions of Python source text.

    Without `copies` the 4-bit copies, which take most of the time, are left out.

    Raises:
        ValueError: one sentence: a checkpoint or its tokenizer cannot be used.
    """
    sizes = [load_config(folder)["vocab_size"] for folder in (source, upscaled)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"{source} and {upscaled} have vocabularies of {sizes[0]} and {sizes[1]}")
    tokens = text_windows(source, positions)
    if not torch.equal(tokens, text_windows(upscaled, positions)):
        raise ValueError(f"{upscaled} cuts text into other tokens than {source} does")
    small, large = best_tokens(source, tokens), best_tokens(upscaled, tokens)
    found = Agreement(tokens.numel(), _share(small, large))
    if not copies:
        return found
    return replace(
        found,
        source_4bit=_share(small, best_tokens(source, tokens, in_4_bits)),
        upscaled_4bit=_share(large, best_tokens(upscaled, tokens, in_4_bits)),
    )


def in_4_bits(weight: Tensor) -> Tensor:
    """What the 4-bit substitute of a linear weight computes with, as float32."""
    return quantize(weight, FORMAT, "hqq").dequantize()


def text_windows(folder: Path, positions: int) -> Tensor:
    """int64 [windows, WINDOW]: the standard library's modules, by name, in the model's tokens."""
    if positions < 1:
        raise ValueError(f"--positions is {positions}: give a number above 0")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{folder} has no tokenizer that can be read: {reason}") from None
    windows = -(-positions // WINDOW)
    ids: list[int] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        ids += tokenizer(path.read_text())["input_ids"]
        if len(ids) >= windows * WINDOW:
            return torch.tensor(ids[: windows * WINDOW]).view(windows, WINDOW)
    raise ValueError(f"--positions is {positions}: the standard library has {len(ids)} tokens")


@torch.inference_mode()
def best_tokens(folder: Path, tokens: Tensor, recode: Recode = Tensor.float) -> Tensor:
    """int64 [tokens]: the most likely next token after each of `tokens` [windows, length].

    `recode` makes float32 weights of the decoder layers' linears from the stored ones.
    """
    config = load_config(folder)
    weights = Source(folder, config)
    layer, rotary, norm = _modules(config)
    positions = torch.arange(tokens.shape[1]).unsqueeze(0)
    hidden = weights["model.embed_tokens.weight"][tokens].float()
    angles = rotary(hidden, positions)
    for index in tqdm(range(config["num_hidden_layers"]), folder.name, unit="layer", leave=False):
        state = {
            name: (recode if name.removesuffix(".weight") in LINEARS else Tensor.float)(
                weights[f"model.layers.{index}.{name}"]
            )
            for name in layer_tensors(config)
        }
        layer.load_state_dict(state, assign=True)
        hidden = layer(hidden, position_ids=positions, position_embeddings=angles)
    norm.load_state_dict({"weight": weights["model.norm.weight"].float()}, assign=True)
    tied = config.get("tie_word_embeddings", False)
    head = weights["model.embed_tokens.weight" if tied else "lm_head.weight"].float()
    # By windows: logits of all positions would be large with a large vocabulary.
    return torch.cat([(norm(window) @ head.T).argmax(-1) for window in hidden])


def _modules(config: dict[str, Any]) -> tuple[torch.nn.Module, torch.nn.Module, torch.nn.Module]:
    """transformers' decoder layer and last norm, both without weights yet, and rotary embedding."""
    one_layer = AutoConfig.for_model(**(config | {"num_hidden_layers": 1}))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(one_layer, dtype=torch.float32).model.eval()
    rotary = type(model.rotary_emb)(one_layer)  # Its table is computed, not stored.
    return model.layers[0], rotary, model.norm


def _share(one: Tensor, other: Tensor) -> float:
    return float((one == other).double().mean())
