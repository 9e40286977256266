# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""AirLLM: a file per layer, read while the layer before it runs, dropped after its own run.

python -m benchmarks.peers.airllm_layers --model DIR --folder DIR
"""

import argparse
import sys
from pathlib import Path

from airllm import AutoModel

from benchmarks.peers.serving import Answer, serve
from benchmarks.peers.transformers_disk import answer_with


def load(model: Path, folder: Path) -> Answer:
    folder.mkdir(parents=True, exist_ok=True)
    loaded = AutoModel.from_pretrained(
        str(model), device="cpu", layer_shards_saving_path=str(folder)
    )
    return answer_with(loaded)


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.peers.airllm_layers")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="for its files, one per layer")
    arguments = parser.parse_args()
    return serve(
        lambda: load(arguments.model, arguments.folder),
        ["airllm", "transformers", "accelerate", "torch"],
    )


if __name__ == "__main__":
    sys.exit(main())
