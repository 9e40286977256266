# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Hugging Face transformers with accelerate's disk offload of decoder layers: all, or what is left.

With ``--fill`` as many layers stay in memory as the limit allows.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, StoppingCriteriaList

from benchmarks.peers.serving import Answer, Emit, parser, peak_rss, serve


def fitting(model: Path, layers: int, limit: int) -> int:
    """Layers that fit into the limit, beside this process as it is and two layers on their way."""
    size = sum(file.stat().st_size for file in model.glob("*.safetensors")) // layers
    return min(layers, max(0, (limit - peak_rss()) // size - 2))


def load(model: Path, folder: Path, limit: int, fill: bool) -> Answer:
    layers = AutoConfig.from_pretrained(model).num_hidden_layers
    kept = fitting(model, layers, limit) if fill else 0
    print(f"{kept} of {layers} decoder layers stay in memory", file=sys.stderr)
    # Where each part rests. What lies on disk is computed on the device of the rest.
    parts = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    devices = dict.fromkeys(parts, "cpu")
    devices |= {f"model.layers.{i}": "cpu" if i < kept else "disk" for i in range(layers)}
    loaded = AutoModelForCausalLM.from_pretrained(
        model, dtype="auto", device_map=devices, offload_folder=folder
    )
    return answer_with(loaded)


def answer_with(model: Any) -> Answer:
    """Greedy answers by transformers' own ``generate``."""

    def answer(prompt: list[int], tokens: int, emit: Emit) -> None:
        ids = torch.tensor([prompt])

        def enough(text: torch.Tensor, scores: Any) -> bool:
            return not emit(text[0, -1:].tolist())

        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=tokens,  # Ignores the end-of-text token.
            max_new_tokens=tokens,
            stopping_criteria=StoppingCriteriaList([enough]),
        )

    return answer


if __name__ == "__main__":
    options = parser("transformers_disk")
    options.add_argument("--fill", action="store_true", help="keep what fits in memory")
    told = options.parse_args()
    packages = ["transformers", "accelerate", "torch"]
    sys.exit(serve(lambda: load(told.model, told.folder, told.limit, told.fill), packages))
