# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Scales and zero points of groups of weights: minimum and maximum, and half-quadratic (HQQ).

Groups are the slices of a float32 matrix x along `dim`; scales and zero points, float32 too, have
size 1 there.

HQQ follows Badri & Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023).
It minimises the l_p norm (p < 1, which forgives outliers) of the error r = W - (q - z) s by
half-quadratic splitting. An auxiliary error e takes over the large part of r,

    e = argmin |e|^p + beta/2 (r - e)^2  ~  sign(r) max(|r| - |r|^(p-1) / beta, 0),

and the parameters are then fitted to W - e by least squares, while beta grows by kappa.
Two choices differ from the paper, because the kernels take integer zero points:

* The paper keeps s and fits z. With an integer z, round(W/s + z) - z does not depend on z except
  at the clipped ends, and the fitted z rounds back to the one of RTN. So z is kept and s is
  fitted: s <- s + sum(d (r - e)) / sum(d^2) with d = q - z, over-relaxed (HQQ_STEP).
* Errors are measured in half steps, so that the largest rounding error is 1. The shrinkage then
  acts alike on weights of every magnitude.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vllm_subspec.weights.quantized_weight import QuantFormat

LP_NORM = 0.7
HQQ_BETA = 10.0
HQQ_KAPPA = 1.01
# One iteration goes four steps' length and there are five of them: the result of the paper's 20
# steps at a quarter of the cost. Not more: from there the norm still falls, but at 2 bits the model
# gets worse (pystd-6m, KL divergence: RTN 0.244, 20 plain steps 0.236, twice as far 0.37).
HQQ_STEP = 4.0
HQQ_ITERATIONS = 5


def min_max_parameters(
    x: Tensor, fmt: QuantFormat, scale_dtype: torch.dtype, dim: int
) -> tuple[Tensor, Tensor]:
    """RTN's scale and zero point (float32, rounded) of every group along `dim` of x."""
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)  # aminmax is far slower
    if not bool((low.isfinite() & high.isfinite()).all()):
        raise ValueError("the weight holds infinities or NaN and cannot be quantised")
    if fmt.symmetric:
        # Each half of the range on its own: the sum of both may overflow float32.
        half = fmt.max_code / 2
        scale = torch.maximum(high, -low) / half
    else:
        # The range includes 0, so that the zero point is itself a code.
        low, high = low.clamp_max_(0.0), high.clamp_min_(0.0)
        scale = high / fmt.max_code - low / fmt.max_code
    # A group of zeros, or of numbers too small for the scale's type, gets a harmless scale.
    scale = scale.clamp_min_(torch.finfo(scale_dtype).tiny).to(scale_dtype).float()
    if not bool(scale.isfinite().all()):
        raise ValueError(f"the weight is too large for scales of type {scale_dtype}")
    if fmt.symmetric:
        return scale, torch.full_like(scale, float(1 << (fmt.bits - 1)))
    return scale, (-low / scale).round_().clamp_(0.0, float(fmt.max_code))


def nearest_steps(x: Tensor, scale: Tensor, zero: Tensor, fmt: QuantFormat) -> Tensor:
    """d = code - zero nearest to x / scale, as float32."""
    d = (x / scale).round_()
    return torch.clamp(d, -zero, fmt.max_code - zero, out=d)


def _lp_error(x: Tensor, scale: Tensor, zero: Tensor, fmt: QuantFormat, dim: int) -> Tensor:
    """Sum over each group of |x - d scale|**LP_NORM."""
    error = torch.addcmul(x, nearest_steps(x, scale, zero, fmt), scale, value=-1.0)
    return error.abs_().log_().mul_(LP_NORM).exp_().sum(dim, keepdim=True)


def _keep_scale(
    x: Tensor, scale: Tensor, zero: Tensor, fmt: QuantFormat, scale_dtype: torch.dtype, dim: int
) -> Tensor:
    """RTN: the min-max scale as it is."""
    return scale


def _half_quadratic_scale(
    x: Tensor, scale: Tensor, zero: Tensor, fmt: QuantFormat, scale_dtype: torch.dtype, dim: int
) -> Tensor:
    """HQQ: the better of `scale` and the half-quadratic fit that starts from it."""
    x_steps = x / scale
    ratio = torch.ones_like(scale)
    best_ratio = ratio.clone()
    best_error = torch.full_like(scale, float("inf"))
    low, high = -zero, fmt.max_code - zero
    d, r, m, t = (torch.empty_like(x) for _ in range(4))
    beta = HQQ_BETA
    for _ in range(HQQ_ITERATIONS):
        torch.mul(x_steps, ratio.reciprocal(), out=d).round_()
        torch.clamp(d, low, high, out=d)
        torch.addcmul(x_steps, d, ratio, value=-1.0, out=r)
        # |r|^(p-1); pow() itself takes five times as long as exp and log.
        torch.abs(r, out=m).clamp_min_(1e-10)
        torch.log(m, out=t).mul_(LP_NORM - 1.0).exp_()
        error = m.mul_(t).sum(dim, keepdim=True)
        better = error < best_error
        best_ratio = torch.where(better, ratio, best_ratio)
        best_error = torch.minimum(error, best_error)
        if not bool(better.any()):
            break
        # In half steps r is twice as large: r - e = sign(r) min(|r|, |2r|^(p-1) / (2 beta)).
        t.mul_(2.0 ** (LP_NORM - 2.0) / beta)
        torch.minimum(r, t, out=r)
        torch.maximum(r, t.neg_(), out=r)
        numerator = r.mul_(d).sum(dim, keepdim=True)
        denominator = d.mul_(d).sum(dim, keepdim=True)
        moved = (ratio + HQQ_STEP * numerator / denominator.clamp_min_(1.0)).clamp_min_(0.1)
        # A group whose error no longer falls stays: its result depends on no other group.
        ratio = torch.where(better, moved, ratio)
        beta *= HQQ_KAPPA**HQQ_STEP
    fitted = (best_ratio * scale).clamp_min_(torch.finfo(scale_dtype).tiny)
    fitted = fitted.to(scale_dtype).float()
    improved = _lp_error(x, fitted, zero, fmt, dim) < _lp_error(x, scale, zero, fmt, dim)
    return torch.where(improved & fitted.isfinite(), fitted, scale)


_ScaleSearch = Callable[[Tensor, Tensor, Tensor, "QuantFormat", torch.dtype, int], Tensor]
SCALE_SEARCH: dict[str, _ScaleSearch] = {
    "hqq": _half_quadratic_scale,
    "rtn": _keep_scale,
}
