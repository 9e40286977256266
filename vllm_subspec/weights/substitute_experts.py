# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Low-bit stand-ins of fused experts: a substitute kernel for each matrix of each expert.

The router stays the target's. Of a draft's few tokens each asks a few experts, so these are
computed one after another, each for the tokens that ask it.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe.activation import MoEActivation, apply_moe_activation
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.layers.fused_moe.runner.shared_experts import SharedExperts

from vllm_subspec.weights.kernels import SubstituteKernel


class SubstituteExperts(nn.Module):
    """The experts of one layer.

    Args:
        gate_up: of each expert, [2 * intermediate, hidden].
        down: of each expert, [hidden, intermediate].
    """

    def __init__(
        self, gate_up: Sequence[SubstituteKernel], down: Sequence[SubstituteKernel]
    ) -> None:
        super().__init__()
        self.gate_up = nn.ModuleList(gate_up)
        self.down = nn.ModuleList(down)

    def forward(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        chosen: torch.Tensor,
        activation: MoEActivation,
    ) -> torch.Tensor:
        """The weighted sum of the chosen experts' outputs, [tokens, hidden] as ``x``.

        Args:
            weights: [tokens, top_k], of the chosen experts.
            chosen: [tokens, top_k], their numbers.
        """
        out = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            rows, places = (chosen == expert).nonzero(as_tuple=True)
            gate_up = self.gate_up[expert](x[rows])
            hidden = gate_up.new_empty(len(rows), gate_up.shape[1] // 2)
            apply_moe_activation(activation, hidden, gate_up)
            share = weights[rows, places].to(x.dtype).unsqueeze(1)
            out.index_add_(0, rows, self.down[expert](hidden) * share)
        return out


Substitute = SubstituteKernel | SubstituteExperts


class SubstituteExpertsMethod(FusedMoEMethodBase):
    """Computes experts with their substitutes; routing and reduction stay around it."""

    def __init__(self, experts: RoutedExperts, substitute: SubstituteExperts) -> None:
        super().__init__(experts.moe_config)
        self._substitute = substitute

    def create_weights(self, layer: nn.Module, *args: object, **kwargs: object) -> None:
        raise TypeError("a substitute is made from loaded weights, it cannot create any")

    def get_fused_moe_quant_config(self, layer: nn.Module) -> None:
        """It asks no fused kernel of vLLM's."""

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: nn.Module | None,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """``x`` ``[tokens, hidden]`` -> the same. Shared experts have run before (`detach`)."""
        return cast(torch.Tensor, self._substitute(x, topk_weights, topk_ids, layer.activation))


def stand_in(copy: nn.Module, substitute: SubstituteExperts) -> None:
    """Make ``copy``, a shallow copy of experts, compute with ``substitute``."""
    assert isinstance(copy, RoutedExperts)
    for name in ("w13_weight", "w2_weight"):
        copy._parameters.pop(name)
    copy._modules.pop("quant_method")  # vLLM's own is a module, too
    copy.quant_method = SubstituteExpertsMethod(copy, substitute)


def detach(copy: nn.Module) -> None:
    """Loosen a shallow copy of a container of experts from the target; others stay as they are.

    vLLM finds the runner to run by name, which is the target's: a copy runs itself. And shared
    experts run before the routed ones, not inside of the target's fused kernel.
    """
    if isinstance(copy, SharedExperts):
        copy._mk_can_overlap_shared_experts = lambda: False
    if not isinstance(copy, MoERunner):
        return

    def forward(
        hidden: torch.Tensor,
        router_logits: torch.Tensor,
        shared_input: torch.Tensor | None,
        input_ids: torch.Tensor | None,
        *named: Any,
    ) -> Any:
        return copy._forward_impl(hidden, router_logits, shared_input, input_ids)

    copy._forward_entry = forward
