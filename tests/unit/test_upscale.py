# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""The upscaler keeps the function, reaches the size, and leaves no half-written checkpoint."""

from __future__ import annotations

import json
import shutil
import tokenize
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks.upscale import Recipe, load_config, pick_shape, upscale
from benchmarks.upscale.__main__ import main
from benchmarks.upscale.check import best_tokens, compare, text_windows
from benchmarks.upscale.checkpoint import RECIPE_FILE, require_space
from benchmarks.upscale.families import parameter_count, tensor_shapes
from benchmarks.upscale.shape import (
    GIB,
    converted_config,
    shaped_like,
    size_in_bytes,
    upscaled_config,
)
from benchmarks.upscale.tiling import layer_plan, widen

MODELS = Path(__file__).resolve().parents[2] / "models"
SOURCE = MODELS / "pystd-6m"
CONFIGS = Path(__file__).parent / "configs"
WINDOWS, WINDOW = 4, 256  # 1,024 positions; the model was trained on windows of 256.
RECIPE = Recipe("pystd-6m", width=2, layers=9, noise=2.5, seed=0, dtype="bfloat16")

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 61,
    "max_position_embeddings": 64,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": True},
    "llama with biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "qwen3 with biases": {"model_type": "qwen3", "head_dim": 16, "attention_bias": True},
}


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("upscaled") / "model"
    upscale(SOURCE, out, RECIPE)
    return out


@torch.inference_mode()
def logits(checkpoint: Path, tokens: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """float32 [tokens, vocabulary]: teacher-forced, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    return model(tokens).logits.float().flatten(0, 1)


@pytest.fixture(scope="module")
def text() -> Tensor:
    """int64 [WINDOWS, WINDOW]: Python source."""
    source = Path(tokenize.__file__).read_text()
    ids = AutoTokenizer.from_pretrained(SOURCE)(source)["input_ids"][: WINDOWS * WINDOW]
    return torch.tensor(ids).view(WINDOWS, WINDOW)


@pytest.fixture(scope="module")
def small(text: Tensor) -> Tensor:
    return logits(SOURCE, text)


def tiny(folder: Path, family: str) -> Path:
    """A random float32 model; norms and biases too, which transformers starts at 1 and 0."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY, **FAMILIES[family]))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.3)
    # Several files, as large models come.
    model.save_pretrained(folder, max_shard_size="20KB")
    return folder


def same_logits(one: Path, other: Path) -> None:
    tokens = torch.randint(TINY["vocab_size"], (3, 20))
    ours, theirs = logits(one, tokens), logits(other, tokens)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4 * float(ours.std()))


def test_same_function_in_float32(grown: Path, text: Tensor, small: Tensor) -> None:
    large = logits(grown, text)
    assert (small.argmax(-1) == large.argmax(-1)).float().mean() >= 0.995
    # bf16 weights: each linear's tiled copies are off by one rounding of W / width.
    assert (small - large).abs().mean() < 0.01 * small.std()


def test_bfloat16_differs_at_near_ties_only(grown: Path, text: Tensor, small: Tensor) -> None:
    """In bf16 arithmetic the source itself keeps 98.7% of its float32 tokens on this text, so a
    share alone cannot tell rounding from a wrong function; the size of the gaps can."""
    one, other = (logits(path, text, torch.bfloat16).argmax(-1) for path in (SOURCE, grown))
    differs = one != other
    best = small.topk(2).values
    gaps = best[:, 0] - best[:, 1]
    assert differs.float().mean() < 0.02
    assert gaps.median() > 0.5
    assert (gaps[differs] < 0.125).all()  # Two steps of bf16 at logits of 8 to 16.


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_keeps_its_function(tmp_path: Path, family: str) -> None:
    source, out = tiny(tmp_path / "source", family), tmp_path / "out"
    assert len(list(source.glob("*.safetensors"))) > 1
    upscale(source, out, Recipe("tiny", 2, 5, 1.0, 0, "float32"))
    same_logits(source, out)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_parts_grow_by_numbers_of_their_own(tmp_path: Path, family: str) -> None:
    source, out = tiny(tmp_path / "source", family), tmp_path / "out"
    upscale(source, out, Recipe("tiny", 3, 2, 1.0, 0, "float32", heads=2, mlp=5))
    config = json.loads((out / "config.json").read_text())
    found = [config[f"{key}_size"] for key in ("hidden", "intermediate")]
    assert [*found, config["num_attention_heads"]] == [96, 240, 8]
    same_logits(source, out)


@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "qwen2"), ("qwen2", "llama"), ("llama with biases", "llama")]
)
def test_a_family_becomes_another(tmp_path: Path, family: str, kind: str) -> None:
    source, out = tiny(tmp_path / "source", family), tmp_path / "out"
    upscale(source, out, Recipe("tiny", 2, 3, 1.0, 0, "float32", family=kind))
    assert AutoConfig.from_pretrained(out).model_type == kind
    same_logits(source, out)


def test_another_family_cuts_text_as_the_source_does(tmp_path: Path) -> None:
    """transformers has a tokenizer of its own for Qwen2, which splits before indentation."""
    out = tmp_path / "out"
    upscale(SOURCE, out, Recipe("pystd-6m", 1, 6, 0.0, 0, "bfloat16", family="qwen2"))
    assert torch.equal(text_windows(out, 1000), text_windows(SOURCE, 1000))


@pytest.mark.parametrize(
    ("family", "kind", "told"),
    [
        ("llama", "qwen3", "cannot become qwen3: qwen3 divides every query"),
        ("qwen3", "llama", "cannot become llama: qwen3 divides every query"),
        ("llama with biases", "qwen2", "has no biases in mlp.down_proj, mlp.gate_proj"),
    ],
)
def test_a_family_that_cannot_become_another(family: str, kind: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        converted_config(TINY | FAMILIES[family], kind)


def test_shape_on_disk_is_the_predicted_one(grown: Path) -> None:
    config = json.loads((grown / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"]) == (512, 9)
    index = json.loads((grown / "model.safetensors.index.json").read_text())
    held = sum(
        tensor.nbytes for file in grown.glob("*.safetensors") for tensor in load_file(file).values()
    )
    assert held == index["metadata"]["total_size"] == 2 * parameter_count(config)
    assert set(index["weight_map"].values()) == {file.name for file in grown.glob("*.safetensors")}
    assert json.loads((grown / RECIPE_FILE).read_text())["noise"] == 2.5


def test_every_linear_carries_noise(grown: Path) -> None:
    """No linear is constant or repeated: 4-bit codes of each are as varied as a real model's."""
    for file in grown.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            if "proj" in name:
                halves = tensor.float().chunk(2)
                assert not torch.equal(*halves), name
                assert tensor.float().std() > 0, name


@pytest.mark.parametrize("copies", [(2, 2), (8, 8), (1, 3), (5, 3)])
@pytest.mark.parametrize("keep", [True, False])
def test_noise_cancels_on_tiled_inputs(copies: tuple[int, int], keep: bool) -> None:
    torch.manual_seed(1)
    outputs, inputs = copies
    weight, x = torch.randn(24, 64), torch.randn(5, 64, dtype=torch.float64)
    wide = torch.cat(list(widen(weight, copies, 2.5, torch.float32, seed=3, keep=keep))).double()
    got = x.repeat(1, inputs) @ wide.T
    wanted = (x @ weight.double().T).repeat(1, outputs) * keep
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    noise = wide - (weight.double() / inputs).repeat(outputs, inputs) * keep
    assert noise.std() == pytest.approx(2.5 * weight.std().item() / inputs, rel=0.05)


def test_noise_depends_on_the_seed_only() -> None:
    weight = torch.randn(8, 16)
    first, again, other = (next(widen(weight, (1, 2), 1.0, torch.bfloat16, s)) for s in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("gib", [0.001, 0.1, 0.5, 1.0, 1.5, 7.0, 60.0])
def test_picked_shape_reaches_the_size(gib: float) -> None:
    config = load_config(SOURCE)
    width, layers = pick_shape(config, gib, "bfloat16")
    size = size_in_bytes(upscaled_config(config, Recipe("", width, layers, 0.0, 0, "bfloat16")))
    assert size >= gib * GIB
    assert 6 <= layers <= 18
    if gib >= 0.1:
        assert size <= 1.5 * gib * GIB


@pytest.mark.parametrize("name", ["qwen2.5-7b", "qwen2.5-32b"])
def test_shape_of_a_published_model(name: str) -> None:
    config, like = load_config(SOURCE), load_config(CONFIGS / name)
    wide = upscaled_config(config, shaped_like(RECIPE, config, like))
    assert wide["model_type"] == "qwen2"
    for key in ("hidden_size", "num_hidden_layers"):
        assert wide[key] == like[key]
    ours, theirs = (
        sum(
            tensor[0] * tensor[-1]
            for key, tensor in tensor_shapes(c).items()
            if ".layers.0." in key
        )
        for c in (wide, like)
    )
    assert ours == pytest.approx(theirs, rel=0.07)


def test_layer_plan_uses_each_source_layer_once() -> None:
    plan = layer_plan(6, 16)
    assert [origin for origin, keeps in plan if keeps] == list(range(6))
    assert len(plan) == 16
    assert layer_plan(6, 6) == [(origin, True) for origin in range(6)]


def test_the_check_computes_what_transformers_computes(text: Tensor, small: Tensor) -> None:
    assert torch.equal(best_tokens(SOURCE, text).flatten(), small.argmax(-1))


def test_the_check_s_text_is_python() -> None:
    windows = text_windows(SOURCE, 1000)
    assert windows.shape == (4, 256)
    assert "import" in AutoTokenizer.from_pretrained(SOURCE).decode(windows.flatten())


def test_the_check_tells_models_apart(grown: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(SOURCE), str(grown), "--check", "--function-only"]) == 0
    assert f"{grown} agrees with {SOURCE}" in capsys.readouterr().out
    another = MODELS / "pystd-1m"  # The same tokenizer, another function.
    assert main([str(SOURCE), str(another), "--check", "--function-only"]) == 1
    assert "less than 99.5%" in capsys.readouterr().out


def test_the_check_of_4_bit_copies() -> None:
    small = MODELS / "pystd-1m"
    found = compare(small, small)
    assert found.function == 1 and found.source_4bit == found.upscaled_4bit
    assert 0.8 < (found.source_4bit or 0) < 1


def configured(folder: Path, **changes: Any) -> Path:
    """A copy of the bundled model with other settings."""
    shutil.copytree(SOURCE, folder)
    config = json.loads((SOURCE / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model_type": "mamba"}, "model_type is 'mamba'; handled are llama, qwen2, qwen3"),
        ({"use_sliding_window": True}, "use_sliding_window is true"),
        ({"layer_types": ["sliding_attention"] * 6}, "others than full_attention"),
        ({"quantization_config": {}}, "the checkpoint is quantised"),
        ({"attention_bias": True}, "holds no model.layers.0.self_attn.q_proj.bias"),
        ({"num_hidden_layers": 5}, "holds model.layers.5.input_layernorm.weight, which"),
        ({"intermediate_size": 760}, r"has shape \(768, 256\), not \(760, 256\)"),
    ],
)
def test_sources_that_are_refused(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    source = configured(tmp_path / "source", **changes)
    with pytest.raises(ValueError, match=told):
        upscale(source, tmp_path / "out", RECIPE)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--gib", "0"], "--gib is 0.0: give a size above 0"),
        (["--gib", "inf"], "--gib is inf: give a size above 0"),
        (["--width", "0"], "width 0 and 6 layers: a checkpoint can only grow"),
        (["--width", "2", "--noise", "nan"], "--noise is nan: give a number of 0 or more"),
        (["--width", "2", "--seed", "-1"], "--seed is -1: give a number from 0"),
        (["--gib", "1e6"], "GiB are missing"),
        (["--like", "nowhere"], "nowhere/config.json does not exist"),
        (["--like", str(CONFIGS / "qwen3-30b-a3b")], "model_type is 'qwen3_moe'"),
        (["--width", "2", "--layers", "3"], "can only grow from width 1 and 6 layers"),
        (["--width", "2", "--family", "qwen3"], "cannot become qwen3"),
        (["--check"], "config.json does not exist"),
    ],
)
def test_bad_input_is_told_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], told: str
) -> None:
    assert main([str(SOURCE), str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("upscale: ") and told in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exists: remove it"):
        upscale(SOURCE, tmp_path, RECIPE)
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(ValueError, match="1024.0 GiB are missing"):
        require_space(tmp_path, free + (1 << 40))


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    """A file that ends early is found out before anything is written, one that breaks later not."""
    broken = configured(tmp_path / "broken")
    cut = (SOURCE / "model.safetensors").read_bytes()[:4096]
    (broken / "model.safetensors").unlink()
    (broken / "model.safetensors").write_bytes(cut)
    with pytest.raises(ValueError, match="not safetensors"):
        upscale(broken, tmp_path / "made" / "out", RECIPE)
    assert not (tmp_path / "made").exists()
    nowhere = configured(tmp_path / "whole")
    (nowhere / "tokenizer.json").unlink()
    (nowhere / "tokenizer.json").mkdir()  # Cannot be copied, which is tried last.
    with pytest.raises(OSError):
        upscale(nowhere, tmp_path / "made" / "out", RECIPE)
    assert list((tmp_path / "made").iterdir()) == []
