# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Hugging Face transformers with accelerate's disk offload: every decoder layer rests on disk.

python -m benchmarks.peers.transformers_disk --model DIR
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, StoppingCriteriaList

from benchmarks.peers.serving import Answer, Emit, serve

# Where each part rests. What lies on disk is computed on the device of the rest.
DEVICES = {
    "model.embed_tokens": "cpu",
    "model.layers": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}


def load(model: Path, folder: Path) -> Answer:
    loaded = AutoModelForCausalLM.from_pretrained(
        model, dtype="auto", device_map=DEVICES, offload_folder=folder
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


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.peers.transformers_disk")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="for offloaded weights")
    arguments = parser.parse_args()
    return serve(
        lambda: load(arguments.model, arguments.folder), ["transformers", "accelerate", "torch"]
    )


if __name__ == "__main__":
    sys.exit(main())
