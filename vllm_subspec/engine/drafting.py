# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""From options to drafters: which models are loaded, and how they are put together.

subspec                    Hierarchy(substitute, drafter), by default with lookups
subspec, drafter null      the substitute's trees go to the target
hierspec                   Hierarchy(intermediate, drafter)
hierspec, no intermediate  the drafter's trees go to the target
"""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import nn
from vllm.config import ModelConfig, SpeculativeConfig

from vllm_subspec.config import DrafterOptions, HierspecOptions, SubspecOptions
from vllm_subspec.core.depth import DepthController, FullGrowth
from vllm_subspec.core.sequence import FixedSequence, SequenceController
from vllm_subspec.drafters.base import Drafter
from vllm_subspec.drafters.hierarchy import Hierarchy
from vllm_subspec.drafters.model import ModelDrafter
from vllm_subspec.drafters.ngram import NgramDrafter
from vllm_subspec.engine import draft_configs, draft_models, ranks
from vllm_subspec.engine.coverage import Coverage, OwnCoverage, TargetCoverage
from vllm_subspec.engine.draft_forward import TreeModel
from vllm_subspec.engine.features import Features, Tap
from vllm_subspec.engine.head import HeadModel
from vllm_subspec.engine.intermediate import PagedIntermediate
from vllm_subspec.engine.paged_model import PagedModel
from vllm_subspec.engine.verification import Verification

if TYPE_CHECKING:
    from vllm_subspec.engine.runner import TreeRunner

Pruning = Literal["dynamic", "none"]


class Models:
    """The drafting models of one worker, and the drafters made of them.

    Args:
        runner: the target's model runner.
        options: ours.
        build_substitute: the target's substitute, of method "subspec".
    """

    def __init__(
        self,
        runner: "TreeRunner",
        options: SubspecOptions | HierspecOptions,
        build_substitute: Callable[[nn.Module], nn.Module] | None,
    ) -> None:
        self._runner = runner
        self._options = options
        self._build_substitute = build_substitute
        self.target_layers: frozenset[str]
        self._readable = sys.maxsize  # tokens, by the models that draft
        self._intermediate: tuple[PagedModel, Coverage] | None = None
        self._inner: TreeModel | HeadModel | None = None
        self._tap: Tap | None = None
        self._taps_target = False
        self._coverages: list[OwnCoverage] = []

    @property
    def max_length(self) -> int:
        """Tokens of a text that all models can read; beyond, nothing is drafted. (vLLM may lower
        the target's when it knows the memory for K/V.)"""
        return min(self._readable, self._runner.max_model_len)

    def load(self, target: nn.Module) -> None:
        """Load what drafts, once the target is loaded."""
        runner, options = self._runner, self._options
        config = runner.vllm_config
        self.target_layers = frozenset(config.compilation_config.static_forward_context)
        base, base_config = target, config.model_config
        if isinstance(options, HierspecOptions) and options.intermediate is not None:
            base_config = self._config(options.intermediate, "draft_model").draft_model_config
            self._readable = min(self._readable, base_config.max_model_len)
            base, layers = draft_models.load(config, base_config, "intermediate")
            self._intermediate = PagedModel(runner, base, layers), self._tracked(OwnCoverage())
        if options.drafter is not None and options.drafter.model is not None:
            self._load_inner(options.drafter, base, base_config, base is target)
        if self._build_substitute is not None:
            substitute = self._build_substitute(target)
            model = PagedModel(runner, substitute, self.target_layers)
            self._intermediate = model, TargetCoverage()

    def drafter(self, branching: int, depth: int, pruning: Pruning, hierarchy: bool) -> Drafter:
        """A drafter that has learnt nothing yet.

        Args:
            branching: of trees that the substitute grows.
            depth: of them, and of the sequences that it drafts in a hierarchy.
            pruning: the option of that name.
            hierarchy: whether the options' own drafter takes part; if not, the substitute or the
                intermediate drafts alone.

        Raises:
            ValueError: without a hierarchy there is nothing that drafts.
        """
        options, device = self._options, self._runner.device
        if options.drafter is None or not hierarchy:
            if self._intermediate is None:
                raise ValueError('"hierarchy" is False, but there is no "intermediate" to draft')
            return ModelDrafter(
                TreeModel(*self._intermediate),
                _growth(depth, pruning),
                branching,
                options.draft_temperature,
                device,
            )
        inner = self._inner_drafter(options.drafter, pruning)
        if self._intermediate is None:
            return inner
        model, coverage = self._intermediate
        layers = self._runner.layers_of(model.layers)
        kind = SequenceController if pruning == "dynamic" else FixedSequence
        return Hierarchy(
            PagedIntermediate(self._runner, model, coverage, layers, self._tap),
            inner,
            kind(depth, min(options.sequence_length, depth)),
            options.drafter.nodes,
            options.draft_temperature,
            device,
            ranks.agree,
        )

    def settle(
        self,
        verification: Verification,
        hidden: torch.Tensor,
        auxiliary: list[torch.Tensor] | None,
    ) -> None:
        """The target's newest pass was sampled from: what of the drafts' K/V is the text's.

        Args:
            verification: of the pass.
            hidden: ``[n, hidden]`` the target's last hidden states of the pass's tokens.
            auxiliary: of other layers, if the drafter needs them.
        """
        walks = verification.walks
        assert walks is not None
        living = self._runner.requests.keys()
        for coverage in self._coverages:
            coverage.forget(living)
        features: torch.Tensor | None = None
        if self._tap is not None:
            self._tap.features.forget(living)
            if self._taps_target:
                features = self._tap.of(hidden, auxiliary)
        for row, (name, path) in enumerate(zip(verification.request_ids, walks.paths, strict=True)):
            before, draft = int(verification.computed[row]), verification.drafts[row]
            # Of a tree only the root has its place in the text.
            right = 1 + (path.size if draft.tree.is_chain else 0) if len(draft) else 0
            for coverage in self._coverages:
                coverage.settle(name, before, before + right)
            if isinstance(self._inner, HeadModel):
                self._inner.settle(name, before + right)
            if features is not None and self._tap is not None:
                text = np.arange(verification.roots[row] + 1 - before)
                chosen = verification.starts[row] + np.append(text, text.size + path)
                self._tap.features.add(name, before, features[torch.as_tensor(chosen)])

    def _tracked(self, coverage: OwnCoverage) -> OwnCoverage:
        self._coverages.append(coverage)
        return coverage

    def _config(
        self, model: str, method: str, base: ModelConfig | None = None
    ) -> SpeculativeConfig:
        config = self._runner.vllm_config
        return draft_configs.speculative_config(
            model, method, base or config.model_config, config.parallel_config
        )

    def _load_inner(
        self, options: DrafterOptions, base: nn.Module, base_config: ModelConfig, of_target: bool
    ) -> None:
        """The drafter's model; a head drafts for ``base``, which is the target or is not."""
        runner = self._runner
        assert options.model is not None
        own = self._config(options.model, options.method, base_config)
        self._readable = min(self._readable, own.draft_model_config.max_model_len)
        if options.method == "draft_model":
            module, layers = draft_models.load(
                runner.vllm_config, own.draft_model_config, "drafter"
            )
            coverage = self._tracked(OwnCoverage())
            self._inner = TreeModel(PagedModel(runner, module, layers), coverage)
            return
        head, layers = draft_models.load_head(runner, own, base, base_config, "drafter")
        combine = head.combine_hidden_states if options.method == "eagle3" else None
        self._tap = Tap(Features(), combine)
        self._taps_target = of_target
        if of_target and options.method == "eagle3":
            runner.use_aux_hidden_state_outputs = True
        # While drafting it sees the substitute's features, or its own guesses.
        coverage = self._tracked(OwnCoverage(ahead=1, keeps_drafts=not of_target))
        model = PagedModel(runner, head, layers)
        self._inner = HeadModel(model, coverage, self._tap.features)

    def _inner_drafter(self, options: DrafterOptions, pruning: Pruning) -> Drafter:
        if options.method == "ngram":
            return NgramDrafter(
                options.prompt_lookup_min,
                options.prompt_lookup_max,
                _growth(options.depth, pruning),
                options.branching,
            )
        assert self._inner is not None
        return ModelDrafter(
            self._inner,
            _growth(options.depth, pruning),
            options.branching,
            self._options.draft_temperature,
            self._runner.device,
        )


def _growth(depth: int, pruning: Pruning) -> DepthController:
    return DepthController(depth) if pruning == "dynamic" else FullGrowth(depth)
