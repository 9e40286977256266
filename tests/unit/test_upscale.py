# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""The upscaler keeps the function, reaches the size, and leaves no half-written checkpoint."""

from __future__ import annotations

import json
import tokenize
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

from benchmarks import upscale
from benchmarks.upscale import Recipe

SOURCE = Path(__file__).resolve().parents[2] / "models" / "pystd-6m"
WINDOWS, WINDOW = 4, 256  # 1,024 positions; the model was trained on windows of 256.
RECIPE = Recipe("pystd-6m", width=2, layers=9, noise=2.5, seed=0, dtype="bfloat16")


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("upscaled") / "model"
    upscale.upscale(SOURCE, out, RECIPE)
    return out


@torch.inference_mode()
def logits(checkpoint: Path, dtype: torch.dtype) -> Tensor:
    """float32 [WINDOWS * WINDOW, vocabulary]: logits of Python source, teacher-forced."""
    text = Path(tokenize.__file__).read_text()
    ids = AutoTokenizer.from_pretrained(SOURCE)(text)["input_ids"][: WINDOWS * WINDOW]
    model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    return model(torch.tensor(ids).view(WINDOWS, WINDOW)).logits.float().flatten(0, 1)


@pytest.fixture(scope="module")
def small() -> Tensor:
    return logits(SOURCE, torch.float32)


def test_same_function_in_float32(grown: Path, small: Tensor) -> None:
    large = logits(grown, torch.float32)
    assert (small.argmax(-1) == large.argmax(-1)).float().mean() >= 0.995
    # bf16 weights: each linear's tiled copies are off by one rounding of W / width.
    assert (small - large).abs().mean() < 0.01 * small.std()


def test_bfloat16_differs_at_near_ties_only(grown: Path, small: Tensor) -> None:
    """In bf16 arithmetic the source itself keeps 98.7% of its float32 tokens on this text, so a
    share alone cannot tell rounding from a wrong function; the size of the gaps can."""
    differs = logits(SOURCE, torch.bfloat16).argmax(-1) != logits(grown, torch.bfloat16).argmax(-1)
    best = small.topk(2).values
    gaps = best[:, 0] - best[:, 1]
    assert differs.float().mean() < 0.02
    assert gaps.median() > 0.5
    assert (gaps[differs] < 0.125).all()  # Two steps of bf16 at logits of 8 to 16.


def test_shape_on_disk_is_the_predicted_one(grown: Path) -> None:
    config = json.loads((grown / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"]) == (512, 9)
    index = json.loads((grown / "model.safetensors.index.json").read_text())
    held = sum(
        tensor.nbytes for file in grown.glob("*.safetensors") for tensor in load_file(file).values()
    )
    assert held == index["metadata"]["total_size"] == 2 * upscale.parameter_count(config)
    assert set(index["weight_map"].values()) == {file.name for file in grown.glob("*.safetensors")}
    assert json.loads((grown / upscale.RECIPE_FILE).read_text())["noise"] == 2.5


def test_every_linear_carries_noise(grown: Path) -> None:
    """No linear is constant or repeated: 4-bit codes of each are as varied as a real model's."""
    for file in grown.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            if "proj" in name:
                halves = tensor.float().chunk(2)
                assert not torch.equal(*halves), name
                assert tensor.float().std() > 0, name


@pytest.mark.parametrize("width", [2, 4, 8])
@pytest.mark.parametrize("keep", [True, False])
def test_noise_cancels_on_tiled_inputs(width: int, keep: bool) -> None:
    torch.manual_seed(1)
    weight, x = torch.randn(24, 64), torch.randn(5, 64, dtype=torch.float64)
    wide = upscale.widen(weight, width, 2.5, torch.float32, seed=3, keep=keep).double()
    got = x.repeat(1, width) @ wide.T
    wanted = (x @ weight.double().T).repeat(1, width) * keep
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    noise = wide - (weight.double() / width).repeat(width, width) * keep
    assert noise.std() == pytest.approx(2.5 * weight.std().item() / width, rel=0.05)


def test_noise_depends_on_the_seed_only() -> None:
    weight = torch.randn(8, 16)
    first, again, other = (upscale.widen(weight, 2, 1.0, torch.bfloat16, s) for s in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("gib", [0.001, 0.1, 0.5, 1.0, 1.5, 7.0, 60.0])
def test_picked_shape_reaches_the_size(gib: float) -> None:
    config = upscale.load_config(SOURCE)
    width, layers = upscale.pick_shape(config, gib, "bfloat16")
    size = 2 * upscale.parameter_count(upscale.upscaled_config(config, width, layers, "bfloat16"))
    assert size >= gib * upscale.GIB
    assert 6 <= layers <= 18
    if gib >= 0.1:
        assert size <= 1.5 * gib * upscale.GIB


def test_layer_plan_uses_each_source_layer_once() -> None:
    plan = upscale.layer_plan(6, 16)
    assert [origin for origin, keeps in plan if keeps] == list(range(6))
    assert len(plan) == 16
    assert upscale.layer_plan(6, 6) == [(origin, True) for origin in range(6)]


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--gib is 0"):
        upscale.pick_shape(upscale.load_config(SOURCE), 0, "bfloat16")
    with pytest.raises(ValueError, match="exists: remove it"):
        upscale.upscale(SOURCE, tmp_path, RECIPE)
    with pytest.raises(ValueError, match="config.json does not exist"):
        upscale.load_config(tmp_path)
    config = json.loads((SOURCE / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"attention_bias": True}))
    with pytest.raises(ValueError, match="attention_bias is true"):
        upscale.load_config(tmp_path)


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((SOURCE / "config.json").read_text())
    (broken / "model.safetensors").write_bytes((SOURCE / "model.safetensors").read_bytes()[:4096])
    with pytest.raises(Exception, match="(?i)header|incomplete"):
        upscale.upscale(broken, tmp_path / "made" / "out", RECIPE)
    assert list((tmp_path / "made").iterdir()) == []
