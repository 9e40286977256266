# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Decoding the packed tensors of compressed-tensors, GPTQ and AWQ checkpoints.

Every format stores unsigned codes in int32 words, low bits first, and differs in which axis is
packed, in the order within a word, and in what it calls a zero point. Each decoder takes one
linear's tensors by suffix and returns its QuantizedWeight; a ValueError says what is unsupported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vllm_subspec.weights.quantized_weight import SUPPORTED_BITS, QuantFormat, QuantizedWeight

# Nibble i of an AWQ word holds column AWQ_ORDER[i] of its eight (AutoAWQ's "gemm" layout).
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def packed_width(count: int, bits: int, dense: bool) -> int:
    """Words that hold `count` codes; dense: codes may straddle words (differs at 3 bits only)."""
    return -(-count * bits // 32) if dense else -(-count // (32 // bits))


def unpack(words: Tensor, bits: int, count: int, dense: bool = True) -> Tensor:
    """Unsigned codes, uint8 [R, count], of int32 words [R, W] packed along the last axis."""
    if words.shape[-1] != packed_width(count, bits, dense):
        raise ValueError(
            f"{words.shape[-1]} words cannot hold {count} codes of {bits} bits per row"
        )
    mask = (1 << bits) - 1
    if dense and 32 % bits:
        first_bit = torch.arange(count, device=words.device) * bits
        word, shift = first_bit // 32, first_bit % 32
        low = words.long() & 0xFFFFFFFF
        following = torch.nn.functional.pad(low[:, 1:], (0, 1))
        pair = (low | following << 32)[:, word]
        return ((pair >> shift) & mask).to(torch.uint8)
    per_word = 32 // bits
    codes = torch.empty(*words.shape, per_word, dtype=torch.uint8, device=words.device)
    for i in range(per_word):
        codes[..., i] = (words >> (bits * i)) & mask
    return codes.flatten(1)[:, :count].contiguous()


def _finish(codes: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> QuantizedWeight:
    columns, groups = codes.shape[1], scales.shape[1]
    if groups == 0 or columns % groups:
        raise ValueError(f"{groups} groups do not divide {columns} columns")
    symmetric = bool((zeros == 1 << (bits - 1)).all())
    fmt = QuantFormat(bits, -1 if groups == 1 else columns // groups, symmetric)
    return QuantizedWeight(codes, scales, zeros, fmt)


def _require_identity_order(g_idx: Tensor | None, groups: int) -> None:
    if g_idx is None:
        return
    order = torch.arange(len(g_idx), device=g_idx.device) // (len(g_idx) // groups)
    if not torch.equal(g_idx.long(), order):
        raise ValueError(
            "its columns are reordered by activation (desc_act), which no substitute kernel "
            "follows: use a checkpoint made with desc_act=False"
        )


def decode_compressed_tensors(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> QuantizedWeight:
    """`pack-quantized`: codes packed along columns, zero points along rows.

    The bits follow from the shapes, so that several config groups may coexist. 3-bit codes occur
    both padded (ten a word, compressed-tensors 0.17) and dense (what vLLM 0.32 reads).
    """
    packed, scales = tensors["weight_packed"], tensors["weight_scale"]
    rows, columns = (int(n) for n in tensors["weight_shape"])
    layouts = [
        (bits, dense)
        for bits in SUPPORTED_BITS
        for dense in (False, True)
        if packed.shape == (rows, packed_width(columns, bits, dense))
    ]
    if not layouts:
        raise ValueError(
            f"weight_packed of shape {tuple(packed.shape)} is not a {rows} x {columns} weight of "
            f"{SUPPORTED_BITS} bits"
        )
    bits, dense = layouts[0]
    _require_identity_order(tensors.get("weight_g_idx"), scales.shape[1])
    codes = unpack(packed, bits, columns, dense)
    if "weight_zero_point" in tensors:
        zeros = unpack(tensors["weight_zero_point"].t(), bits, rows, dense).t().contiguous()
    else:
        zeros = torch.full(scales.shape, 1 << (bits - 1), dtype=torch.uint8, device=packed.device)
    return _finish(codes, scales, zeros, bits)


def decode_gptq(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> QuantizedWeight:
    """GPTQ: codes packed along columns of the transposed weight, zero points along its rows.

    In the first version of the format (`checkpoint_format` absent or "gptq") a zero point is
    stored less one, modulo 2**bits; in "gptq_v2" as it is.
    """
    version = config.get("checkpoint_format") or "gptq"
    if version not in ("gptq", "gptq_v2"):
        raise ValueError(f'checkpoint_format "{version}" is not "gptq" or "gptq_v2"')
    scales = tensors["scales"].t().contiguous()
    rows, groups = scales.shape
    bits = tensors["qzeros"].shape[1] * 32 // rows
    if bits not in SUPPORTED_BITS:
        raise ValueError(f"{bits} bits are not one of {SUPPORTED_BITS}")
    _require_identity_order(tensors.get("g_idx"), groups)
    words = tensors["qweight"].t().contiguous()
    codes = unpack(words, bits, words.shape[1] * 32 // bits)
    zeros = unpack(tensors["qzeros"], bits, rows).t().contiguous()
    if version == "gptq":
        zeros = (zeros + 1) & ((1 << bits) - 1)
    return _finish(codes, scales, zeros, bits)


def decode_awq(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> QuantizedWeight:
    """AWQ "gemm": the transposed weight, its columns packed eight to a word in AWQ_ORDER."""
    version = str(config.get("version", "gemm")).lower()
    if version != "gemm" or config.get("bits", config.get("w_bit", 4)) != 4:
        raise ValueError(f'only 4-bit AWQ of version "gemm" is supported, not "{version}"')
    scales = tensors["scales"].t().contiguous()
    rows = scales.shape[0]
    position = torch.argsort(torch.tensor(AWQ_ORDER))

    def transposed(words: Tensor) -> Tensor:
        nibbles = unpack(words, 4, rows).view(len(words), -1, 8)
        return nibbles[..., position].flatten(1).t().contiguous()

    return _finish(transposed(tensors["qweight"]), scales, transposed(tensors["qzeros"]), 4)
