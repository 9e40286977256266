# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Reading substitutes from a low-bit checkpoint, whoever made it.

Understood are compressed-tensors `pack-quantized` (what `vllm-subspec quantize` writes), GPTQ and
AWQ; see packed_formats.py for their layouts and save_checkpoint.py for the writer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from vllm_subspec.weights.packed_formats import (
    decode_awq,
    decode_compressed_tensors,
    decode_gptq,
)
from vllm_subspec.weights.quantized_weight import QuantizedWeight

_Decoder = Callable[[Mapping[str, Tensor], Mapping[str, Any]], QuantizedWeight]
# Per method: the decoder, the tensors a linear must have, and those it may have.
_METHODS: dict[str, tuple[_Decoder, tuple[str, ...], tuple[str, ...]]] = {
    "compressed-tensors": (
        decode_compressed_tensors,
        ("weight_packed", "weight_scale", "weight_shape"),
        ("weight_zero_point", "weight_g_idx"),
    ),
    "gptq": (decode_gptq, ("qweight", "qzeros", "scales"), ("g_idx",)),
    "awq": (decode_awq, ("qweight", "qzeros", "scales"), ()),
}

_MUST_MATCH = (
    "architectures",
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


def read_config(folder: Path) -> dict[str, Any]:
    """The model's config.json; ValueError when there is none or it is not a JSON object."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} is not a model folder: cannot read config.json ({error})"
        ) from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return config


def quantization_config(folder: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """How the checkpoint says it is quantised, or None when it is not.

    Older GPTQ and AWQ checkpoints keep this in a file of its own.
    """
    found = config.get("quantization_config") or config.get("compression_config")
    if found:
        return dict(found)
    for name, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
        if (folder / name).is_file():
            return {"quant_method": method, **json.loads((folder / name).read_text())}
    return None


def tensor_files(folder: Path) -> dict[str, Path]:
    """The safetensors file of every tensor in a model folder; ValueError when there is none."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = {k: folder / v for k, v in json.loads(index.read_text())["weight_map"].items()}
        for path in set(files.values()):
            if not path.is_file():
                raise ValueError(f"{index} names {path.name}, which does not exist")
        return files
    files = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            files.update(dict.fromkeys(file.keys(), path))
    if not files:
        raise ValueError(f"{folder} holds no safetensors files: convert the model to safetensors")
    return files


class SubstituteCheckpoint:
    """A low-bit checkpoint whose linears serve as substitutes. Opened with `open`."""

    def __init__(self, path: Path, config: dict[str, Any], quantization: dict[str, Any]) -> None:
        self.path = path
        self._config = config
        self._quantization = quantization
        self._decode, self._required, self._optional = _METHODS[quantization["quant_method"]]
        self._files = tensor_files(path)

    @classmethod
    def open(cls, path: Path | str) -> SubstituteCheckpoint:
        """Open a model folder; reads no weights yet.

        Raises ValueError when it is not a checkpoint in a format understood here.
        """
        folder = Path(path)
        config = read_config(folder)
        quantization = quantization_config(folder, config)
        if quantization is None:
            raise ValueError(
                f"{folder} is not quantised: make a low-bit copy with `vllm-subspec quantize`"
            )
        method = str(quantization.get("quant_method", "")).lower()
        if method not in _METHODS:
            raise ValueError(
                f'{folder} is quantised by "{method}"; a substitute must be one of '
                f"{', '.join(_METHODS)}"
            )
        if method == "compressed-tensors":
            _require_packed_integers(folder, quantization)
        return cls(folder, config, {**quantization, "quant_method": method})

    def check_matches(self, config: Mapping[str, Any]) -> None:
        """Compare with the target's config (that of its text model, as a dictionary).

        A setting that either side leaves out is not compared. Raises ValueError that names the
        first difference.
        """
        own = {**self._config, **self._config.get("text_config", {})}
        other = {**config, **config.get("text_config", {})}
        for key in _MUST_MATCH:
            ours, theirs = own.get(key), other.get(key)
            if ours is not None and theirs is not None and ours != theirs:
                raise ValueError(
                    f"{self.path} is not a copy of the target: its {key} is {ours}, the target's "
                    f"is {theirs}"
                )

    def weight(self, name: str) -> QuantizedWeight:
        """The quantised weight of the linear `name`, such as "model.layers.0.mlp.up_proj".

        Raises ValueError when the checkpoint has no such quantised linear or codes it in a way that
        is not supported.
        """
        module = name.removesuffix(".weight")
        missing = [s for s in self._required if f"{module}.{s}" not in self._files]
        if missing:
            raise ValueError(
                f"{self.path} has no quantised weight for {module}: {missing[0]} is missing"
            )
        tensors = {}
        for suffix in (*self._required, *self._optional):
            full = f"{module}.{suffix}"
            if full in self._files:
                with safe_open(self._files[full], "pt") as file:
                    tensors[suffix] = file.get_tensor(full)
        try:
            return self._decode(tensors, self._quantization)
        except ValueError as error:
            raise ValueError(f"{module} in {self.path} cannot be a substitute: {error}") from None


def _require_packed_integers(folder: Path, quantization: Mapping[str, Any]) -> None:
    for group in quantization.get("config_groups", {}).values():
        layout = group.get("format") or quantization.get("format")
        kind = (group.get("weights") or {}).get("type", "int")
        if layout != "pack-quantized" or kind != "int" or group.get("input_activations"):
            raise ValueError(
                f'{folder} is compressed-tensors of format "{layout}"; a substitute must be '
                '"pack-quantized" with integer weights and without quantised activations'
            )
