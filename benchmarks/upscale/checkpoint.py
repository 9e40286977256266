# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""From a recipe to a folder: every tensor is made and written in parts."""

from __future__ import annotations

import json
import math
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from benchmarks.upscale.families import (
    FAMILIES,
    LINEARS,
    RESIDUAL_OUTPUTS,
    layer_tensors,
    load_config,
    outer_tensors,
    tensor_shapes,
)
from benchmarks.upscale.shape import (
    DTYPES,
    GIB,
    MAX_DEPTH_FACTOR,
    Recipe,
    size_in_bytes,
    upscaled_config,
)
from benchmarks.upscale.shards import write_shards
from benchmarks.upscale.tiling import layer_plan, widen
from vllm_subspec.weights.checkpoint import tensor_files

# Noise of an added layer's residual outputs over that of the other linears, up to MAX_DEPTH_FACTOR;
# beyond, it falls with the depth.
ADDED_NOISE = 1 / 32
RECIPE_FILE = "upscale.json"
COPIED_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "generation_config.json"),
    *("vocab.json", "merges.txt", "special_tokens_map.json", "chat_template.jinja"),
)
_NO_CODE = {"AutoTokenizer": [None, None]}
PART_ELEMENTS = 1 << 24  # Of an embedding or head that is made at a time.

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
# Constants that old checkpoints hold and no model reads.
_IGNORED = re.compile(r"rotary_emb\.inv_freq$")


class Source:
    """The tensors of the small checkpoint, read from one file or several when they are asked for.

    Raises:
        ValueError: one sentence: a file cannot be read, or the tensors are not those that the
            configuration promises.
    """

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        try:
            files = tensor_files(folder)
            opened = {path: safe_open(path, "pt") for path in set(files.values())}
        except SafetensorError as error:
            raise ValueError(f"{folder} has a file that is not safetensors: {error}") from None
        self._files: dict[str, Any] = {name: opened[path] for name, path in files.items()}
        shapes = tensor_shapes(config)
        tied = {"lm_head.weight"} if config.get("tie_word_embeddings", False) else set[str]()
        for name in sorted(self._files.keys() - shapes.keys() - tied):
            if not _IGNORED.search(name):
                raise ValueError(
                    f"{folder} holds {name}, which its config.json does not account for"
                )
        for name, shape in shapes.items():
            if name not in self._files:
                raise ValueError(f"{folder} holds no {name}")
            held = tuple(self._files[name].get_slice(name).get_shape())
            if held != shape:
                raise ValueError(f"{folder}: {name} has shape {held}, not {shape} as configured")

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor


class Upscaled:
    """The tensors of the upscaled checkpoint, made in parts when they are asked for."""

    def __init__(self, source: Path, recipe: Recipe) -> None:
        small = load_config(source)
        if min(recipe.copies.values()) < 1 or recipe.layers < small["num_hidden_layers"]:
            raise ValueError(
                f"width {recipe.width} and {recipe.layers} layers: a checkpoint can only grow from "
                f"width 1 and {small['num_hidden_layers']} layers"
            )
        if not 0 <= recipe.noise < math.inf:
            raise ValueError(f"--noise is {recipe.noise}: give a number of 0 or more")
        if not 0 <= recipe.seed < 1 << 32:
            raise ValueError(f"--seed is {recipe.seed}: give a number from 0 to 2**32 - 1")
        self.config = upscaled_config(small, recipe)
        dtype = DTYPES[recipe.dtype]
        self.layout = {name: (dtype, shape) for name, shape in tensor_shapes(self.config).items()}
        self._recipe, self._dtype = recipe, dtype
        self._source = Source(source, small)
        self._tied = small.get("tie_word_embeddings", False)
        deepest = MAX_DEPTH_FACTOR * small["num_hidden_layers"]
        self._added = ADDED_NOISE * min(1, deepest / recipe.layers)
        self._plan = layer_plan(small["num_hidden_layers"], recipe.layers)
        self._outer, self._inner = outer_tensors(self.config), layer_tensors(self.config)

    def parts(self, name: str) -> Iterator[Tensor]:
        """The values of a tensor, in parts that follow each other in memory."""
        if found := _LAYER.fullmatch(name):
            origin, keeps = self._plan[int(found[1])]
            local = found[2]
            yield from self._layer_parts(name, f"model.layers.{origin}.{local}", local, keeps)
        elif name == "model.norm.weight":
            yield self._source[name].repeat(self._recipe.width).to(self._dtype)
        else:
            yield from self._vocabulary_parts(name)

    def _layer_parts(self, name: str, origin: str, local: str, keeps: bool) -> Iterator[Tensor]:
        module, _, kind = local.rpartition(".")
        copies = tuple(self._recipe.copies.get(d, 1) for d in self._inner[local])
        keep = keeps or module not in RESIDUAL_OUTPUTS
        if module in LINEARS and kind == "weight":
            noise = self._recipe.noise * (1 if keep else self._added)
            # Seeded by name: a tensor does not depend on which were made before it.
            seed = self._recipe.seed ^ zlib.crc32(name.encode())
            outputs, inputs = copies
            yield from widen(
                self._source[origin], (outputs, inputs), noise, self._dtype, seed, keep
            )
        elif kind == "bias" and not (keep and origin in self._source):
            yield torch.zeros(self.layout[name][1], dtype=self._dtype)
        else:
            yield self._source[origin].repeat(copies[0]).to(self._dtype)

    def _vocabulary_parts(self, name: str) -> Iterator[Tensor]:
        """The embedding, tiled as it is, or the head: a linear that adds up the copies."""
        is_head = name == "lm_head.weight" and not self._tied
        width = self._recipe.width
        weight = self._source["lm_head.weight" if is_head else "model.embed_tokens.weight"]
        rows = max(1, PART_ELEMENTS // (weight.shape[1] * width))
        for part in weight.split(rows):
            if name == "lm_head.weight":
                yield from widen(part, (1, width), 0.0, self._dtype, seed=0)
            else:
                yield part.repeat(1, width).to(self._dtype)


def upscale(source: Path, out: Path, recipe: Recipe) -> None:
    """Write the upscaled checkpoint to `out`, which must not exist yet; all of it or nothing.

    Raises:
        ValueError: one sentence: the source cannot be read or tiled so, `out` exists, or the disk
            is too small.
    """
    if out.exists():
        raise ValueError(f"{out} exists: remove it or name another folder")
    upscaled = Upscaled(source, recipe)
    out.parent.mkdir(parents=True, exist_ok=True)
    require_space(out.parent, size_in_bytes(upscaled.config))
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    threads = torch.get_num_threads()
    # Tensors are made side by side, each by one thread. Elementwise steps are too short to share:
    # on a busy machine two threads, waiting for each other after each, took eight times as long.
    torch.set_num_threads(1)
    try:
        write_checkpoint(source, partial, upscaled, recipe)
        partial.chmod(0o755)
        partial.rename(out)
    finally:
        torch.set_num_threads(threads)
        shutil.rmtree(partial, ignore_errors=True)


def require_space(folder: Path, needed: int) -> None:
    """ValueError when the disk of `folder` has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"{folder} has {free / GIB:.1f} GiB free and the checkpoint takes {needed / GIB:.1f} "
            f"GiB: {(needed - free) / GIB:.1f} GiB are missing"
        )


def write_checkpoint(source: Path, out: Path, upscaled: Upscaled, recipe: Recipe) -> None:
    """Write shards, index, configuration, tokenizer and recipe into the folder `out`."""
    total = size_in_bytes(upscaled.config)
    with tqdm(desc="upscaling", total=total, unit="B", unit_scale=True, unit_divisor=1024) as bar:
        write_shards(out, upscaled.layout, upscaled.parts, bar.update)
    for name, content in (("config.json", upscaled.config), (RECIPE_FILE, asdict(recipe))):
        (out / name).write_text(json.dumps(content, indent=2) + "\n")
    for name in COPIED_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, out / name)
    kind = upscaled.config["model_type"]
    if FAMILIES[kind].own_tokenizer and kind != load_config(source)["model_type"]:
        _keep_tokenizer(out / "tokenizer_config.json")


def _keep_tokenizer(path: Path) -> None:
    """Have transformers read tokenizer.json as it is although the family has another tokenizer.

    An entry for code of the checkpoint's own, which there is not, makes it believe the class named
    beside it; without, 5.x takes the family's and cuts text into tokens the model never saw so.
    """
    held = json.loads(path.read_text()) if path.exists() else {}
    kept = {"tokenizer_class": "TokenizersBackend"} | held | {"auto_map": _NO_CODE}
    path.write_text(json.dumps(kept, indent=2) + "\n")
