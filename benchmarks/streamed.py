# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""The figures of streaming: `vllm-subspec bench` on the bundled model made 1.6 GiB large.

    python -m benchmarks.streamed [further arguments of vllm-subspec bench]

Every decoder layer is streamed from disk. Writes benchmarks/results/streamed.json, its page and
two plots.
"""

import json
import sys
from pathlib import Path

from benchmarks.checkpoints import BUILD, checkpoint
from vllm_subspec.cli.main import main as vllm_subspec

RESULTS = Path(__file__).resolve().parent / "results"
GIB = 1.6
OPTIONS = {"resident_weights_gib": 0, "store_dir": str(BUILD / "stores")}
SCENARIO = [
    *("--prompts", "python", "--requests", "2", "--tokens", "64", "--plain-tokens", "6"),
    *("--batch", "1", "4", "8", "--temperature", "0", "0.6"),
    *("--depth", "48", "4", "16", "64", "--bits", "4", "8", "3", "2"),
]


def main() -> int:
    out = RESULTS / "streamed.json"
    options = ["--speculative-config", json.dumps(OPTIONS), "--out", str(out)]
    status = vllm_subspec(["bench", str(checkpoint(GIB)), *SCENARIO, *options, *sys.argv[1:]])
    if status == 0:
        draw(out)
    return status


def draw(result: Path) -> None:
    """Plots for the README, beside the result."""
    from vllm_subspec.bench import plots

    cells = json.loads(result.read_text())["cells"]
    first = cells[0]
    by_depth = [c for c in cells if all(c[k] == first[k] for k in ("bits", "batch", "temperature"))]
    result.with_suffix(".svg").write_text(plots.speeds(first))
    result.with_name(f"{result.stem}-depth.svg").write_text(plots.sweep(by_depth, "depth"))


if __name__ == "__main__":
    raise SystemExit(main())
