# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""AirLLM: a file per layer, read while the layer before it runs, dropped after its own run."""

import sys
from pathlib import Path

from airllm import AutoModel

from benchmarks.peers.serving import Answer, parser, serve
from benchmarks.peers.transformers_disk import answer_with


def load(model: Path, folder: Path) -> Answer:
    folder.mkdir(parents=True, exist_ok=True)
    loaded = AutoModel.from_pretrained(
        str(model), device="cpu", layer_shards_saving_path=str(folder)
    )
    return answer_with(loaded)


if __name__ == "__main__":
    told = parser("airllm_layers").parse_args()
    packages = ["airllm", "transformers", "accelerate", "torch"]
    sys.exit(serve(lambda: load(told.model, told.folder), packages))
