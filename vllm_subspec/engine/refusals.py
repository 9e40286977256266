# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""What our methods cannot serve, refused when the configuration is built.

Nothing falls back silently: each refusal is one sentence that names the option and what to do.
"""

from collections.abc import Iterator

from vllm.config import ModelConfig, ParallelConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams


def check(
    method: str, args: EngineArgs, model_config: ModelConfig, parallel_config: ParallelConfig
) -> None:
    """Raises ValueError with the first reason why this engine cannot run ``method``."""
    reasons = [*_reasons(args, model_config, parallel_config)]
    if method == "subspec":
        reasons += _streaming_reasons(args, model_config, parallel_config)
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
