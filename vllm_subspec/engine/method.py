# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Makes ``{"method": "subspec"}`` and ``{"method": "hierspec"}`` known to vLLM.

vLLM's set of methods is closed and refuses unknown keys, so the dict is rewritten where the
engine's arguments become its configuration: the method becomes ``custom_class`` with our proposer,
our options travel in ``additional_config["subspec"]`` (an official field: pickled to every process
and part of the compilation hash), and the worker class becomes ours.
"""

from collections.abc import Callable
from typing import Any

from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform

from vllm_subspec.config import METHODS, HierspecOptions, SubspecOptions
from vllm_subspec.engine import beside, draft_configs, refusals
from vllm_subspec.engine.in_use import KEY, PROPOSER, Asked

WORKERS = {
    ("subspec", "cpu"): "vllm_subspec.engine.worker_cpu.SubspecCPUWorker",
    ("subspec", "cuda"): "vllm_subspec.engine.worker_cuda.SubspecGPUWorker",
    ("hierspec", "cpu"): "vllm_subspec.engine.worker_cpu.HierspecCPUWorker",
    ("hierspec", "cuda"): "vllm_subspec.engine.worker_cuda.HierspecGPUWorker",
}


def options_of(config: VllmConfig) -> SubspecOptions | HierspecOptions | None:
    """The options of an engine that drafts by one of our methods; None of any other."""
    extra = config.additional_config
    if not isinstance(extra, dict) or KEY not in extra:
        return None
    given = dict(extra[KEY])
    return METHODS[given.pop("method")].parse(given)


def configure(
    args: EngineArgs,
    method: str,
    create: Callable[..., SpeculativeConfig | None],
    model_config: ModelConfig,
    parallel_config: ParallelConfig,
) -> SpeculativeConfig | None:
    """vLLM's configuration of an engine whose arguments name ``method``.

    Args:
        create: `EngineArgs.create_speculative_config`, as it was before ours, with what other
            plugins have made of it.

    Raises ValueError, in one sentence, if the engine cannot run the method.
    """
    given = dict(args.speculative_config or {})
    if given.get("model") != PROPOSER:
        _rewrite(args, method, given, model_config, parallel_config)
    config = create(args, model_config, parallel_config)
    # Another plugin may have put its worker in now, or before.
    ours = WORKERS[method, current_platform.device_type]
    theirs = parallel_config.worker_cls
    if theirs not in ("auto", ours):
        beside.check(method, theirs)
        args.additional_config[beside.KEY] = theirs
    parallel_config.worker_cls = args.worker_cls = ours
    return config


def _rewrite(
    args: EngineArgs,
    method: str,
    given: dict[str, Any],
    model_config: ModelConfig,
    parallel_config: ParallelConfig,
) -> None:
    given.pop("method", None)
    if args.spec_tokens is not None:
        given.setdefault("num_speculative_tokens", args.spec_tokens)
    options = METHODS[method].parse({str(key).replace("-", "_"): v for key, v in given.items()})
    refusals.check(method, args, model_config, parallel_config)
    draft_configs.check(options, model_config, parallel_config)
    if current_platform.is_cuda():
        from vllm_subspec.engine import cuda_options  # imports CUDA's attention

        cuda_options.choose(args, method, options.trees, model_config)
    # Of the arguments: who makes a second configuration of them (Ray does) finds what is written
    # below.
    ours = Asked({"method": method, **options.to_json_dict()})
    args.additional_config = {**(args.additional_config or {}), KEY: ours}
    args.spec_method = args.spec_model = args.spec_tokens = None
    args.speculative_config = {
        "method": "custom_class",
        "model": PROPOSER,
        "num_speculative_tokens": options.num_speculative_tokens,
        # Drafts of any size: else vLLM pads a request that resumes with a single token to the
        # largest draft, and never schedules it where the token budget is smaller than that.
        "num_speculative_tokens_per_batch_size": [(1, 1, options.num_speculative_tokens)],
    }
