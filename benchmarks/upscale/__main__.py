# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""The command: make an upscaled checkpoint, or check one."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import benchmarks.upscale as package
from benchmarks.upscale.checkpoint import upscale
from benchmarks.upscale.families import FAMILIES, load_config, sizes
from benchmarks.upscale.shape import (
    DTYPES,
    GIB,
    Recipe,
    pick_shape,
    shaped_like,
    size_in_bytes,
    upscaled_config,
)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.upscale",
        description=package.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, help="folder of the small checkpoint")
    parser.add_argument("out", type=Path, help="folder to make, or with --check to look at")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--gib", type=float, help="size to reach, in GiB of weights")
    what.add_argument(
        "--like",
        type=Path,
        help="config.json (or its folder) of a model whose shape is wanted as nearly as tiling "
        "allows; vocabulary and head size stay the source's",
    )
    what.add_argument("--width", type=int, help="copies of hidden state, heads and MLP")
    what.add_argument(
        "--check",
        action="store_true",
        help="make nothing: compare OUT's most likely next tokens with SOURCE's on Python text, "
        "and both with those of their 4-bit copies; exit 1 where fewer than 99.5%% are the same",
    )
    parser.add_argument("--layers", type=int, help="with --width; default: the source's number")
    parser.add_argument(
        "--family", choices=FAMILIES, help="default: that of --like, or the source's own"
    )
    parser.add_argument(
        "--noise",
        type=float,
        default=2.5,
        help="zero-sum noise in deviations of a tiled weight (default: 2.5): about sqrt(width-1), "
        "2.5 to 3 at width 8, keeps a 4-bit copy as good as the source's is, 0 repeats tiles",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (default: 0)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument(
        "--positions", type=int, default=1000, help="with --check (default: 1000, rounded up)"
    )
    parser.add_argument(
        "--function-only",
        action="store_true",
        help="with --check: leave out the 4-bit copies, which take most of its time",
    )
    arguments = parser.parse_args(argv)
    if arguments.layers is not None and arguments.width is None:
        parser.error("--layers goes with --width: --gib and --like choose the number of layers")
    return arguments


def make(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.source)
    given = (arguments.noise, arguments.seed, arguments.dtype)
    like: dict[str, Any] | None = None
    width, layers = arguments.width, arguments.layers
    if arguments.gib is not None:
        width, layers = pick_shape(config, arguments.gib, arguments.dtype)
    if layers is None:
        layers = config["num_hidden_layers"]
    recipe = Recipe(arguments.source.name, width, layers, *given, family=arguments.family)
    if arguments.like is not None:
        like = load_config(arguments.like)
        recipe = shaped_like(recipe, config, like)
    started = time.monotonic()
    upscale(arguments.source, arguments.out, recipe)
    wide = upscaled_config(config, recipe)
    print(f"{arguments.out}: {describe(wide)}, {time.monotonic() - started:.1f} s")
    if like is not None:
        wanted = describe(like | {"dtype": arguments.dtype})
        print(f"{arguments.like} has {wanted}")
    return 0


def describe(config: dict[str, Any]) -> str:
    size = sizes(config)
    heads, kv_heads = size["query"] // size["head"], size["kv"] // size["head"]
    return (
        f"{config['model_type']} of {size_in_bytes(config) / GIB:.2f} GiB, hidden {size['hidden']}"
        f", {size['layers']} layers, MLP {size['mlp']}, {heads} heads and {kv_heads} KV heads of "
        f"{size['head']}, vocabulary {size['vocabulary']}"
    )


def check(arguments: argparse.Namespace) -> int:
    # Imports transformers, which takes seconds that other uses need not wait for.
    from benchmarks.upscale.check import REQUIRED, compare

    found = compare(
        arguments.source, arguments.out, arguments.positions, copies=not arguments.function_only
    )
    enough = found.function >= REQUIRED
    print(
        f"{arguments.out} agrees with {arguments.source} on {found.function:.2%} of "
        f"{found.positions} positions, {'at least' if enough else 'less than'} {REQUIRED:.1%}"
    )
    if found.source_4bit is not None:
        print(
            f"4-bit copies agree with their own originals on {found.upscaled_4bit:.2%} (upscaled) "
            f"and {found.source_4bit:.2%} (source)"
        )
    return 0 if enough else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Carry the command out.

    0; 1 where the check finds too little agreement; 2 after bad input (told on stderr).
    """
    arguments = parse_arguments(argv)
    try:
        return check(arguments) if arguments.check else make(arguments)
    except (OSError, ValueError) as error:
        print(f"upscale: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
