# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""The draft: the target's module tree with low-bit substitutes in place of some linears and
experts.

Only the containers on the way to a replaced module are copied, shallowly; everything else (every
Attention object and with it the KV pages, norms, rotary tables, embeddings, the head, resident
layers) is the target's own object. Nothing of the target changes, and dropping the draft is enough
to undo it.
"""

from collections.abc import Mapping

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearMethodBase

from vllm_subspec.weights.fused_norm import FusedRMSNorm
from vllm_subspec.weights.kernels import SubstituteKernel
from vllm_subspec.weights.substitute_experts import (
    Substitute,
    SubstituteExperts,
    detach,
    stand_in,
)


class SubstituteLinearMethod(LinearMethodBase):
    """Computes a linear with a substitute kernel; the module around it keeps its TP semantics."""

    def __init__(self, kernel: SubstituteKernel) -> None:
        self.kernel = kernel

    def create_weights(self, layer: nn.Module, *args: object, **kwargs: object) -> None:
        raise TypeError("a substitute is made from a loaded weight, it cannot create one")

    def apply(
        self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``x`` ``[..., in]`` -> ``[..., out]`` of the same dtype."""
        if x.dim() == 2:
            return self.kernel(x, bias)
        rows = x.reshape(-1, x.shape[-1])
        return self.kernel(rows, bias).view(*x.shape[:-1], -1)


def build_draft(target: nn.Module, substitutes: Mapping[nn.Module, Substitute]) -> nn.Module:
    """The target's tree with ``substitutes``, by the linear or experts that they stand in for."""
    if not substitutes:
        raise ValueError("a draft without substitutes would be the target itself")
    made: dict[nn.Module, nn.Module] = {}
    draft = _clone(target, substitutes, made)
    if strange := substitutes.keys() - made.keys():
        raise ValueError(
            f"{len(strange)} of {len(substitutes)} substitutes belong to no module of this model"
        )
    return draft


def _clone(
    module: nn.Module,
    substitutes: Mapping[nn.Module, Substitute],
    made: dict[nn.Module, nn.Module],
) -> nn.Module:
    """``module`` itself if nothing below it is replaced, else a copy.

    Args:
        made: what each module has become; a module may have several parents.
    """
    if module not in made:
        made[module] = _cloned(module, substitutes, made)
    return made[module]


def _cloned(
    module: nn.Module,
    substitutes: Mapping[nn.Module, Substitute],
    made: dict[nn.Module, nn.Module],
) -> nn.Module:
    if module in substitutes:
        return _substitute(module, substitutes[module])
    children = {
        name: _clone(child, substitutes, made)
        for name, child in module._modules.items()
        if child is not None
    }
    if all(child is module._modules[name] for name, child in children.items()):
        return module
    copy = _shallow(module)
    for name, child in children.items():
        copy._modules[name] = FusedRMSNorm(child) if FusedRMSNorm.replaces(child) else child
    detach(copy)
    return copy


def _substitute(module: nn.Module, substitute: Substitute) -> nn.Module:
    copy = _shallow(module)
    if isinstance(substitute, SubstituteExperts):
        stand_in(copy, substitute)
    else:
        copy._parameters.pop("weight")
        copy.quant_method = SubstituteLinearMethod(substitute)
    return copy


def _shallow(module: nn.Module) -> nn.Module:
    """A module of the same class and attributes with registries of its own.

    Hooks and an instance's own ``forward`` are left behind: those are how offloaders bind a module
    to its streamed weights.
    """
    copy = module.__new__(type(module))
    copy.__dict__ = {k: v for k, v in module.__dict__.items() if k != "forward"}
    for registry in ("_parameters", "_buffers", "_modules"):
        copy.__dict__[registry] = dict(module.__dict__[registry])
    fresh = nn.Module()
    for key in fresh.__dict__:
        if key.endswith("_hooks") or "_hooks_" in key:
            copy.__dict__[key] = fresh.__dict__[key]
    return copy
