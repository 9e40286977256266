# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Writing a model's substitutes as a compressed-tensors checkpoint that plain vLLM loads too."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
)
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vllm_subspec.weights.checkpoint import quantization_config, read_config, tensor_files
from vllm_subspec.weights.quantize import Quantizer, quantize
from vllm_subspec.weights.quantized_weight import QuantFormat, QuantizedWeight

# A file of the result is written when this many bytes have gathered, which bounds memory.
SHARD_BYTES = 1 << 30

_COPIED_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".py", ".tiktoken"}
_IN_DECODER_LAYER = re.compile(r"(^|\.)layers\.\d+\.")
# Modules with a matrix that is not a linear layer's, or (routers) one too delicate to code.
_NOT_CODED = re.compile(r"norm|embed|router|(^|_)gate$|^wg$")

Progress = Callable[[int, int], None]


def is_decoder_linear(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of a Hugging Face checkpoint is a linear weight inside a decoder layer."""
    module, _, kind = name.rpartition(".")
    if kind != "weight" or len(shape) != 2 or not _IN_DECODER_LAYER.search(module):
        return False
    return not _NOT_CODED.search(module.rpartition(".")[2])


def carried_format(fmt: QuantFormat) -> QuantFormat:
    """The format that is written for `fmt`.

    3-bit codes travel as 4-bit ones: compressed-tensors 0.17 and vLLM 0.32 disagree on how many
    words they fill.
    """
    return QuantFormat(4, fmt.group_size, fmt.symmetric) if fmt.bits == 3 else fmt


def packed_tensors(module: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """The compressed-tensors `pack-quantized` tensors of one linear, by full name."""
    codes, zeros, fmt = weight.codes, weight.zeros, carried_format(weight.format)
    if fmt.symmetric:
        # A symmetric zero point is implied by the width, so codes move with it.
        codes = codes + ((1 << (fmt.bits - 1)) - (1 << (weight.format.bits - 1)))
    offset = 1 << (fmt.bits - 1)

    def packed(unsigned: Tensor, axis: int) -> Tensor:
        signed = (unsigned.to(torch.int16) - offset).to(torch.int8)
        return pack_to_int32(signed, fmt.bits, packed_dim=axis).contiguous()

    tensors = {
        f"{module}.weight_packed": packed(codes, 1),
        f"{module}.weight_scale": weight.scales,
        f"{module}.weight_shape": torch.tensor(codes.shape),
    }
    if not fmt.symmetric:
        tensors[f"{module}.weight_zero_point"] = packed(zeros, 0)
    return tensors


def quantize_checkpoint(
    model_dir: Path,
    out_dir: Path,
    fmt: QuantFormat,
    quantizer: Quantizer,
    progress: Progress | None = None,
) -> None:
    """Write a copy of a model whose decoder linears are coded in `fmt`.

    Tensors are read one at a time, and embeddings, norms, routers and lm_head are copied as they
    are. `out_dir` appears complete or not at all. `progress` is called with the elements coded so
    far and their total. Raises ValueError when the model is quantised already, has nothing to
    code, is not safetensors or has a weight that the group size does not divide, and
    FileExistsError when `out_dir` is not empty.
    """
    config = read_config(model_dir)
    if quantization_config(model_dir, config) is not None:
        raise ValueError(f"{model_dir} is already quantised: give the full-precision model")
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise FileExistsError(f"{out_dir} exists and is not an empty folder: choose another one")
    files = tensor_files(model_dir)
    coded, ignored = _survey(files, fmt)
    if not coded:
        raise ValueError(f"{model_dir} has no linear weights in layers.<number>. to quantise")

    out_dir.parent.mkdir(parents=True, exist_ok=True)
    partial = out_dir.with_name(f".{out_dir.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        writer = _ShardWriter(partial)
        done, total = 0, sum(coded.values())
        for name, tensor in _tensors(files):
            if name not in coded:
                writer.add({name: tensor})
                continue
            try:
                weight = quantize(tensor, fmt, quantizer, tensor.dtype)
            except ValueError as error:
                raise ValueError(f"{name} cannot be quantised: {error}") from None
            writer.add(packed_tensors(name.removesuffix(".weight"), weight))
            done += tensor.numel()
            if progress is not None:
                progress(done, total)
        writer.finish()
        config["quantization_config"] = _description(carried_format(fmt), ignored)
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for path in model_dir.iterdir():
            wanted = path.suffix in _COPIED_SUFFIXES and not path.name.endswith(".index.json")
            if path.is_file() and wanted and path.name != "config.json":
                shutil.copyfile(path, partial / path.name)
        for path in partial.glob("*.safetensors"):
            shutil.copymode(partial / "config.json", path)  # they are written for the owner alone
        partial.rename(out_dir)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _survey(files: dict[str, Path], fmt: QuantFormat) -> tuple[dict[str, int], list[str]]:
    """Elements of every weight to be coded, and the names of other modules with a matrix."""
    coded: dict[str, int] = {}
    ignored = ["lm_head"]
    for path in sorted(set(files.values())):
        with safe_open(path, "pt") as file:
            for name in (n for n, where in files.items() if where == path):
                shape = tuple(file.get_slice(name).get_shape())
                module = name.removesuffix(".weight")
                if is_decoder_linear(name, shape):
                    try:
                        fmt.columns_per_group(shape[1])
                    except ValueError as error:
                        raise ValueError(f"{name} cannot be quantised: {error}") from None
                    coded[name] = shape[0] * shape[1]
                elif len(shape) == 2 and name.endswith(".weight") and module not in ignored:
                    ignored.append(module)
    return coded, ignored


def _tensors(files: dict[str, Path]) -> Iterator[tuple[str, Tensor]]:
    for path in sorted(set(files.values())):
        with safe_open(path, "pt") as file:
            for name in (n for n, where in files.items() if where == path):
                yield name, file.get_tensor(name)


def _description(fmt: QuantFormat, ignored: list[str]) -> dict[str, object]:
    group = None if fmt.group_size == -1 else fmt.group_size
    weights = QuantizationArgs(
        num_bits=fmt.bits,
        type="int",
        symmetric=fmt.symmetric,
        strategy="channel" if group is None else "group",
        group_size=group,
    )
    layout = CompressionFormat.pack_quantized.value
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, format=layout)
    return QuantizationConfig(
        config_groups={"group_0": scheme},
        format=layout,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=ignored,
    ).model_dump(mode="json")


class _ShardWriter:
    """Gathers tensors into safetensors files of about SHARD_BYTES and writes their index."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._bytes = 0

    def add(self, tensors: dict[str, Tensor]) -> None:
        self._pending.update(tensors)
        self._pending_bytes += sum(t.nbytes for t in tensors.values())
        if self._pending_bytes >= SHARD_BYTES:
            self._flush()

    def _flush(self) -> None:
        save_file(self._pending, self._part(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self._folder / f"part-{number}"

    def finish(self) -> None:
        if self._pending:
            self._flush()
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards):
            final = f"model-{number + 1:05d}-of-{len(self._shards):05d}.safetensors"
            self._part(number).rename(self._folder / final)
            weight_map.update(dict.fromkeys(names, final))
        index = {"metadata": {"total_size": self._bytes}, "weight_map": weight_map}
        path = self._folder / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
