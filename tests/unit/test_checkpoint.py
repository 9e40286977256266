# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Saved substitutes and foreign low-bit checkpoints, packed here by loops of their own."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vllm_subspec.cli import quantize as command
from vllm_subspec.weights import save_checkpoint
from vllm_subspec.weights.checkpoint import SubstituteCheckpoint
from vllm_subspec.weights.quantize import quantize
from vllm_subspec.weights.quantized_weight import QuantFormat
from vllm_subspec.weights.save_checkpoint import is_decoder_linear, quantize_checkpoint

MODEL = Path(__file__).parents[2] / "models" / "pystd-6m"
LINEAR = "model.layers.0.mlp.up_proj"
N, K = 32, 64

Grid = list[list[int]]


def drawn(rows: int, columns: int, bits: int, seed: int) -> Grid:
    source = random.Random(seed)
    return [[source.randrange(1 << bits) for _ in range(columns)] for _ in range(rows)]


def transposed(grid: Grid) -> Grid:
    return [list(column) for column in zip(*grid, strict=True)]


def pack_row(values: list[int], bits: int, dense: bool) -> list[int]:
    """Signed 32-bit words of a row of codes, low bits first."""
    if dense:
        stream = sum(value << (bits * i) for i, value in enumerate(values))
        count = -(-len(values) * bits // 32)
        words = [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(count)]
    else:
        per_word = 32 // bits
        words = [
            sum(value << (bits * i) for i, value in enumerate(values[start : start + per_word]))
            for start in range(0, len(values), per_word)
        ]
    return [word - (1 << 32) if word >> 31 else word for word in words]


def pack(grid: Grid, bits: int, dense: bool = True) -> torch.Tensor:
    return torch.tensor([pack_row(row, bits, dense) for row in grid], dtype=torch.int32)


def write(folder: Path, quantization: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True)
    config = json.loads((MODEL / "config.json").read_text())
    config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    named = {f"{LINEAR}.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(named, folder / "model.safetensors")
    return folder


def packed_config(layout: str = "pack-quantized", **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", **weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": group},
    }


@pytest.mark.parametrize("group", [-1, 32])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    ("bits", "dense"), [(2, True), (3, True), (3, False), (4, True), (8, True)]
)
def test_compressed_tensors(tmp_path, bits, dense, symmetric, group):
    groups = 1 if group == -1 else K // group
    codes, zeros = drawn(N, K, bits, 1), drawn(N, groups, bits, 2)
    scales = torch.rand(N, groups).bfloat16()
    tensors = {
        "weight_packed": pack(codes, bits, dense),
        "weight_scale": scales,
        "weight_shape": torch.tensor([N, K]),
    }
    if symmetric:
        zeros = [[1 << (bits - 1)] * groups for _ in range(N)]
    else:
        tensors["weight_zero_point"] = pack(transposed(zeros), bits, dense).t()
    checkpoint = SubstituteCheckpoint.open(write(tmp_path / "ct", packed_config(), tensors))
    weight = checkpoint.weight(LINEAR)
    assert weight.format == QuantFormat(bits, group, symmetric)
    assert weight.codes.tolist() == codes and weight.zeros.tolist() == zeros
    assert torch.equal(weight.scales, scales)
    assert torch.equal(checkpoint.weight(LINEAR + ".weight").codes, weight.codes)


@pytest.mark.parametrize("version", [None, "gptq", "gptq_v2"])
@pytest.mark.parametrize("group", [-1, 32])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq(tmp_path, bits, group, version):
    groups = 1 if group == -1 else K // group
    codes, zeros = drawn(N, K, bits, 3), drawn(N, groups, bits, 4)
    zeros[0][0], zeros[1][0] = 0, (1 << bits) - 1
    less = 0 if version == "gptq_v2" else 1
    stored = [[(zero - less) % (1 << bits) for zero in row] for row in transposed(zeros)]
    scales = torch.rand(groups, N).half()
    tensors = {
        "qweight": pack(codes, bits).t(),
        "qzeros": pack(stored, bits),
        "scales": scales,
        "g_idx": torch.arange(K, dtype=torch.int32) // (K // groups),
    }
    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False}
    if version is not None:
        config["checkpoint_format"] = version
    weight = SubstituteCheckpoint.open(write(tmp_path / "gptq", config, tensors)).weight(LINEAR)
    assert weight.format == QuantFormat(bits, group, symmetric=False)
    assert weight.codes.tolist() == codes and weight.zeros.tolist() == zeros
    assert torch.equal(weight.scales, scales.t())


def test_gptq_of_a_symmetric_model_is_symmetric(tmp_path):
    tensors = {
        "qweight": pack(drawn(N, K, 4, 3), 4).t(),
        "qzeros": pack([[7] * N], 4),
        "scales": torch.rand(1, N),
    }
    checkpoint = SubstituteCheckpoint.open(
        write(tmp_path / "gptq", {"quant_method": "gptq", "bits": 4, "sym": True}, tensors)
    )
    assert checkpoint.weight(LINEAR).format == QuantFormat(4, -1, symmetric=True)


def test_gptq_with_reordered_columns_is_refused(tmp_path):
    tensors = {
        "qweight": pack(drawn(N, K, 4, 3), 4).t(),
        "qzeros": pack(drawn(2, N, 4, 4), 4),
        "scales": torch.rand(2, N),
        "g_idx": torch.arange(K, dtype=torch.int32).flip(0) // 32,
    }
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}
    checkpoint = SubstituteCheckpoint.open(write(tmp_path / "gptq", config, tensors))
    with pytest.raises(ValueError, match=rf"{LINEAR} .* reordered by activation \(desc_act\)"):
        checkpoint.weight(LINEAR)


def test_awq(tmp_path):
    codes, zeros = drawn(N, K, 4, 5), drawn(N, 2, 4, 6)

    def pack_awq(rows: Grid) -> torch.Tensor:
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        shuffled = [
            [row[start + i] for start in range(0, len(row), 8) for i in order] for row in rows
        ]
        return pack(shuffled, 4)

    scales = torch.rand(2, N).half()
    tensors = {
        "qweight": pack_awq(transposed(codes)),
        "qzeros": pack_awq(transposed(zeros)),
        "scales": scales,
    }
    config = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
    weight = SubstituteCheckpoint.open(write(tmp_path / "awq", config, tensors)).weight(LINEAR)
    assert weight.format == QuantFormat(4, 32)
    assert weight.codes.tolist() == codes and weight.zeros.tolist() == zeros
    assert torch.equal(weight.scales, scales.t())
    other = write(tmp_path / "gemv", {**config, "version": "gemv"}, tensors)
    with pytest.raises(ValueError, match='version "gemm"'):
        SubstituteCheckpoint.open(other).weight(LINEAR)


def test_what_cannot_be_a_substitute_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not quantised"):
        SubstituteCheckpoint.open(MODEL)
    with pytest.raises(ValueError, match="cannot read config.json"):
        SubstituteCheckpoint.open(tmp_path)
    tensors = {"weight_packed": torch.zeros(N, 9, dtype=torch.int32)}
    with pytest.raises(ValueError, match='quantised by "fp8"'):
        SubstituteCheckpoint.open(write(tmp_path / "fp8", {"quant_method": "fp8"}, tensors))
    for name, config in (
        ("floats", packed_config(type="float")),
        ("layout", packed_config("float-quantized")),
    ):
        with pytest.raises(ValueError, match='must be "pack-quantized" with integer'):
            SubstituteCheckpoint.open(write(tmp_path / name, config, tensors))
    checkpoint = SubstituteCheckpoint.open(write(tmp_path / "part", packed_config(), tensors))
    with pytest.raises(ValueError, match=f"no quantised weight for {LINEAR}: weight_scale"):
        checkpoint.weight(LINEAR)
    tensors |= {"weight_scale": torch.ones(N, 1), "weight_shape": torch.tensor([N, K])}
    checkpoint = SubstituteCheckpoint.open(write(tmp_path / "width", packed_config(), tensors))
    with pytest.raises(ValueError, match="is not a 32 x 64 weight"):
        checkpoint.weight(LINEAR)


def test_decoder_linears_are_told_from_other_matrices():
    matrix = (8, 8)
    for name in (
        "model.layers.0.self_attn.q_proj.weight",
        "model.language_model.layers.11.mlp.gate_proj.weight",
        "model.layers.3.mlp.experts.7.down_proj.weight",
        "model.layers.3.block_sparse_moe.experts.7.w1.weight",
        "layers.3.self_attn.kv_a_proj_with_mqa.weight",
    ):
        assert is_decoder_linear(name, matrix)
        assert not is_decoder_linear(name, (8,))
    for name in (
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.3.mlp.gate.weight",
        "model.layers.3.mlp.shared_expert_gate.weight",
        "model.layers.3.feed_forward.router.weight",
        "visual.blocks.0.mlp.fc1.weight",
    ):
        assert not is_decoder_linear(name, matrix)


@pytest.mark.parametrize(
    "fmt",
    [
        QuantFormat(4, 64),
        QuantFormat(3, 64),
        QuantFormat(3, 64, symmetric=True),
        QuantFormat(2, 128, symmetric=True),
        QuantFormat(8, -1),
        QuantFormat(8, -1, symmetric=True),
    ],
    ids=str,
)
def test_a_real_model_survives_the_round_trip(tmp_path, fmt, monkeypatch):
    monkeypatch.setattr(save_checkpoint, "SHARD_BYTES", 1 << 20)
    out = tmp_path / "deep" / "out"
    steps: list[tuple[int, int]] = []
    quantize_checkpoint(MODEL, out, fmt, "rtn", lambda done, total: steps.append((done, total)))

    checkpoint = SubstituteCheckpoint.open(out)
    checkpoint.check_matches(json.loads((MODEL / "config.json").read_text()))
    original = load_file(MODEL / "model.safetensors")
    linears = [name for name in original if is_decoder_linear(name, tuple(original[name].shape))]
    assert len(linears) == 7 * 6
    for name in linears:
        expected = quantize(original[name], fmt, "rtn", torch.bfloat16)
        read = checkpoint.weight(name.removesuffix(".weight"))
        carried = 4 if fmt.bits == 3 else fmt.bits
        assert read.format == QuantFormat(carried, fmt.group_size, fmt.symmetric)
        assert torch.equal(read.dequantize(), expected.dequantize())
        if not (fmt.bits == 3 and fmt.symmetric):
            assert torch.equal(read.codes, expected.codes)
            assert torch.equal(read.zeros, expected.zeros)
    assert steps[-1][0] == steps[-1][1] == sum(original[name].numel() for name in linears)

    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 1
    assert {path.name for path in out.glob("*.safetensors")} == set(index.values())
    for name in original.keys() - set(linears):
        with safe_open(out / index[name], "pt") as file:
            assert torch.equal(file.get_tensor(name), original[name])
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (MODEL / name).read_bytes()
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["format"] == "pack-quantized" and "lm_head" in config["ignore"]
    assert config["config_groups"]["group_0"]["weights"]["num_bits"] != 3


def small_model(folder: Path, **changes: torch.Tensor) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text((MODEL / "config.json").read_text())
    save_file({f"{LINEAR}.weight": torch.randn(N, K), **changes}, folder / "model.safetensors")
    return folder


def test_a_copy_of_another_model_is_refused(tmp_path):
    out = tmp_path / "out"
    quantize_checkpoint(small_model(tmp_path / "in"), out, QuantFormat(4, 32), "rtn")
    checkpoint = SubstituteCheckpoint.open(out)
    config = json.loads((MODEL / "config.json").read_text())
    checkpoint.check_matches(config)
    checkpoint.check_matches({"text_config": config})
    for key, value in (
        ("hidden_size", 512),
        ("num_hidden_layers", 7),
        ("vocab_size", 5000),
        ("architectures", ["Qwen2ForCausalLM"]),
    ):
        with pytest.raises(ValueError, match=f"its {key} is .* the target's is"):
            checkpoint.check_matches({**config, key: value})


def test_bad_input_writes_nothing(tmp_path):
    model = small_model(tmp_path / "in")
    out = tmp_path / "out"
    with pytest.raises(
        ValueError, match=rf"{LINEAR}.weight .*group_size 48 does not divide the 64"
    ):
        quantize_checkpoint(model, out, QuantFormat(4, 48), "rtn")
    broken = small_model(tmp_path / "nan", **{f"{LINEAR}2.weight": torch.full((N, K), torch.nan)})
    with pytest.raises(ValueError, match=rf"{LINEAR}2.weight cannot be quantised: .*NaN"):
        quantize_checkpoint(broken, out, QuantFormat(4, 32), "rtn")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "nan"]

    quantize_checkpoint(model, out, QuantFormat(4, 32), "rtn")
    with pytest.raises(ValueError, match="already quantised"):
        quantize_checkpoint(out, tmp_path / "twice", QuantFormat(4, 32), "rtn")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        quantize_checkpoint(model, out, QuantFormat(4, 32), "rtn")
    (tmp_path / "empty").mkdir()
    quantize_checkpoint(model, tmp_path / "empty", QuantFormat(4, 32), "rtn")
    assert (tmp_path / "empty" / "config.json").is_file()


def run_command(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(arguments))


def test_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = small_model(tmp_path / "in")
    out = tmp_path / "out"
    assert run_command(str(model), str(out), "--bits", "8", "--group-size", "32") == 0
    assert SubstituteCheckpoint.open(out).weight(LINEAR).format == QuantFormat(8, 32)
    symmetric = tmp_path / "symmetric"
    options = ("--symmetric", "--quantizer", "rtn", "--group-size", "32")
    assert run_command(str(model), str(symmetric), *options) == 0
    found = SubstituteCheckpoint.open(symmetric).weight(LINEAR)
    assert found.format == QuantFormat(4, 32, symmetric=True)
    weight = load_file(model / "model.safetensors")[f"{LINEAR}.weight"]
    assert torch.equal(found.codes, quantize(weight, found.format, "rtn", weight.dtype).codes)
    capsys.readouterr()
    for arguments in (
        (str(model), str(out)),
        (str(model), str(tmp_path / "other"), "--group-size", "48"),
        (str(model), str(tmp_path / "other"), "--group-size", "0"),
        (str(tmp_path / "missing"), str(tmp_path / "other")),
    ):
        assert run_command(*arguments) == 2
        stderr = capsys.readouterr().err.strip()
        assert stderr.startswith("vllm-subspec quantize: ") and "\n" not in stderr
    assert not (tmp_path / "other").exists()
