# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""The models that demo and benchmarks run, made from a bundled one, and what they continue."""

from pathlib import Path

from benchmarks.upscale import Recipe, load_config, pick_shape, shaped_like, upscale

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "models" / "pystd-6m"
NOISE = 2.5
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
    width, layers = pick_shape(load_config(SOURCE), gib, dtype)
    recipe = Recipe(SOURCE.name, width, layers, NOISE, 0, dtype)
    return _written(f"pystd-{gib:g}gib-{dtype}", recipe)


def checkpoint_like(shape: Path, dtype: str = "bfloat16") -> Path:
    """The bundled model in nearly the shape that a folder's config.json describes, written once."""
    recipe = Recipe(SOURCE.name, 1, 1, NOISE, 0, dtype)
    recipe = shaped_like(recipe, load_config(SOURCE), load_config(shape))
    return _written(f"pystd-like-{shape.name}-{dtype}", recipe)


def _written(name: str, recipe: Recipe) -> Path:
    folder = BUILD / name
    if not (folder / "config.json").exists():
        upscale(SOURCE, folder, recipe)
    return folder
