# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""`vllm-subspec quantize MODEL OUT`: save a model's substitutes as a low-bit checkpoint."""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from vllm_subspec.weights.quantized_weight import SUPPORTED_BITS, QuantFormat
from vllm_subspec.weights.save_checkpoint import quantize_checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    parser.add_argument("model", metavar="MODEL", help="model folder, or its name on the hub")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write; new or empty")
    parser.add_argument("--bits", type=int, default=4, choices=SUPPORTED_BITS)
    parser.add_argument(
        "--group-size", type=int, default=64, help="columns per scale; -1 for one scale per row"
    )
    parser.add_argument("--quantizer", default="hqq", choices=("hqq", "rtn"))
    parser.add_argument(
        "--symmetric", action="store_true", help="no zero points: smaller, less accurate"
    )


def run(args: argparse.Namespace) -> int:
    """Carry the command out; 0 when OUT was written, 2 after bad input (told on stderr)."""
    try:
        fmt = QuantFormat(args.bits, args.group_size, args.symmetric)
        source = _model_folder(args.model)
        with ExitStack() as stack:
            bar: tqdm[NoReturn] | None = None

            def progress(done: int, total: int) -> None:
                nonlocal bar
                if bar is None:  # not before the first weight: bad input shows no bar
                    bar = tqdm(total=total, unit=" weights", unit_scale=True, desc="quantising")
                    stack.enter_context(bar)
                bar.update(done - bar.n)

            quantize_checkpoint(source, args.out, fmt, args.quantizer, progress)
    except (ValueError, OSError) as error:
        print(f"vllm-subspec quantize: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.out}")
    return 0


def _model_folder(model: str) -> Path:
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    try:
        return Path(snapshot_download(model, ignore_patterns=["*.bin", "*.pth", "*.gguf"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{model} is neither a folder nor a model that the hub gives out ({reason})"
        ) from None
