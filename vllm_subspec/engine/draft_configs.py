# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Configurations of the models that draft beside the target."""

import os

from pydantic import ValidationError
from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig

from vllm_subspec.config import HierspecOptions, SubspecOptions
from vllm_subspec.engine import refusals


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
        # The vocabulary is for `check`, which says it in one sentence.
        use_heterogeneous_vocab=method == "draft_model",
    )


def check(
    options: SubspecOptions | HierspecOptions, target: ModelConfig, parallel: ParallelConfig
) -> None:
    """Raises ValueError, in one sentence, if a drafting model cannot draft for ``target``."""
    base = target
    if isinstance(options, SubspecOptions) and options.substitute is not None and target.is_moe:
        raise ValueError(
            'speculative_config key "substitute" is not read for mixture-of-experts models: remove '
            "it, and substitutes are quantized while the model loads"
        )
    if isinstance(options, HierspecOptions) and options.intermediate is not None:
        base = _readable("intermediate", options.intermediate, "draft_model", target, parallel)
        _check_vocabulary("intermediate", base, target)
    drafter = options.drafter
    if drafter is None or drafter.model is None:
        return
    own = _readable("drafter.model", drafter.model, drafter.method, base, parallel)
    _check_vocabulary("drafter.model", own, target)
    if drafter.method == "draft_model":
        return
    wanted = getattr(own.hf_config, "target_hidden_size", None) or own.get_hidden_size()
    if wanted != base.get_hidden_size():
        raise ValueError(
            f'speculative_config key "drafter.model" names a head for hidden states of {wanted} '
            f"channels, but the model that it drafts for has {base.get_hidden_size()}: use the "
            f"head that was trained for {base.model}"
        )


def _readable(
    key: str, model: str, method: str, base: ModelConfig, parallel: ParallelConfig
) -> ModelConfig:
    try:
        found: ModelConfig = speculative_config(model, method, base, parallel).draft_model_config
    except (OSError, ValueError) as error:
        said = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        reason = (said.strip() or repr(error)).splitlines()[0].removeprefix("Value error, ")
        if os.path.isdir(model) and not os.path.exists(os.path.join(model, "config.json")):
            reason = "it has no config.json"
        elif "trust_remote_code" in said:
            reason = "it brings code of its own; --trust-remote-code runs it, if you trust it"
        reason = reason.rstrip(".")
        raise ValueError(
            f'speculative_config key "{key}" is {model!r}, which cannot be read: {reason}'
        ) from error
    if (weights := refusals.of_weights(found)) is not None:
        raise ValueError(
            f'speculative_config key "{key}" is {model!r}, which cannot run: {weights}'
        )
    return found


def _check_vocabulary(key: str, model: ModelConfig, target: ModelConfig) -> None:
    """Raises ValueError, in one sentence, if ``model`` speaks other tokens than ``target``."""
    sizes = model.get_vocab_size(), target.get_vocab_size()
    if sizes[0] != sizes[1]:
        raise ValueError(
            f'speculative_config key "{key}" names a model with {sizes[0]} tokens in its '
            f"vocabulary, but the target has {sizes[1]}: use a model with the target's tokenizer"
        )
