# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""The draft: the target's module tree with low-bit substitutes in place of some linears.

Only the containers on the way to a replaced linear are copied, shallowly; everything else (every
Attention object and with it the KV pages, norms, rotary tables, embeddings, the head, resident
layers) is the target's own object. Nothing of the target changes, and dropping the draft is enough
to undo it.
"""

from collections.abc import Mapping
from typing import cast

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase

from vllm_subspec.weights.fused_norm import FusedRMSNorm
from vllm_subspec.weights.kernels import SubstituteKernel


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


def build_draft(target: nn.Module, substitutes: Mapping[nn.Module, SubstituteKernel]) -> nn.Module:
    """The target's tree with ``substitutes``, a kernel for each replaced linear of the target."""
    if not substitutes:
        raise ValueError("a draft without substitutes would be the target itself")
    draft, replaced = _clone(target, substitutes)
    if replaced != len(substitutes):
        raise ValueError(
            f"{len(substitutes) - replaced} of {len(substitutes)} substitutes belong to no linear "
            "of this model"
        )
    return draft


def _clone(
    module: nn.Module, substitutes: Mapping[nn.Module, SubstituteKernel]
) -> tuple[nn.Module, int]:
    """``module`` itself if nothing below it is replaced, else a copy; and how many are."""
    if module in substitutes:
        return _substitute(cast(LinearBase, module), substitutes[module]), 1
    children = {
        name: _clone(child, substitutes)
        for name, child in module._modules.items()
        if child is not None
    }
    replaced = sum(count for _, count in children.values())
    if not replaced:
        return module, 0
    copy = _shallow(module)
    for name, (child, _) in children.items():
        copy._modules[name] = FusedRMSNorm(child) if FusedRMSNorm.replaces(child) else child
    return copy, replaced


def _substitute(linear: LinearBase, kernel: SubstituteKernel) -> nn.Module:
    copy = cast(LinearBase, _shallow(linear))
    copy._parameters.pop("weight")
    copy.quant_method = SubstituteLinearMethod(kernel)
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
