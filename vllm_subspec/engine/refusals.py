# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""What our methods cannot serve, refused when the configuration is built.

Nothing falls back silently: each refusal is one sentence that names the option and what to do.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from vllm.config import ModelConfig, ParallelConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingParams
from vllm.utils.torch_utils import resolve_kv_cache_dtype_string

from vllm_subspec.machine import isa
from vllm_subspec.weights.kernels import mixed_precision


def check(
    method: str, args: EngineArgs, model_config: ModelConfig, parallel_config: ParallelConfig
) -> None:
    """Raises ValueError with the first reason why this engine cannot run ``method``."""
    reasons = [*_reasons(args, model_config, parallel_config)]
    if method == "subspec":
        reasons += _streaming_reasons(args, model_config, parallel_config)
    if current_platform.is_cpu():
        isa.check()
        reasons += _cpu_reasons(args, model_config)
    for wrong, reason in reasons:
        if wrong:
            raise ValueError(f'method "{method}" {reason}')


def of_request(params: SamplingParams) -> str | None:
    """Why a request cannot be served; None if it can."""
    if params.thinking_token_budget is not None:
        return (
            "a token budget for thinking cannot be counted along a draft: remove "
            "thinking_token_budget from the request, or serve it without speculation"
        )
    return None


def of_weights(model: ModelConfig) -> str | None:
    """Why no kernel here multiplies by a checkpoint's quantized weights; None if one does."""
    if model.quantization is None or not current_platform.is_cpu():
        return None
    config = model.model_arch_config.quantization_config
    return mixed_precision.no_w4a16() if config and _has_w4a16(config) else None


def _has_w4a16(config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint has integer weights of 4 bits and activations as they come.

    Args:
        config: what its config.json says about quantization.
    """
    if "config_groups" not in config:
        bits = config.get("bits", config.get("w_bit"))
        return bits == 4 and config.get("quant_method") in ("gptq", "awq", "auto-round")
    for group in config["config_groups"].values():
        weights = group.get("weights") or {}
        integers = weights.get("num_bits") == 4 and weights.get("type") == "int"
        if integers and not group.get("input_activations"):
            return True
    return False


def _reasons(
    args: EngineArgs, model: ModelConfig, parallel: ParallelConfig
) -> Iterator[tuple[bool, str]]:
    yield (
        parallel.pipeline_parallel_size > 1,
        f"needs all layers in one process, but --pipeline-parallel-size is "
        f"{parallel.pipeline_parallel_size}: use --tensor-parallel-size instead",
    )
    yield (
        parallel.data_parallel_size > 1,
        f"cannot keep data-parallel ranks in step, but --data-parallel-size is "
        f"{parallel.data_parallel_size}: run separate servers behind a load balancer",
    )
    yield (
        parallel.decode_context_parallel_size > 1,
        "does not support --decode-context-parallel-size above 1: remove it",
    )
    yield (
        bool(args.enable_lora),
        "does not support LoRA yet: remove --enable-lora, or merge the adapter into the model",
    )
    yield (
        args.kv_transfer_config is not None,
        "has not been tested with KV connectors: remove --kv-transfer-config",
    )
    yield (
        bool(args.async_scheduling),
        "needs each token before it drafts the next: remove --async-scheduling",
    )
    yield (
        model.runner_type != "generate",
        f"generates text, but --runner is {model.runner_type}: remove one of them",
    )
    yield (
        model.is_multimodal_model,
        "serves text models only, and this model is multimodal: use a text model",
    )
    yield (
        model.is_hybrid or model.is_attention_free,
        "cannot rewind recurrent (Mamba, linear attention) state: use a model with attention only",
    )
    yield (
        model.use_mla,
        "has not been tested with multi-head latent attention: use another model",
    )
    yield (
        getattr(model, "rswa_window", None) is not None,
        "has not been tested with reference sliding-window attention: use another model",
    )
    yield (
        model.get_sliding_window() is not None,
        "has not been tested with sliding-window attention: use --disable-sliding-window or "
        "another model",
    )


def _cpu_reasons(args: EngineArgs, model: ModelConfig) -> Iterator[tuple[bool, str]]:
    kv = resolve_kv_cache_dtype_string(args.kv_cache_dtype, model)
    yield (
        kv.startswith("fp8") and not torch.cpu._is_avx512_supported(),
        f"would keep K/V in {kv}, for which vLLM needs AVX-512, but --kv-cache-dtype is "
        f"{args.kv_cache_dtype}: use auto, and a checkpoint that names no K/V format",
    )
    reason = of_weights(model)
    yield reason is not None, f"cannot run {model.model}: {reason}"


def _streaming_reasons(
    args: EngineArgs, model: ModelConfig, parallel: ParallelConfig
) -> Iterator[tuple[bool, str]]:
    yield (
        bool(args.cpu_offload_gb) or bool(args.offload_group_size),
        "streams weights itself: remove --cpu-offload-gb and --offload-group-size and set "
        '"resident_weights_gib" instead',
    )
    yield (
        model.quantization is not None,
        f"streams unquantized weights, but the model is quantized ({model.quantization}): serve "
        "the full-precision model",
    )
    yield (
        model.using_transformers_backend(),
        f"streams models that vLLM implements itself, but it runs {model.architecture} through "
        "Transformers: use another model, and remove --model-impl if it is given",
    )
    yield (
        model.enable_sleep_mode,
        "loads weights ahead, which would not survive a sleep: remove --enable-sleep-mode",
    )
    yield (
        parallel.enable_expert_parallel,
        "streams a share of every expert to every rank: remove --enable-expert-parallel",
    )
