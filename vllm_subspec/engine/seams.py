# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Every symbol of vLLM that our methods build on, checked by name and signature before use.

A seam that an upgrade has moved is a clear error when an engine is configured, not a strange crash
in the middle of a request. Only what this method needs on this platform is looked at: importing
another platform's worker changes torch for the whole process.
"""

import importlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Table = Mapping[str, tuple[str, ...] | None]
"""Symbol -> names its parameters must include (None: it only has to exist)."""

SEAMS: dict[str, tuple[str, ...] | None] = {
    "vllm.engine.arg_utils:EngineArgs.create_speculative_config": (
        "target_model_config",
        "target_parallel_config",
    ),
    "vllm.utils.import_utils:resolve_obj_by_qualname": ("qualname",),
    "vllm.config:VllmConfig.num_lookahead_tokens": None,
    "vllm.config:VllmConfig.additional_config": None,
    "vllm.v1.spec_decode.custom_class_proposer:create_custom_proposer": ("vllm_config",),
    "vllm.v1.worker.gpu_worker:Worker.init_device": (),
    "vllm.v1.worker.gpu_worker:Worker.load_model": ("load_dummy_weights",),
    "vllm.v1.worker.gpu_worker:Worker.execute_model": ("scheduler_output",),
    "vllm.v1.worker.gpu_worker:Worker.shutdown": (),
    "vllm.v1.worker.gpu_worker:Worker.determine_available_memory": (),
    "vllm.v1.worker.gpu_worker:Worker.compile_or_warm_up_model": (),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._sample": ("logits", "spec_decode_metadata"),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._bookkeeping_sync": ("sampler_output",),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._input_fits_in_drafter": (),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._setup_eagle3_aux_hidden_state_outputs": (),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._prepare_inputs": (
        "scheduler_output",
        "num_scheduled_tokens",
    ),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._build_attention_metadata": (
        "logits_indices",
        "for_cudagraph_capture",
    ),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.propose_draft_token_ids": (
        "scheduler_output",
        "sampled_token_ids",
        "sampling_metadata",
        "hidden_states",
        "sample_hidden_states",
        "aux_hidden_states",
    ),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.take_draft_token_ids": (),
    "vllm.v1.spec_decode.eagle:EagleProposer.load_model": ("target_model",),
    "vllm.v1.spec_decode.eagle:EagleProposer._create_draft_vllm_config": (),
    "vllm.v1.spec_decode.eagle:EagleProposer._get_model": (),
    "vllm.model_executor.model_loader:get_model": ("vllm_config", "model_config", "prefix"),
    "vllm.compilation.backends:set_model_tag": None,
    "vllm.v1.worker.gpu_worker:Worker.initialize_from_config": ("kv_cache_config",),
    "vllm.v1.worker.block_table:BlockTable.get_numpy_array": (),
    "vllm.v1.worker.block_table:BlockTable.get_device_tensor": ("num_reqs",),
    "vllm.v1.core.sched.scheduler:Scheduler.update_from_output": (
        "scheduler_output",
        "model_runner_output",
    ),
    "vllm.v1.engine.async_llm:AsyncLLM._run_output_handler": (),
    "vllm.v1.engine.async_llm:AsyncLLM.is_running": None,
    "vllm.v1.metrics.loggers:PrometheusStatLogger._counter_cls": None,
    "vllm.v1.metrics.loggers:PrometheusStatLogger._gauge_cls": None,
    "vllm.v1.metrics.loggers:PrometheusStatLogger._histogram_cls": None,
    "vllm.v1.engine.async_llm:AsyncLLM.collective_rpc": ("method", "timeout", "args"),
    "vllm.v1.engine.exceptions:EngineDeadError": None,
    "vllm.tracing:instrument_manual": ("span_name", "start_time", "end_time", "attributes"),
    "vllm.v1.core.kv_cache_manager:KVCacheManager.evict_blocks": ("block_ids",),
    "vllm.v1.engine.core:EngineCoreProc.run_busy_loop": (),
    "vllm.distributed.device_communicators.shm_broadcast:SpinCondition.record_read": (),
    "vllm.v1.structured_output:StructuredOutputManager.validate_tokens": ("request", "spec_tokens"),
    "vllm.v1.structured_output:StructuredOutputManager.grammar_bitmask": (
        "requests",
        "structured_output_request_ids",
        "scheduled_spec_decode_tokens",
    ),
    "vllm.v1.structured_output:StructuredOutputManager._get_constraint_bounds": (
        "request",
        "spec_tokens",
    ),
    "vllm.v1.structured_output:ConstraintBounds": ("constraint_start",),
    "vllm.v1.structured_output.request:StructuredOutputRequest.grammar": None,
    "vllm.v1.structured_output.backend_types:StructuredOutputGrammar.accept_tokens": (
        "request_id",
        "tokens",
    ),
    "vllm.v1.structured_output.backend_types:StructuredOutputGrammar.validate_tokens": ("tokens",),
    "vllm.v1.structured_output.backend_types:StructuredOutputGrammar.rollback": ("num_tokens",),
    "vllm.v1.structured_output.backend_types:StructuredOutputGrammar.is_terminated": (),
    "vllm.v1.structured_output.backend_types:StructuredOutputGrammar.fill_bitmask": (
        "bitmask",
        "batch_index",
    ),
    "vllm.v1.outputs:ModelRunnerOutput": ("req_ids", "req_id_to_index", "sampled_token_ids"),
    "vllm.v1.attention.backend:CommonAttentionMetadata": (
        "query_start_loc",
        "query_start_loc_cpu",
        "seq_lens",
        "num_reqs",
        "num_actual_tokens",
        "max_query_len",
        "max_seq_len",
        "block_table_tensor",
        "slot_mapping",
        "causal",
        "positions",
        "is_prefilling",
        "seq_lens_cpu_upper_bound",
    ),
    "vllm.v1.attention.backends.registry:register_backend": ("backend", "class_path"),
    "vllm.v1.attention.backends.registry:AttentionBackendEnum.clear_override": (),
    "vllm.v1.attention.selector:_cached_get_attn_backend": None,
    "vllm.v1.sample.sampler:Sampler.sample": ("logits", "sampling_metadata"),
    "vllm.v1.sample.sampler:Sampler.apply_temperature": ("logits", "temp", "all_random"),
    "vllm.v1.sample.metadata:SamplingMetadata": (
        "temperature",
        "top_k",
        "top_p",
        "generators",
        "output_token_ids",
        "bad_words_token_ids",
        "allowed_token_ids_mask",
        "logitsprocs",
        "logprob_token_ids",
    ),
    "vllm.v1.sample.logits_processor:BatchUpdate": ("batch_size", "removed", "added", "moved"),
    "vllm.v1.sample.logits_processor:LogitBiasLogitsProcessor": (),
    "vllm.v1.sample.logits_processor:MinTokensLogitsProcessor": (),
    "vllm.sampling_params:SamplingParams._validate_spec_decode": ("speculative_config",),
    "vllm.v1.attention.backend:AttentionMetadataBuilder.build": (
        "common_prefix_len",
        "common_attn_metadata",
    ),
    "vllm.forward_context:set_forward_context": (
        "attn_metadata",
        "vllm_config",
        "num_tokens",
        "slot_mapping",
        "skip_compiled",
    ),
    "vllm.forward_context:get_forward_context": (),
    "vllm.model_executor.offloader.base:set_offloader": (),
    "vllm.v1.sample.ops.topk_topp_sampler:apply_top_k_top_p": ("logits", "k", "p"),
    "vllm.v1.sample.ops.topk_topp_sampler:apply_top_k_only": ("logits", "k"),
}
"""Of every method, on every platform."""

STREAMING: dict[str, tuple[str, ...] | None] = {
    "vllm.config:ModelConfig.using_transformers_backend": (),
    "vllm.transformers_utils.config:get_safetensors_params_metadata": ("model", "revision"),
    "vllm.v1.worker.gpu_worker:Worker.reload_weights": (),
    "vllm.v1.worker.gpu_worker:Worker.update_weights": (),
    "vllm.model_executor.model_loader.weight_utils:safetensors_weights_iterator": (),
    "vllm.model_executor.offloader.base:BaseOffloader.wrap_modules": ("modules_generator",),
    "vllm.model_executor.models.utils:make_layers": ("num_hidden_layers", "layer_fn", "prefix"),
    "vllm.model_executor.layers.linear:LinearBase": (),
    "vllm.model_executor.layers.linear:LinearMethodBase.apply": ("layer", "x", "bias"),
    "vllm.model_executor.layers.linear:UnquantizedLinearMethod.process_weights_after_loading": (
        "layer",
    ),
    "vllm.model_executor.layers.fused_moe.routed_experts:RoutedExperts": ("moe_config",),
    "vllm.model_executor.layers.fused_moe.runner.moe_runner:MoERunner._forward_impl": (
        "hidden_states",
        "router_logits",
        "shared_experts_input",
        "input_ids",
    ),
    "vllm.model_executor.layers.fused_moe.runner.moe_runner:MoERunner._select_forward": (),
    "vllm.model_executor.layers.fused_moe.runner.shared_experts:SharedExperts": (
        "mk_can_overlap_shared_experts",
    ),
    "vllm.model_executor.layers.fused_moe.fused_moe_method_base:FusedMoEMethodBase.apply": (
        "layer",
        "x",
        "topk_weights",
        "topk_ids",
        "shared_experts",
        "shared_experts_input",
    ),
    "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method:"
    "UnquantizedFusedMoEMethod._init_moe_kernel": ("layer",),
    "vllm.model_executor.layers.fused_moe.activation:apply_moe_activation": (
        "activation",
        "output",
        "input",
    ),
    "vllm.model_executor.model_loader.reload.meta:CopyCounter": None,
    "vllm.utils.torch_utils:direct_register_custom_op": ("op_name", "op_func", "mutates_args"),
}
"""Of method "subspec"."""

CPU: dict[str, tuple[str, ...] | None] = {
    "vllm.v1.worker.cpu_worker:CPUWorker.init_device": (),
    "vllm.v1.worker.cpu_worker:CPUWorker.determine_available_memory": (),
    "vllm.v1.worker.cpu_worker:get_memory_node_info": ("node_id",),
    "vllm.utils.cpu_resource_utils:get_cgroup_memory_limit": (),
    "vllm.utils.cpu_resource_utils:MemoryNodeInfo.available_memory": None,
    "vllm.v1.worker.cpu_model_runner:CPUModelRunner.load_model": (),
    "vllm.v1.worker.cpu_worker:CPUModelRunner": ("vllm_config", "device"),
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.forward": (
        "layer",
        "query",
        "key",
        "value",
        "kv_cache",
        "attn_metadata",
        "output",
    ),
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionMetadataBuilder.build": (
        "common_prefix_len",
        "common_attn_metadata",
        "fast_build",
    ),
    "vllm.utils.cpu_triton_utils:_expand_kernel_impl": (
        "output",
        "input_val",
        "cu_num_tokens",
        "replace_from",
        "replace_to",
    ),
    "vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm": ("layer", "remove_weight"),
    "vllm.utils.torch_utils:resolve_kv_cache_dtype_string": ("kv_cache_dtype", "model_config"),
}
"""The worker comes first, as vLLM's own order of imports has it."""

STREAMING_CPU: dict[str, tuple[str, ...] | None] = {
    "vllm.model_executor.layers.fused_moe.experts.cpu_moe:CPUUnquantizedExperts.isa": None,
    "vllm._custom_ops:cpu_prepack_moe_weight": ("weight", "isa"),
}

CUDA: dict[str, tuple[str, ...] | None] = {
    "vllm.v1.attention.backends.flash_attn:FlashAttentionBackend.validate_configuration": (
        "head_size",
        "dtype",
        "kv_cache_dtype",
        "device_capability",
    ),
    "vllm.v1.worker.gpu_worker:Worker._make_model_runner": (),
    "vllm.utils.torch_utils:is_quantized_kv_cache": ("kv_cache_dtype",),
    "vllm.v1.attention.backends.flash_attn:FlashAttentionMetadataBuilder.build": (
        "common_prefix_len",
        "common_attn_metadata",
        "fast_build",
    ),
    "vllm.v1.attention.backends.flash_attn:FlashAttentionMetadataBuilder.get_cudagraph_support": (
        "vllm_config",
        "kv_cache_spec",
    ),
    "vllm.v1.attention.backends.flash_attn:FlashAttentionImpl.forward": (
        "layer",
        "query",
        "key",
        "value",
        "kv_cache",
        "attn_metadata",
        "output",
    ),
    "vllm.v1.attention.backends.flash_attn:FlashAttentionImpl.do_kv_cache_update": (
        "kv_cache",
        "slot_mapping",
    ),
}

PLATFORMS = {"cpu": CPU, "cuda": CUDA}


@dataclass(frozen=True)
class SeamReport:
    name: str
    ok: bool
    detail: str


def check_seams(method: str, platform: str) -> list[SeamReport]:
    """One report for each seam of ``method`` on a platform of `PLATFORMS`."""
    return [
        _check(name, parameters)
        for table in _tables(method, platform)
        for name, parameters in table.items()
    ]


def require(method: str, platform: str) -> None:
    """Check what ``method`` builds on.

    Args:
        platform: vLLM's type of device.

    Raises:
        ValueError: no method of ours runs there.
        RuntimeError: names every seam that has moved.
    """
    if platform not in PLATFORMS:
        raise ValueError(f'method "{method}" runs on CPU and CUDA, not on {platform}')
    moved = [
        f"{seam.name} ({seam.detail})" for seam in check_seams(method, platform) if not seam.ok
    ]
    if moved:
        raise RuntimeError(
            f'method "{method}" does not fit this vLLM, these symbols have moved: '
            + "; ".join(moved)
            + "; install a supported vLLM version"
        )


def _tables(method: str, platform: str) -> Iterator[Table]:
    yield PLATFORMS[platform]
    yield SEAMS
    if method == "subspec":
        yield STREAMING
        if platform == "cpu":
            yield STREAMING_CPU


def _check(name: str, parameters: tuple[str, ...] | None) -> SeamReport:
    module, _, path = name.partition(":")
    try:
        symbol: Any = importlib.import_module(module)
        for part in path.split("."):
            symbol = _attribute(symbol, part)
    except (ImportError, AttributeError) as error:
        return SeamReport(name, False, str(error))
    if parameters:
        missing = set(parameters) - _accepted(symbol, set(parameters))
        if missing:
            return SeamReport(name, False, f"no parameter {', '.join(sorted(missing))}")
    return SeamReport(name, True, "")


def _accepted(symbol: Any, names: set[str]) -> set[str]:
    """Those of ``names`` that a callable takes.

    What other plugins have wrapped around it is looked through; a wrapper that hides what it wraps
    and hands on whatever it is given takes them all.
    """
    parameters = inspect.signature(symbol).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    if {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} <= kinds:
        return names
    return names & parameters.keys()


def _attribute(owner: Any, name: str) -> Any:
    fields = getattr(owner, "__dataclass_fields__", {})
    return fields[name] if name in fields else getattr(owner, name)
