# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""RMSNorm in one kernel, for the draft on a CPU.

vLLM's eager RMSNorm is nine small operations there, which in a draft step of one token cost more
than their arithmetic. The target keeps its own.
"""

import torch
from torch import nn
from vllm.model_executor.layers.layernorm import RMSNorm


class FusedRMSNorm(nn.Module):
    """Computes what ``norm`` does, with ``norm``'s own weight [hidden]."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.weight: nn.Parameter = norm.weight
        self._eps: float = norm.variance_epsilon

    @staticmethod
    def replaces(module: nn.Module) -> bool:
        """Whether ``module`` is a plain RMSNorm on a CPU that has the kernels."""
        if type(module) is not RMSNorm or not hasattr(torch.ops._C, "fused_add_rms_norm"):
            return False
        plain = module.has_weight and module.variance_size_override is None
        return bool(plain and module.weight.device.type == "cpu")

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """``x`` [..., hidden], normed; with ``residual``, their sum normed, and the sum itself.

        With ``residual`` both tensors are overwritten.
        """
        x = x.contiguous()
        if residual is not None:
            torch.ops._C.fused_add_rms_norm(x, residual, self.weight.data, self._eps)
            return x, residual
        out = torch.empty_like(x)
        torch.ops._C.rms_norm(out, x, self.weight.data, self._eps)
        return out
