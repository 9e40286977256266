# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Configurations of the models that draft beside the target."""

from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig

from vllm_subspec.config import HierspecOptions, SubspecOptions


def speculative_config(
    model: str, method: str, target: ModelConfig, parallel: ParallelConfig
) -> SpeculativeConfig:
    """vLLM's own configuration of a drafting model.

    Args:
        model: directory or name.
        method: vLLM's name of it: ``draft_model``, ``eagle`` or ``eagle3``.
        target: the model it drafts for.
    """
    return SpeculativeConfig(
        model=model,
        method=method,
        num_speculative_tokens=1,
        target_model_config=target,
        target_parallel_config=parallel,
    )


def check(
    options: SubspecOptions | HierspecOptions, target: ModelConfig, parallel: ParallelConfig
) -> None:
    """Raises ValueError, in one sentence, if a drafting model cannot draft for ``target``."""
    if isinstance(options, HierspecOptions) and options.intermediate is not None:
        own = speculative_config(options.intermediate, "draft_model", target, parallel)
        _check_vocabulary("intermediate", own.draft_model_config, target)
    if options.drafter is not None and options.drafter.model is not None:
        own = speculative_config(options.drafter.model, options.drafter.method, target, parallel)
        _check_vocabulary("drafter.model", own.draft_model_config, target)


def _check_vocabulary(key: str, model: ModelConfig, target: ModelConfig) -> None:
    """Raises ValueError, in one sentence, if ``model`` speaks other tokens than ``target``."""
    sizes = model.get_vocab_size(), target.get_vocab_size()
    if sizes[0] != sizes[1]:
        raise ValueError(
            f'speculative_config key "{key}" names a model with {sizes[0]} tokens in its '
            f"vocabulary, but the target has {sizes[1]}: use a model with the target's tokenizer"
        )
