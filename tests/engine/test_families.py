# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Families of models, small and with random weights: every layer is streamed, drafts are right and
wrong, and the answers are those that transformers computes from the same checkpoint.

docs/models.md lists what is tested here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from vllm import LLM
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from tests.engine import two_ranks
from tests.engine.helpers import (
    CHAIN,
    Engines,
    assert_chains_were_tried,
    draft_counts,
    generate,
    greedy,
    import_model_class,
    memory_plan,
    worker_of,
)
from vllm_subspec.weights.substitute_experts import SubstituteExperts

VOCABULARY = 256
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,  # 0.02, the default, makes so small a model repeat itself
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
DENSE: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": None},
    "gemma": {},
    "phi3": {},
    "cohere": {},
}
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 192,
    },
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128},
}
FAMILIES = DENSE | EXPERTS

# 4 bits: of a random model, coarser ones are hardly ever right.
DRAFT: dict[str, Any] = {**CHAIN, "bits": 4}
SETTINGS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "max_model_len": 128,
    "kv_cache_memory_bytes": 8 << 20,
}
_TOKENS = torch.Generator().manual_seed(1)
PROMPTS = [
    torch.randint(3, VOCABULARY, (length,), generator=_TOKENS).tolist() for length in (2, 17, 40)
]
PARAMS = [greedy(24)] * len(PROMPTS)


@dataclass
class Checkpoint:
    path: Path
    model: PreTrainedModel

    def answers(self) -> list[tuple[int, ...]]:
        """What transformers' own greedy search continues the prompts with."""
        found = []
        for prompt, params in zip(PROMPTS, PARAMS, strict=True):
            ids = torch.tensor([prompt])
            out = self.model.generate(
                ids, max_new_tokens=params.max_tokens, do_sample=False, eos_token_id=None
            )
            found.append(tuple(out[0, len(prompt) :].tolist()))
        return found


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Checkpoint]:
    """Makes a random float32 checkpoint of a family."""

    def make(family: str, **changes: Any) -> Checkpoint:
        config = AutoConfig.for_model(family, **SHAPE | FAMILIES[family] | changes)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        # So that a token does not merely predict itself where the output layer is tied to these.
        model.get_input_embeddings().weight.data.mul_(0.1)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero in a new model
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(tmp_path)
        (architecture,) = model.config.architectures
        import_model_class(architecture)
        return Checkpoint(tmp_path, model)

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_the_models_own(
    engines: Engines, checkpoint: Callable[..., Checkpoint], family: str
) -> None:
    made = checkpoint(family)
    llm = engines.get(DRAFT, made.path, **SETTINGS)
    assert memory_plan(llm).streamed == (0, 1)
    assert [answer.tokens for answer in generate(llm, PROMPTS, PARAMS)] == made.answers()
    counts = draft_counts(llm)
    assert min(counts.accepted, counts.wrong) >= 3, counts


def test_resident_experts_have_substitutes_too(
    engines: Engines, checkpoint: Callable[..., Checkpoint]
) -> None:
    made = checkpoint("mixtral")
    layer = 4 * sum(parameter.numel() for parameter in made.model.model.layers[1].parameters())
    mixed = {**DRAFT, "resident_weights_gib": 1.5 * layer / (1 << 30), "substitute_layers": "all"}
    llm = engines.get(mixed, made.path, **SETTINGS)
    plan = memory_plan(llm)
    assert plan.streamed == (0,)
    assert plan.substituted == (0, 1)
    found = worker_of(llm).loading.substitutes.values()
    experts = [substitute for substitute in found if isinstance(substitute, SubstituteExperts)]
    assert len(experts) == 2
    asked: set[SubstituteExperts] = set()
    for substitute in experts:
        substitute.register_forward_hook(lambda module, *_: asked.add(module))
    assert [answer.tokens for answer in generate(llm, PROMPTS, PARAMS)] == made.answers()
    assert draft_counts(llm).accepted >= 3
    assert asked == set(experts)  # and not the target's


def test_experts_over_two_ranks(
    engines: Engines, checkpoint: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    """Each rank has its share of every expert."""
    engines.close()
    model = checkpoint("mixtral", intermediate_size=256).path
    outcomes = two_ranks.run(["plain", "chains"], tmp_path / "stores", seconds=800, model=model)
    two_ranks.assert_same_answers(outcomes["chains"], outcomes["plain"])
    two_ranks.assert_ranks_drafted_alike(outcomes["chains"])
    assert_chains_were_tried(outcomes["chains"].counts, 3)


def test_experts_from_a_store(engines: Engines, checkpoint: Callable[..., Checkpoint]) -> None:
    """They are packed there. What is computed from is the checkpoint's, what is made of them is
    what was made when they were loaded, and vLLM without speculation answers the same."""
    made = checkpoint("qwen3_moe")
    plain = generate(engines.get(None, made.path, **SETTINGS), PROMPTS, PARAMS)

    def substitutes(reused: bool) -> list[torch.Tensor]:
        engines.close()
        llm = engines.get(DRAFT, made.path, **SETTINGS)
        loading = worker_of(llm).loading
        assert loading.store_reused == reused
        wrong = _wrong_experts(llm, made.model)
        assert generate(llm, PROMPTS, PARAMS) == plain
        assert wrong == dict.fromkeys(memory_plan(llm).streamed, 0)
        found = loading.substitutes
        ordered = [m for m in worker_of(llm).model_runner.model.modules() if m in found]
        assert sum(isinstance(module, RoutedExperts) for module in ordered) == 2
        return [held for module in ordered for held in found[module].buffers()]

    loaded = substitutes(reused=False)
    for a, b in zip(loaded, substitutes(reused=True), strict=True):
        assert torch.equal(a, b)


def _wrong_experts(llm: LLM, model: PreTrainedModel) -> dict[int, int]:
    """How often a layer's pass has begun or ended with other experts than the checkpoint's; of
    each layer that is passed from now on."""
    wrong: dict[int, int] = {}

    def checker(layer: Any) -> Callable[..., None]:
        (part,) = (p for p in layer.parts.values() if isinstance(p.module, RoutedExperts))
        experts = model.model.layers[layer.index].mlp.experts

        def check(*args: Any) -> None:
            held = [part.original(parameter.data) for parameter in part.parameters]
            equal = map(torch.equal, held, (experts.gate_up_proj, experts.down_proj))
            wrong[layer.index] = wrong.get(layer.index, 0) + (not all(equal))

        return check

    for layer in worker_of(llm).loading.offloader.streamed:
        # Inside of the ring's own: after it has waited, before it releases.
        layer.module.register_forward_pre_hook(checker(layer))
        layer.module.register_forward_hook(checker(layer), prepend=True)
    return wrong


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mlp_only_layers": [0]}, "whose decoder layers are alike, but layer 1 has"),
        ({"moe_intermediate_size": 80}, "80 x 128 channels on a rank, no multiples of 32"),
    ],
    ids=["layers of several sizes", "odd experts"],
)
def test_experts_that_are_refused(
    engines: Engines, checkpoint: Callable[..., Checkpoint], changes: dict[str, Any], says: str
) -> None:
    """When the model is built: nothing of it is read before."""
    made = checkpoint("qwen3_moe", **changes)
    with pytest.raises(ValueError, match=f'^method "subspec" .*{says}'):
        engines.get(DRAFT, made.path, **SETTINGS)
