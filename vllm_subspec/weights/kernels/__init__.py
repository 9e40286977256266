# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""How a substitute linear computes on this device."""

from vllm_subspec.weights.kernels.base import SubstituteKernel
from vllm_subspec.weights.kernels.choice import choose, estimate_nbytes

__all__ = ["SubstituteKernel", "choose", "estimate_nbytes"]
