# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Full-precision linears over a plain weight: one that lies in a buffer which will be refilled.

Fast kernels repack a weight into memory of their own and cannot be pointed at a ring slot. On the
CPU the storage order of the weight in the slot, and the call, are chosen to lose little by that
(one thread, Cascade Lake, 2048 x 2048, speed-up over vLLM's packed oneDNN kernel):

    weight      CPU                 order      call                          M=1    M=33   M=65
    float32     any                 [out, in]  oneDNN on the plain weight    1.0    0.9    0.9
    bfloat16    without bf16 units  [in, out]  float32 blocks, see below     0.9    2.6    3.2
    bfloat16    with bf16 units     [out, in]  oneDNN on the plain weight    not measured

Without bf16 units a bf16 matrix product runs at a quarter of float32's speed. So blocks of the
weight are widened into a small float32 scratch that stays in cache, and multiplied there: the same
products as bf16 hardware makes, summed in float32.
"""

import torch
from torch.nn import functional
from vllm.utils.torch_utils import direct_register_custom_op

# Elements of the float32 scratch: 1 MiB, small enough for L2.
_SCRATCH = 1 << 18
# Fewer rows than this do not repay the widening of the weight.
_WIDEN_FROM = 3


def stores_transposed(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether weights [out, in] of this type are kept as [in, out] for this device."""
    return (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and not torch.cpu._is_avx512_bf16_supported()
        and not torch.cpu._is_amx_tile_supported()
    )


def plain_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """``x`` [..., in] times ``weight`` [out, in], plus ``bias`` [out]; of ``x``'s type.

    ``weight`` may be the transpose of a contiguous [in, out] matrix (`stores_transposed`).
    """
    if x.device.type != "cpu":
        return functional.linear(x, weight, bias)
    return torch.ops.vllm.subspec_plain_linear(x, weight, bias)


def _plain_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1])
    if weight.is_contiguous():
        out = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    elif rows.shape[0] < _WIDEN_FROM:
        out = torch.mm(rows, weight.t())
        out = out if bias is None else out + bias
    else:
        out = _widened(rows, weight.t(), bias)
    return out.view(*x.shape[:-1], weight.shape[0])


def _widened(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``x`` [m, in] times ``weight`` [in, out], both bf16, in float32."""
    inner, outer = weight.shape
    block = max(32, _SCRATCH // outer // 32 * 32)
    scratch = torch.empty(min(block, inner), outer, dtype=torch.float32)
    out = torch.zeros(x.shape[0], outer, dtype=torch.float32)
    wide = x.float()
    for start in range(0, inner, block):
        part = weight[start : start + block]
        out.addmm_(wide[:, start : start + block], scratch[: part.shape[0]].copy_(part))
    if bias is not None:
        out += bias
    return out.to(x.dtype)


def _plain_linear_shape(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


direct_register_custom_op(
    "subspec_plain_linear", _plain_linear, mutates_args=[], fake_impl=_plain_linear_shape
)
