# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Invariant 5: what cannot be served is refused when the configuration is built, in one sentence
that names the option and what to do. No weight is read, as far as that can be known before.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import EngineArgs
from vllm.config import KVTransferConfig
from vllm.platforms import current_platform

from tests.engine.helpers import (
    CHAIN,
    MODEL,
    ROUGH,
    Engines,
    encode,
    generate,
    greedy,
    import_model_class,
)
from tests.engine.hierarchies import SMALL
from vllm_subspec.engine import attention
from vllm_subspec.weights.kernels import mixed_precision


@pytest.fixture
def shape(tmp_path: Path) -> Any:
    """Makes a folder that has a model's configuration and tokenizer, but no weights."""

    def make(**config: Any) -> Path:
        given = json.loads((MODEL / "config.json").read_text())
        given |= config
        for architecture in given["architectures"]:
            import_model_class(architecture)
        (tmp_path / "config.json").write_text(json.dumps(given))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / name).write_text((MODEL / name).read_text())
        return tmp_path

    return make


def configure(model: Path, speculative: dict[str, Any], **arguments: Any) -> Any:
    speculative = {"method": "subspec", **speculative}
    args = EngineArgs(str(model), max_model_len=128, speculative_config=speculative, **arguments)
    return args.create_engine_config()


def refusal(model: Path, speculative: dict[str, Any], **arguments: Any) -> str:
    with pytest.raises(ValueError) as caught:
        configure(model, speculative, **arguments)
    (message,) = caught.value.args
    assert "\n" not in message
    assert not message.endswith(".")
    return message


def test_what_is_served_is_not_refused(shape: Any) -> None:
    config = configure(shape(), {"bits": 2})
    assert config.additional_config["subspec"]["bits"] == 2
    assert config.num_speculative_tokens == 128
    assert (
        config.num_lookahead_tokens == 128 + config.additional_config["subspec"]["drafter"]["nodes"]
    )


def test_arguments_may_be_used_again(shape: Any) -> None:
    """As Ray does, which looks at a configuration before it starts an engine."""
    args = EngineArgs(model=str(shape()), speculative_config={"method": "subspec"})
    first, second = args.create_engine_config(), args.create_engine_config()
    assert second.parallel_config.worker_cls == first.parallel_config.worker_cls
    assert "subspec" in second.parallel_config.worker_cls
    assert second.additional_config == first.additional_config


@pytest.mark.parametrize(
    ("arguments", "names", "remedy"),
    [
        (
            {"worker_cls": "vllm.config.VllmConfig"},
            "--worker-cls or another plugin brings vllm.config.VllmConfig",
            "remove one of them",
        ),
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size is 2", "--tensor-parallel-size"),
        ({"data_parallel_size": 2}, "--data-parallel-size is 2", "separate servers"),
        (
            {"tensor_parallel_size": 2, "decode_context_parallel_size": 2},
            "--decode-context-parallel-size",
            "remove it",
        ),
        ({"enable_lora": True}, "LoRA", "remove --enable-lora"),
        (
            {
                "kv_transfer_config": KVTransferConfig(
                    kv_connector="ExampleConnector", kv_role="kv_both"
                )
            },
            "KV connectors",
            "remove --kv-transfer-config",
        ),
        ({"cpu_offload_gb": 1}, "--cpu-offload-gb", "resident_weights_gib"),
        (
            {"offload_backend": "prefetch", "offload_group_size": 2},
            "--offload-group-size",
            "resident_weights_gib",
        ),
        ({"async_scheduling": True}, "remove --async-scheduling", "remove --async-scheduling"),
        ({"runner": "pooling", "convert": "embed"}, "--runner is pooling", "remove one of them"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_engine_options(shape: Any, arguments: dict[str, Any], names: str, remedy: str) -> None:
    message = refusal(shape(), {}, **arguments)
    assert message.startswith('method "subspec" ')
    assert names in message
    assert remedy in message


MOE = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
GEMMA2 = {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"}
GEMMA3 = {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}
# vLLM has no class of its own for it.
PHI = {"architectures": ["PhiForCausalLM"], "model_type": "phi"}
MLA = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "kv_lora_rank": 64,
    "q_lora_rank": None,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
}
SLIDING = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "sliding_window": 32,
}
HYBRID = {
    "architectures": ["JambaForCausalLM"],
    "model_type": "jamba",
    "num_experts": 1,
    "num_experts_per_tok": 1,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
}
RECURRENT = {
    "architectures": ["MambaForCausalLM"],
    "model_type": "mamba",
    "state_size": 16,
    "conv_kernel": 4,
}
GPTQ = {
    "quantization_config": {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 64,
        "desc_act": False,
        "sym": True,
    }
}
# An audio model: vLLM's image models cannot be looked into without torchvision.
MULTIMODAL = {
    "architectures": ["WhisperForConditionalGeneration"],
    "model_type": "whisper",
    "d_model": 256,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "max_source_positions": 100,
    "max_target_positions": 128,
}


@pytest.mark.parametrize(
    ("config", "names"),
    [
        pytest.param(MLA, "multi-head latent attention", id="mla"),
        pytest.param(SLIDING, "--disable-sliding-window", id="sliding"),
        pytest.param(GEMMA2, "sliding-window", id="gemma2"),
        pytest.param(GEMMA3, "sliding-window", id="gemma3"),
        pytest.param(PHI, "runs PhiForCausalLM through Transformers", id="phi"),
        pytest.param(HYBRID, "recurrent", id="hybrid"),
        pytest.param(RECURRENT, "recurrent", id="recurrent"),
        pytest.param(GPTQ, "gptq)", id="quantized"),
        pytest.param(MULTIMODAL, "multimodal", id="multimodal"),
    ],
)
def test_model_families(shape: Any, config: dict[str, Any], names: str) -> None:
    message = refusal(shape(**config), {}, dtype="bfloat16")
    assert message.startswith('method "subspec" ')
    assert names in message
    assert "use " in message or "serve " in message


@pytest.mark.skipif(not current_platform.is_cpu(), reason="vLLM's CPU build")
def test_a_w4a16_checkpoint_without_its_kernel(shape: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = mixed_precision.no_w4a16() or "no kernel"  # what a CPU without AVX-512 says
    monkeypatch.setattr(mixed_precision, "no_w4a16", lambda: reason)
    model = shape(**GPTQ)
    options = {"method": "hierspec", "drafter": {"method": "ngram"}}
    message = refusal(model, options, dtype="bfloat16")
    assert message == f'method "hierspec" cannot run {model}: {reason}'
    message = refusal(MODEL, {**options, "intermediate": str(model)}, dtype="bfloat16")
    assert message == (
        f'speculative_config key "intermediate" is {str(model)!r}, which cannot run: {reason}'
    )


def test_expert_parallelism(shape: Any) -> None:
    message = refusal(shape(**MOE), {}, tensor_parallel_size=2, enable_expert_parallel=True)
    assert "remove --enable-expert-parallel" in message


def test_a_checkpoint_of_substitute_experts(shape: Any) -> None:
    assert '"substitute" is not read' in refusal(shape(**MOE), {"substitute": str(MODEL)})


@pytest.mark.parametrize(
    ("options", "key", "says"),
    [
        ({"bit": 4}, "bit", 'did you mean "bits"?'),
        ({"num_spec_tokens": 4}, "num_spec_tokens", "num_speculative_tokens"),
        ({"prompt_lookup_max": 4}, "prompt_lookup_max", "known: "),
        ({"bits": 5}, "bits", "2, 3, 4 or 8"),
        ({"bits": "4"}, "bits", "2, 3, 4 or 8"),
        ({"num_speculative_tokens": 0}, "num_speculative_tokens", "1 to 512"),
        ({"num_speculative_tokens": 513}, "num_speculative_tokens", "1 to 512"),
        ({"branching": 0}, "branching", "1 (draft chains instead of trees) to 64"),
        ({"branching": 65}, "branching", "to 64"),
        ({"depth": 0}, "depth", "1 to 512"),
        ({"depth": 513}, "depth", "1 to 512"),
        ({"pruning": "x"}, "pruning", '"dynamic" (drop'),
        ({"draft_depth": 8}, "draft_depth", "did you mean"),
        ({"group_size": 16}, "group_size", "32, 64, 128"),
        ({"quantizer": "gptq"}, "quantizer", '"hqq", "rtn"'),
        ({"resident_weights_gib": -1}, "resident_weights_gib", "GiB"),
        ({"resident_weights_gib": "all"}, "resident_weights_gib", "GiB"),
        ({"weight_source": "nfs"}, "weight_source", '"host" or "disk"'),
        ({"store_dir": str(MODEL / "config.json")}, "store_dir", "directory"),
        ({"ring_layers": 1}, "ring_layers", "from 2"),
        ({"draft_temperature": 0}, "draft_temperature", "above 0"),
        ({"substitute": "./no/such/place"}, "substitute", "directory"),
        ({"substitute": str(MODEL), "bits": 3}, "bits", "already quantised"),
        ({"substitute_layers": []}, "substitute_layers", "non-empty"),
        ({"substitute_layers": [1, 1]}, "substitute_layers", "distinct"),
    ],
)
def test_options_of_the_method(options: dict[str, Any], key: str, says: str) -> None:
    message = refusal(MODEL, options)
    assert f'"{key}"' in message
    assert says in message


@pytest.mark.skipif(not current_platform.is_cpu(), reason="vLLM's CPU attention")
@pytest.mark.parametrize(
    ("changed", "names"),
    [
        ({"sliding_window": 127}, "sliding-window attention"),
        ({"alibi_slopes": [0.5]}, "ALiBi"),
        ({"logits_soft_cap": 30.0}, "a soft cap on attention logits"),
        ({"sinks": [0.0]}, "attention sinks"),
        ({"is_fp8_kv_cache": True}, "an FP8 KV cache"),
    ],
)
def test_attention_that_trees_cannot_do(changed: dict[str, Any], names: str) -> None:
    impl: dict[str, Any] = {
        "sliding_window": -1,
        "alibi_slopes": None,
        "logits_soft_cap": 0,
        "sinks": None,
        "is_fp8_kv_cache": False,
    }
    sound = SimpleNamespace(impl=SimpleNamespace(**impl))
    attention.check(torch.device("cpu"), {"layers.0.attn": sound}, "subspec", ["branching"])
    other = SimpleNamespace(impl=SimpleNamespace(**{**impl, **changed}))
    with pytest.raises(ValueError) as caught:
        layers = {"layers.0.attn": sound, "layers.1.attn": other}
        attention.check(torch.device("cpu"), layers, "subspec", ["branching", "drafter.branching"])
    (message,) = caught.value.args
    assert message == (
        f'method "subspec" drafts token trees, but layers.1.attn has {names}, which tree attention '
        'cannot do: set "branching" and "drafter.branching" to 1'
    )


@pytest.mark.skipif(not current_platform.is_cpu(), reason="vLLM's CPU attention")
def test_an_fp8_cache_is_refused_for_trees_only(engines: Engines) -> None:
    small: dict[str, Any] = {"kv_cache_dtype": "fp8", "dtype": "bfloat16"}
    if not torch.cpu._is_avx512_supported():
        said = "would keep K/V in fp8, for which vLLM needs AVX-512, but --kv-cache-dtype is fp8"
        assert said in refusal(MODEL, CHAIN, **small)
        return
    with pytest.raises(ValueError, match='has an FP8 KV cache, .*: set "branching" to 1$'):
        engines.get(ROUGH, **small)
    llm = engines.get(CHAIN, **small)
    assert len(generate(llm, [encode("def ")], [greedy(8)])[0].tokens) == 8


def hierarchy(drafter: dict[str, Any], **options: Any) -> dict[str, Any]:
    return {"method": "hierspec", "drafter": drafter, **options}


NGRAM = {"method": "ngram"}
HEAD_OF_SMALL = {"method": "eagle", "model": SMALL + "-eagle"}


@pytest.mark.parametrize(
    ("options", "key", "says"),
    [
        ({"method": "hierspec"}, "drafter", "is missing"),
        (hierarchy({}), "drafter.method", "is missing"),
        (hierarchy({"method": "medusa"}), "drafter.method", '"eagle" or "eagle3"'),
        (hierarchy({"method": "eagle"}), "drafter.model", '"eagle" needs a model'),
        (hierarchy({"method": "ngram", "model": SMALL}), "drafter.model", "needs no model"),
        (hierarchy({**HEAD_OF_SMALL, "model": "./no/head"}), "drafter.model", "an existing"),
        (hierarchy({**NGRAM, "dept": 3}), "drafter.dept", 'did you mean "drafter.depth"?'),
        (hierarchy({**NGRAM, "nodes": 0}), "drafter.nodes", "1 to 256"),
        (hierarchy(NGRAM, intermediate="../nowhere/at/all"), "intermediate", "an existing"),
        (hierarchy(NGRAM, bits=4), "bits", "for hierspec"),
        (hierarchy(NGRAM, min_draft_length=33), "min_draft_length", "32"),
        ({"drafter": None, "min_draft_length": 4}, "min_draft_length", 'set "drafter" too'),
        (hierarchy(HEAD_OF_SMALL), "drafter.model", "128 channels"),
        ({"drafter": HEAD_OF_SMALL}, "drafter.model", "has 256"),
    ],
)
def test_options_of_a_hierarchy(options: dict[str, Any], key: str, says: str) -> None:
    message = refusal(MODEL, options)
    assert f'"{key}"' in message
    assert says in message


@pytest.mark.parametrize(
    ("arguments", "names", "remedy"),
    [
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size is 2", "--tensor-parallel-size"),
        ({"data_parallel_size": 2}, "--data-parallel-size is 2", "separate servers"),
    ],
)
def test_parallelism_of_a_hierarchy(arguments: dict[str, Any], names: str, remedy: str) -> None:
    message = refusal(MODEL, hierarchy(NGRAM), **arguments)
    assert message.startswith('method "hierspec" ')
    assert names in message
    assert remedy in message


@pytest.mark.parametrize("key", ["intermediate", "drafter"])
def test_another_vocabulary(shape: Any, key: str) -> None:
    other = str(shape(vocab_size=5000))
    if key == "intermediate":
        message = refusal(MODEL, hierarchy(NGRAM, intermediate=other))
    else:
        message = refusal(MODEL, hierarchy({"method": "draft_model", "model": other}))
    assert f'"{key}' in message
    assert "5000 tokens in its vocabulary, but the target has 4096" in message


@pytest.mark.parametrize("method", ["draft_model", "eagle", "eagle3"])
def test_a_folder_without_a_model(tmp_path: Path, method: str) -> None:
    message = refusal(MODEL, hierarchy({"method": method, "model": str(tmp_path)}))
    assert message.startswith('speculative_config key "drafter.model"')
    assert "cannot be read" in message


@pytest.mark.parametrize("method", ["eagle", "eagle3"])
def test_a_model_that_is_no_head(engines: Engines, method: str) -> None:
    """Seen when its weights are read."""
    options = hierarchy({"method": method, "model": SMALL}, intermediate=SMALL)
    with pytest.raises(ValueError, match='"drafter.model" is .*, which is no head of "eagle'):
        engines.get(options)
