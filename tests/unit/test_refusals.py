# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Every refusal says its sentence. Plain objects stand for vLLM's configuration, of which one value
is changed at a time: also to what no model or machine of these tests has.
"""

import importlib.metadata
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.model_executor.layers.linear import ReplicatedLinear

from vllm_subspec.config import METHODS
from vllm_subspec.engine import refusals, versions
from vllm_subspec.machine import isa
from vllm_subspec.weights.kernels import mixed_precision
from vllm_subspec.weights.streaming import StreamedLayer, StreamingOffloader

ARGS: dict[str, Any] = {
    "enable_lora": False,
    "kv_transfer_config": None,
    "async_scheduling": None,
    "cpu_offload_gb": 0,
    "offload_group_size": 0,
    "spec_tokens": None,
    "additional_config": None,
    "kv_cache_dtype": "auto",
}
MODEL: dict[str, Any] = {
    "runner_type": "generate",
    "is_multimodal_model": False,
    "is_hybrid": False,
    "is_attention_free": False,
    "is_moe": False,
    "use_mla": False,
    "rswa_window": None,
    "get_sliding_window": lambda: None,
    "quantization": None,
    "using_transformers_backend": lambda: False,
    "architecture": "LlamaForCausalLM",
    "enable_sleep_mode": False,
    "model": "some/model",
    "hf_config": SimpleNamespace(),
    "model_arch_config": SimpleNamespace(quantization_config=None),
}
PARALLEL: dict[str, Any] = {
    "worker_cls": "auto",
    "pipeline_parallel_size": 1,
    "data_parallel_size": 1,
    "decode_context_parallel_size": 1,
    "enable_expert_parallel": False,
}
HARMLESS = ARGS | MODEL | PARALLEL

REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"pipeline_parallel_size": 2},
        "needs all layers in one process, but --pipeline-parallel-size is 2: use "
        "--tensor-parallel-size instead",
    ),
    (
        {"data_parallel_size": 2},
        "cannot keep data-parallel ranks in step, but --data-parallel-size is 2: run separate "
        "servers behind a load balancer",
    ),
    (
        {"decode_context_parallel_size": 2},
        "does not support --decode-context-parallel-size above 1: remove it",
    ),
    (
        {"enable_lora": True},
        "does not support LoRA yet: remove --enable-lora, or merge the adapter into the model",
    ),
    (
        {"kv_transfer_config": object()},
        "has not been tested with KV connectors: remove --kv-transfer-config",
    ),
    (
        {"async_scheduling": True},
        "needs each token before it drafts the next: remove --async-scheduling",
    ),
    (
        {"runner_type": "pooling"},
        "generates text, but --runner is pooling: remove one of them",
    ),
    (
        {"is_multimodal_model": True},
        "serves text models only, and this model is multimodal: use a text model",
    ),
    (
        {"is_hybrid": True},
        "cannot rewind recurrent (Mamba, linear attention) state: use a model with attention only",
    ),
    (
        {"is_attention_free": True},
        "cannot rewind recurrent (Mamba, linear attention) state: use a model with attention only",
    ),
    (
        {"use_mla": True},
        "has not been tested with multi-head latent attention: use another model",
    ),
    (
        {"rswa_window": 512},
        "has not been tested with reference sliding-window attention: use another model",
    ),
    (
        {"get_sliding_window": lambda: 512},
        "has not been tested with sliding-window attention: use --disable-sliding-window or "
        "another model",
    ),
]
REFUSED_STREAMS: list[tuple[dict[str, Any], str]] = [
    (
        offload,
        "streams weights itself: remove --cpu-offload-gb and --offload-group-size and set "
        '"resident_weights_gib" instead',
    )
    for offload in ({"cpu_offload_gb": 1.5}, {"offload_group_size": 2})
] + [
    (
        {"quantization": "awq"},
        "streams unquantized weights, but the model is quantized (awq): serve the full-precision "
        "model",
    ),
    (
        {"using_transformers_backend": lambda: True},
        "streams models that vLLM implements itself, but it runs LlamaForCausalLM through "
        "Transformers: use another model, and remove --model-impl if it is given",
    ),
    (
        {"enable_sleep_mode": True},
        "loads weights ahead, which would not survive a sleep: remove --enable-sleep-mode",
    ),
    (
        {"enable_expert_parallel": True},
        "streams a share of every expert to every rank: remove --enable-expert-parallel",
    ),
]


def configured(changes: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Arguments, model and parallelism, harmless but for ``changes``."""
    assert changes.keys() <= HARMLESS.keys()

    def made(part: dict[str, Any]) -> Any:
        return SimpleNamespace(**{name: changes.get(name, value) for name, value in part.items()})

    return made(ARGS), made(MODEL), made(PARALLEL)


def check(method: str, changes: dict[str, Any]) -> None:
    refusals.check(method, *configured(changes))


@pytest.mark.parametrize(
    ("changes", "reason"),
    REFUSED + REFUSED_STREAMS,
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("method", METHODS)
def test_what_an_engine_cannot_have(method: str, changes: dict[str, Any], reason: str) -> None:
    if method == "hierspec" and (changes, reason) in REFUSED_STREAMS:
        check(method, changes)  # it streams nothing
        return
    with pytest.raises(ValueError) as refused:
        check(method, changes)
    assert str(refused.value) == f'method "{method}" {reason}'


@pytest.mark.parametrize("method", METHODS)
def test_what_an_engine_can_have(method: str) -> None:
    check(method, {})
    check(method, {"async_scheduling": False, "cpu_offload_gb": 0.0})


# The CPU's instructions

PACKED = {"weights": {"num_bits": 4, "type": "int"}, "input_activations": None}


@pytest.fixture
def without_avx512(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals, "current_platform", SimpleNamespace(is_cpu=lambda: True))
    monkeypatch.setattr(mixed_precision, "no_w4a16", lambda: "no such kernel")
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    monkeypatch.delenv(isa.VARIABLE, raising=False)


@pytest.mark.usefixtures("without_avx512")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["fp8", "fp8_e4m3", "fp8_e5m2"])
def test_fp8_kv_without_avx512_is_refused(
    method: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError) as refused:
        check(method, {"kv_cache_dtype": kind})
    assert str(refused.value) == (
        f'method "{method}" would keep K/V in {kind}, for which vLLM needs AVX-512, but '
        f"--kv-cache-dtype is {kind}: use auto, and a checkpoint that names no K/V format"
    )
    asked = {"quant_method": "modelopt", "kv_cache_quant_algo": "FP8"}
    with pytest.raises(ValueError, match="K/V in fp8.* --kv-cache-dtype is auto: use auto, and a"):
        check(method, {"hf_config": SimpleNamespace(quantization_config=asked)})
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True})
    check(method, {"kv_cache_dtype": kind})


@pytest.mark.parametrize(
    ("config", "refused"),
    [
        ({"quant_method": "gptq", "bits": 4}, True),
        ({"quant_method": "gptq", "bits": 8}, False),
        ({"quant_method": "awq", "w_bit": 4}, True),
        ({"quant_method": "bitsandbytes", "bits": 4}, False),
        ({"quant_method": "compressed-tensors", "config_groups": {"group_0": PACKED}}, True),
        (
            {"config_groups": {"group_0": PACKED | {"input_activations": {"num_bits": 8}}}},
            False,
        ),
        ({"config_groups": {"a": {"weights": {"num_bits": 8, "type": "int"}}, "b": PACKED}}, True),
        ({"config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "float"}}}}, False),
        ({"config_groups": {"group_0": {"weights": None}}}, False),
    ],
)
def test_w4a16_without_its_kernel_is_refused(
    config: dict[str, Any], refused: bool, without_avx512: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized = SimpleNamespace(quantization_config=config)
    changes = {"quantization": "some", "model_arch_config": quantized}
    if refused:
        with pytest.raises(ValueError) as caught:
            check("hierspec", changes)
        assert str(caught.value) == 'method "hierspec" cannot run some/model: no such kernel'
    else:
        check("hierspec", changes)
    monkeypatch.setattr(mixed_precision, "no_w4a16", lambda: None)
    check("hierspec", changes)


@pytest.mark.usefixtures("without_avx512")
@pytest.mark.parametrize("method", METHODS)
def test_a_bad_cap_is_refused(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(isa.VARIABLE, "nonsense")
    with pytest.raises(ValueError, match="^VLLM_SUBSPEC_MAX_CPU_ISA is 'nonsense', which is no "):
        check(method, {})
    monkeypatch.setattr(refusals, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    check(method, {"kv_cache_dtype": "fp8"})  # a GPU's affair


# vLLM's version

UNKNOWN = ["0.31.9", "0.32.0rc1", "0.33.0", "0.33.1", "1.0.0"]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes vLLM's version another."""
    monkeypatch.delenv(versions.SKIP_VERSION_CHECK, raising=False)
    real = importlib.metadata.version

    def change(version: str) -> None:
        monkeypatch.setattr(
            importlib.metadata, "version", lambda name: version if name == "vllm" else real(name)
        )

    return change


@pytest.mark.parametrize("version", UNKNOWN)
@pytest.mark.parametrize("skip", [None, "", "0", "true"])
def test_another_vllm_is_refused(
    monkeypatch: pytest.MonkeyPatch, installed: Any, version: str, skip: str | None
) -> None:
    installed(version)
    if skip is not None:
        monkeypatch.setenv("VLLM_SUBSPEC_SKIP_VERSION_CHECK", skip)
    with pytest.raises(RuntimeError) as refused:
        versions.check()
    assert str(refused.value) == (
        f"vllm-subspec supports vLLM >= 0.32.0, < 0.33, but {version} is installed: run "
        "pip install 'vllm>=0.32.0,<0.33', or set VLLM_SUBSPEC_SKIP_VERSION_CHECK=1 to try anyway"
    )


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1", "0.32.0+cpu", "0.32.7.post1"])
def test_a_vllm_of_the_range_is_not_refused(installed: Any, version: str) -> None:
    installed(version)
    versions.check()


def test_the_version_check_can_be_skipped(monkeypatch: pytest.MonkeyPatch, installed: Any) -> None:
    installed("0.33.0")
    monkeypatch.setenv("VLLM_SUBSPEC_SKIP_VERSION_CHECK", "1")
    versions.check()


# Streaming


def offloader(absorbed: list[StreamedLayer]) -> StreamingOffloader:
    """Streams the first layer."""
    return StreamingOffloader(lambda layer: [0], absorbed.append, lambda layers: False)


def linear() -> ReplicatedLinear:
    with pytest.MonkeyPatch.context() as patch, set_current_vllm_config(VllmConfig()):
        patch.setattr(parallel_state, "_TP", SimpleNamespace(rank_in_group=0, world_size=1))
        return ReplicatedLinear(64, 16, bias=False, params_dtype=torch.float32, prefix="up_proj")


def test_a_second_stack_of_layers_is_refused() -> None:
    stack = offloader([])
    stack.wrap_modules(module for module in [nn.Sequential(linear())])
    with pytest.raises(ValueError) as refused:
        stack.wrap_modules(module for module in [nn.Sequential(linear())])
    assert str(refused.value) == "subspec cannot stream a model with more than one stack of layers"


def test_layers_that_are_not_alike_are_refused() -> None:
    with pytest.raises(ValueError) as refused:
        offloader([]).wrap_modules(
            nn.Sequential(*(linear() for _ in range(count))) for count in (1, 1, 2)
        )
    assert str(refused.value) == (
        'method "subspec" streams models whose decoder layers are alike, but layer 2 has 8192 '
        "bytes of weights to stream and layer 0 4096: use another model"
    )


def test_a_layer_that_the_checkpoint_lacks_is_refused() -> None:
    absorbed: list[StreamedLayer] = []
    stack = offloader(absorbed)
    parts = [linear(), linear()]
    stack.wrap_modules(module for module in [nn.Sequential(*parts)])
    ring: Any = SimpleNamespace(slots=1)
    for part in parts:
        assert not absorbed
        with pytest.raises(RuntimeError) as refused:
            stack.attach(ring, [])
        assert str(refused.value) == (
            "decoder layer 0 was not completely loaded from the checkpoint"
        )
        part.weight.weight_loader(part.weight, torch.ones(16, 64))
    assert absorbed == stack.streamed
    (streamed,) = absorbed
    slot = torch.zeros(streamed.layout.nbytes, dtype=torch.uint8)
    stack.attach(ring, [slot])
    assert parts[0].weight.shape == (16, 64)
