# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""The models that demo and benchmarks run, made from a bundled one, and what they continue."""

from pathlib import Path

from benchmarks.upscale import Recipe, load_config, pick_shape, upscale

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
"""Checkpoints and stores that the demo and the benchmarks make; not in git."""

PROMPTS = [
    "import os\nimport sys\n\n\ndef walk(path):\n",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "def parse_args(argv=None):\n    parser = argparse.ArgumentParser(",
    "    def test_empty(self):\n        self.assertEqual(",
]


def checkpoint(gib: float, dtype: str = "bfloat16") -> Path:
    """The bundled model made at least ``gib`` GiB large, written once."""
    folder = BUILD / f"pystd-{gib:g}gib-{dtype}"
    if not (folder / "config.json").exists():
        source = ROOT / "models" / "pystd-6m"
        width, layers = pick_shape(load_config(source), gib, dtype)
        upscale(source, folder, Recipe(source.name, width, layers, 2.5, 0, dtype))
    return folder
