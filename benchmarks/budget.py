# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""A model of a published shape in the memory of a small device: `vllm-subspec bench` there.

    python -m benchmarks.budget [--like FOLDER] [--device-memory 8GiB] [further arguments of bench]

The checkpoint is the bundled model in the shape that --like describes, as nearly as tiling allows
(a head's size and the vocabulary stay the bundled model's). What does not fit beside substitutes,
ring and K/V is streamed, on a CPU from disk. Writes benchmarks/results/budget-NAME.json and its
page, NAME being that of the folder.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from benchmarks.checkpoints import BUILD, ROOT, checkpoint_like
from vllm_subspec.cli.main import main as vllm_subspec
from vllm_subspec.cli.quantities import parse_bytes
from vllm_subspec.weights.host_memory import host_memory

RESULTS = Path(__file__).resolve().parent / "results"
SCENARIO = [
    *("--prompts", "python", "--requests", "2", "--tokens", "96", "--plain-tokens", "4"),
    *("--ways", "off", "chain", "union"),
]


def main() -> int:
    summary = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(description=summary, allow_abbrev=False)
    parser.add_argument("--like", type=Path, default=ROOT / "tests/unit/configs/qwen2.5-7b")
    parser.add_argument("--device-memory", type=parse_bytes, default=parse_bytes("8GiB"))
    given, further = parser.parse_known_args()
    cuda = torch.cuda.is_available()
    total = torch.cuda.get_device_properties(0).total_memory if cuda else host_memory().total
    engine = {
        "gpu_memory_utilization": given.device_memory / total,
        "max_model_len": 1024,
        "kv_cache_memory_bytes": 256 << 20,
    }
    options = {"store_dir": str(BUILD / "stores"), "weight_source": "auto" if cuda else "disk"}
    try:
        model = checkpoint_like(given.like)
    except (OSError, ValueError) as error:
        print(f"budget: {error}", file=sys.stderr)
        return 2
    return vllm_subspec(
        [
            *("bench", str(model), *SCENARIO),
            *("--speculative-config", json.dumps(options), "--engine", json.dumps(engine)),
            *("--out", str(RESULTS / f"budget-{given.like.name}.json"), *further),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
