# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext

from vllm_subspec import plugin
from vllm_subspec.cli import plan as plan_command
from vllm_subspec.cli.main import main
from vllm_subspec.cli.quantities import parse_bytes, parse_rate
from vllm_subspec.config import SubspecOptions
from vllm_subspec.core.plan import GATHERED, PROCESS, Budget, plan_memory
from vllm_subspec.engine import residency
from vllm_subspec.weights.model_shape import read_shape

CONFIGS = Path(__file__).parent / "configs"
SMALL = str(CONFIGS / "qwen2.5-7b")
MACHINE = [
    *("--device-memory", "8GiB", "--host-memory", "64GiB"),
    *("--link", "22.5GB/s", "--device-bandwidth", "1008GB/s", "--max-model-len", "2048"),
]


def planned(capsys: pytest.CaptureFixture[str], *arguments: str, model: str = SMALL) -> Any:
    assert main(["plan", model, *MACHINE, *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["plan", *arguments]) == 2
    told = capsys.readouterr()
    assert not told.out
    (line,) = told.err.splitlines()
    return line.removeprefix("vllm-subspec plan: ")


def test_the_published_model(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys)
    assert found["expected"]["speedup"] == pytest.approx(9.1, rel=0.2)
    assert found["draft"]["tokens"] == pytest.approx(28.35, rel=0.1)
    assert found["memory"]["total_bytes"] <= 8 << 30
    assert found["weight_source"] == "host"
    words = shlex.split(found["command"])
    assert words[:3] == ["vllm", "serve", SMALL]
    options = json.loads(words[words.index("--speculative-config") + 1])
    assert options.pop("method") == "subspec"
    parsed = SubspecOptions.parse(options)
    assert parsed.weight_source == "host"
    # The engine's own planner makes the same of these options.
    shape, _ = read_shape(SMALL)
    sizes = shape.sizes(2, 1, lambda linear: linear.size // 2, workspace=0)
    again = plan_memory(
        sizes,
        Budget(1 << 40, 2048),
        resident_weights_gib=parsed.resident_weights_gib,
        ring_layers=parsed.ring_layers,
    )
    assert list(again.resident) == found["memory"]["resident"]
    assert again.ring_layers == found["memory"]["ring_layers"]


def test_more_of_everything_is_no_slower(capsys: pytest.CaptureFixture[str]) -> None:
    base = planned(capsys)["expected"]["serial"]
    assert planned(capsys, "--link", "50GB/s")["expected"]["serial"] > base
    assert planned(capsys, "--device-memory", "12GiB")["expected"]["serial"] > base
    assert planned(capsys, "--acceptance", "0.99")["expected"]["serial"] > base
    assert planned(capsys, "--tensor-parallel-size", "2")["expected"]["serial"] > base
    assert planned(capsys, "--host-memory", "8GiB")["weight_source"] == "disk"


def test_experts(capsys: pytest.CaptureFixture[str]) -> None:
    """All of them are streamed, a few of them drafted with."""
    shape, _ = read_shape(str(CONFIGS / "qwen3-30b-a3b"))
    elements = sum(part.size for layer in shape.layers for part in layer)
    assert elements + shape.other == pytest.approx(30.5e9, rel=0.01)
    assert elements * shape.active_share + shape.other == pytest.approx(3.3e9, rel=0.03)
    found = planned(capsys, "--device-memory", "24GiB", model=str(CONFIGS / "qwen3-30b-a3b"))
    assert found["expected"]["step_seconds"] < 0.02
    assert found["expected"]["stream_seconds"] > 2
    assert not found["notes"]


def test_layers_of_several_sizes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = json.loads((CONFIGS / "qwen3-30b-a3b" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "mlp_only_layers": [0]}))
    found = planned(capsys, "--device-memory", "24GiB", model=str(tmp_path))
    assert "several sizes" in found["notes"][0]


def test_models_that_are_not_planned(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def told(config: dict[str, Any]) -> str:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return refused(capsys, str(tmp_path), *MACHINE, "--max-model-len", "1024")

    other = {"model_type": "gpt2", "n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 100}
    assert "no weights named layers" in told(other)
    quantized = json.loads((CONFIGS / "qwen2.5-7b" / "config.json").read_text())
    quantized["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    assert "already quantized" in told(quantized)


def test_a_model_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, "--device-memory", "80GiB")
    assert "nothing has to be streamed" in found["notes"][0]
    expected = found["expected"]
    assert expected["stream_seconds"] == 0
    assert expected["plain"] == pytest.approx(1008e9 / 14.1e9, rel=0.05)  # all weights, once each
    assert "ring_layers" not in found["command"]


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", SMALL, *MACHINE]) == 0
    told = capsys.readouterr().out
    for words in (
        "resident layers",
        "KV cache",
        "without speculation",
        "vllm serve",
        "of 8.00 GiB",
    ):
        assert words in told


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([str(CONFIGS)], "no configuration of a language model"),
        (["./no/such/model"], "no configuration of a language model"),
        ([SMALL, "--device-memory", "much"], "'much' is not a size above 0 such as 24GiB"),
        ([SMALL, "--device-memory", "0"], "not a size"),
        ([SMALL, "--host-memory", "25GB/s"], "not a size"),
        ([SMALL, "--link", "fast"], "not a rate"),
        ([SMALL, "--batch", "0"], "--batch is 0; allowed: 1 or more"),
        ([SMALL, "--acceptance", "1"], "between 0 and 1"),
        ([SMALL, *MACHINE, "--max-model-len", "99999"], "the model reads 32768 tokens"),
        ([SMALL, "--device-memory", "8GiB", "--host-memory", "64GiB"], "give it"),
        ([SMALL, *MACHINE, "--bits", "8"], " GiB; give it more memory, "),
        ([SMALL, *MACHINE, "--device-memory", "1GiB"], "no setting of"),
    ],
)
def test_refusals(capsys: pytest.CaptureFixture[str], arguments: list[str], says: str) -> None:
    assert says in refused(capsys, *arguments)


def test_the_nearest_setting_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, SMALL, *MACHINE, "--bits", "8").endswith("--bits 4 fits")
    long = ["--max-model-len", "32768", "--batch", "8", "--bits", "2"]
    assert refused(capsys, SMALL, *MACHINE, *long).endswith("--max-model-len 1024 fits")


def test_quantities() -> None:
    assert parse_bytes("24GiB") == 24 << 30
    assert parse_bytes("1.5 gb") == 1_500_000_000
    assert parse_bytes("4096") == 4096
    assert parse_rate("25GB/s") == parse_rate("25GB") == 25e9


@pytest.mark.skipif(not current_platform.is_cpu(), reason="is of vLLM's CPU backend")
def test_a_cpu_s_workspace_is_what_the_engine_counts() -> None:
    """With the passes of `vllm serve`, whose defaults the command cannot ask for."""
    plugin.register()
    model = str(CONFIGS.parents[2] / "models" / "pystd-6m")
    asked = EngineArgs(model=model, max_num_seqs=8, speculative_config={"method": "subspec"})
    config = asked.create_engine_config(UsageContext.OPENAI_API_SERVER)
    counted = plan_command._cpu_workspace(config.model_config.hf_text_config, 1, 8)
    assert counted == PROCESS + GATHERED + residency._activations(config)
