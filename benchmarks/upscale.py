# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Make a checkpoint of any size that computes the same function as a small Llama checkpoint.

    python benchmarks/upscale.py models/pystd-6m OUT --gib 1.5

Net2Net (Chen, Goodfellow, Shlens, "Net2Net: Accelerating Learning via Knowledge Transfer",
ICLR 2016), for decoders with RMSNorm, rotary grouped-query attention and a gated MLP:

- wider: hidden state, heads and MLP are tiled `width` times. A linear W [N, K] becomes
  [width N, width K], each of its blocks W / width plus noise whose sum over the input copies is
  zero. On a tiled input the noise cancels, so the output is the tiled output of W; a quantised copy
  does not see it cancel, which keeps quantisation error as large as in a model whose weights are
  all different. The head size, and so rotary embedding and softmax scale, stay; query head
  c * heads + h reads KV head c * kv_heads + h // group, so tiling keeps the grouping.
- deeper: added layers have o_proj and down_proj of zero-sum noise alone, so what they add to the
  residual stream is zero. That noise is small (ADDED_NOISE): at full size each added layer would
  multiply the rounding differences between copies, and ten of them drown the function. Its relative
  precision, which is what quantisation and compression see, does not depend on its size.
- lm_head is untied: tiled embedding / width.

A model with random weights of this size would accept drafts at a rate that says nothing; this one
continues text as its source does. Layers are made and written one at a time.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

GIB = 1 << 30
MAX_DEPTH_FACTOR = 3  # At most two added layers for each layer of the source.
ADDED_NOISE = 1 / 32  # Noise of an added layer's residual outputs, over that of the other linears.
RECIPE_FILE = "upscale.json"
COPIED_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

LINEARS = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
NORMS = ("input_layernorm", "post_attention_layernorm")
RESIDUAL_OUTPUTS = ("self_attn.o_proj", "mlp.down_proj")


@dataclass(frozen=True)
class Recipe:
    """What an upscaled checkpoint was made from; stored beside it as upscale.json."""

    source: str
    width: int
    layers: int
    noise: float
    seed: int
    dtype: str


def load_config(source: Path) -> dict[str, Any]:
    """Read config.json; ValueError for an architecture whose function tiling would not preserve."""
    path = source / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} does not exist: name the folder of a Llama checkpoint")
    config: dict[str, Any] = json.loads(path.read_text())
    if config.get("model_type") != "llama":
        raise ValueError(
            f"{path}: model_type is {config.get('model_type')!r}; only llama is handled"
        )
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise ValueError(f"{path}: {key} is true; only linears without bias are handled")
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    return config


def upscaled_config(config: dict[str, Any], width: int, layers: int, dtype: str) -> dict[str, Any]:
    """The configuration of the checkpoint `width` times as wide with `layers` layers."""
    tiled = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    return (
        config
        | {key: config[key] * width for key in tiled}
        | {"num_hidden_layers": layers, "tie_word_embeddings": False, "dtype": dtype}
    )


def parameter_count(config: dict[str, Any]) -> int:
    """Parameters of an untied Llama checkpoint with this configuration."""
    hidden, mlp = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"] + config["num_key_value_heads"]
    layer = 2 * hidden * heads * config["head_dim"] + 3 * hidden * mlp + 2 * hidden
    return 2 * config["vocab_size"] * hidden + config["num_hidden_layers"] * layer + hidden


def pick_shape(config: dict[str, Any], gib: float, dtype: str) -> tuple[int, int]:
    """(width, layers) of the smallest checkpoint of at least `gib` GiB.

    The width is a power of two, so that W / width is exact, and the depth stays between one and
    MAX_DEPTH_FACTOR times the source's.
    """
    if not gib > 0:
        raise ValueError(f"--gib is {gib}: give a size above 0")
    source_layers = config["num_hidden_layers"]

    def size(width: int, layers: int) -> int:
        wide = upscaled_config(config, width, layers, dtype)
        return parameter_count(wide) * DTYPES[dtype].itemsize

    width, fitting = 1, list[tuple[int, int, int]]()
    while True:
        layer = size(width, 1) - size(width, 0)
        wanted = math.ceil((gib * GIB - size(width, 0)) / layer)
        layers = max(wanted, source_layers)
        if layers <= MAX_DEPTH_FACTOR * source_layers:
            fitting.append((size(width, layers), width, layers))
        if wanted <= source_layers:
            break
        width *= 2
    _, width, layers = min(fitting)
    return width, layers


def widen(
    weight: Tensor, width: int, noise: float, dtype: torch.dtype, seed: int, keep: bool = True
) -> Tensor:
    """Tile a linear's weight [N, K] to [width N, width K], in `dtype`.

    `noise` is the noise's standard deviation over that of weight / width. With `keep` false the
    result is the noise alone: a linear that maps every tiled input to zero. The rounding error of
    one input copy is carried into the next, so that rounding leaves the sum over copies off by one
    rounding, not by `width` of them.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = weight.float()
    rows, columns = weight.shape
    out = torch.empty(width, rows, width, columns, dtype=dtype)
    share = weight / width if keep else torch.zeros_like(weight)
    # Taking the mean out of `width` independent draws leaves 1 - 1 / width of their variance.
    deviation = (
        0.0 if width == 1 else noise * float(weight.std()) / width / math.sqrt(1 - 1 / width)
    )
    for copy in out:
        error = torch.randn(width, rows, columns, generator=generator).mul_(deviation)
        error -= error.mean(dim=0)
        carry = share.new_zeros(())
        for column in range(width):
            exact = error[column].add_(share).add_(carry)
            copy[:, column] = exact
            carry = exact - copy[:, column]
    return out.reshape(width * rows, width * columns)


def layer_plan(source_layers: int, layers: int) -> list[tuple[int, bool]]:
    """(source layer, keeps its function) of each new layer, the added ones spread evenly."""
    starts = [index * source_layers // layers for index in range(layers + 1)]
    return [(start, end > start) for start, end in zip(starts, starts[1:], strict=False)]


def shards(source: Path, config: dict[str, Any], recipe: Recipe) -> Iterator[dict[str, Tensor]]:
    """The tensors of the new checkpoint: embeddings and head first, then layer by layer."""
    width, dtype = recipe.width, DTYPES[recipe.dtype]
    with safe_open(source / "model.safetensors", framework="pt") as weights:
        embedding = weights.get_tensor("model.embed_tokens.weight").float()
        tied = config.get("tie_word_embeddings", False)
        head = embedding if tied else weights.get_tensor("lm_head.weight").float()
        yield {
            "model.embed_tokens.weight": embedding.repeat(1, width).to(dtype),
            "lm_head.weight": (head / width).repeat(1, width).to(dtype),
            "model.norm.weight": weights.get_tensor("model.norm.weight").repeat(width).to(dtype),
        }
        plan = layer_plan(config["num_hidden_layers"], recipe.layers)
        for index, (origin, keeps) in enumerate(plan):
            tensors = {}
            for name in NORMS:
                norm = weights.get_tensor(f"model.layers.{origin}.{name}.weight")
                tensors[f"model.layers.{index}.{name}.weight"] = norm.repeat(width).to(dtype)
            for name in LINEARS:
                target = f"model.layers.{index}.{name}.weight"
                linear = weights.get_tensor(f"model.layers.{origin}.{name}.weight")
                keep = keeps or name not in RESIDUAL_OUTPUTS
                noise = recipe.noise if keep else recipe.noise * ADDED_NOISE
                # Seeded by name: a tensor does not depend on which were made before it.
                seed = recipe.seed ^ zlib.crc32(target.encode())
                tensors[target] = widen(linear, width, noise, dtype, seed, keep)
            yield tensors


def upscale(source: Path, out: Path, recipe: Recipe) -> None:
    """Write the upscaled checkpoint to `out`, which must not exist yet; all of it or nothing."""
    if out.exists():
        raise ValueError(f"{out} exists: remove it or name another folder")
    config = load_config(source)
    if recipe.width < 1 or recipe.layers < config["num_hidden_layers"]:
        raise ValueError(
            f"width {recipe.width} and {recipe.layers} layers: a checkpoint can only grow from "
            f"width 1 and {config['num_hidden_layers']} layers"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    threads = torch.get_num_threads()
    # Many short elementwise steps: on a busy machine two threads, waiting for each other after each
    # step, took eight times as long as one.
    torch.set_num_threads(1)
    try:
        write_checkpoint(source, partial, config, recipe)
        partial.chmod(0o755)
        partial.rename(out)
    finally:
        torch.set_num_threads(threads)
        shutil.rmtree(partial, ignore_errors=True)


def write_checkpoint(source: Path, out: Path, config: dict[str, Any], recipe: Recipe) -> None:
    """Write shards, index, configuration, tokenizer and recipe into the folder `out`."""
    count = recipe.layers + 1
    weight_map: dict[str, str] = {}
    total = 0
    made = shards(source, config, recipe)
    for number, tensors in enumerate(tqdm(made, "upscaling", count, unit="layer"), 1):
        file = f"model-{number:05}-of-{count:05}.safetensors"
        save_file(tensors, out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    wide = upscaled_config(config, recipe.width, recipe.layers, recipe.dtype)
    for name, content in (
        ("model.safetensors.index.json", index),
        ("config.json", wide),
        (RECIPE_FILE, asdict(recipe)),
    ):
        (out / name).write_text(json.dumps(content, indent=2) + "\n")
    for name in COPIED_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, out / name)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Make a large Llama checkpoint that computes the same function as a small one."
    )
    parser.add_argument("source", type=Path, help="folder of the small checkpoint")
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--gib", type=float, required=True, help="size to reach, in GiB of weights")
    parser.add_argument(
        "--noise", type=float, default=2.5, help="zero-sum noise, in deviations of a tiled weight"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    started = time.monotonic()
    try:
        config = load_config(arguments.source)
        width, layers = pick_shape(config, arguments.gib, arguments.dtype)
        recipe = Recipe(
            arguments.source.name, width, layers, arguments.noise, arguments.seed, arguments.dtype
        )
        upscale(arguments.source, arguments.out, recipe)
    except (OSError, ValueError) as error:
        print(f"upscale: {error}", file=sys.stderr)
        return 1
    wide = upscaled_config(config, width, layers, arguments.dtype)
    size = parameter_count(wide) * DTYPES[arguments.dtype].itemsize
    print(
        f"{arguments.out}: {size / GIB:.2f} GiB, hidden {wide['hidden_size']}, {layers} layers, "
        f"{wide['num_attention_heads']} heads, MLP {wide['intermediate_size']}, "
        f"{time.monotonic() - started:.1f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
