# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Attention of a tree's nodes over pages, on the CPU.

A query attends to the whole committed prefix and, behind it, to what its mask row allows: the root,
its ancestors and itself. The query heads that share a KV head become rows of one product, so K and
V are read once for all of them and are never expanded.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vllm_subspec.core.paged_kv import WidePages
from vllm_subspec.core.tree import TokenTree

# Scores computed at a time: so many float32 stay in a core's L2 cache from product to softmax to
# product.
_SCORES = 1 << 18


@dataclass(frozen=True, eq=False)
class TreeRows:
    """The requests of a pass whose queries attend along the paths of a tree.

    Each query of such a request attends to the ``prefix`` first slots of its sequence and, of the
    slots behind them, to those that its row of the mask allows. Slots are node indices; positions
    (of the rotary embedding) are depths and do not matter here.
    """

    rows: tuple[int, ...]
    """Their indices in the batch, ascending."""
    prefixes: tuple[int, ...]
    """Slots of each that every query attends to: its committed tokens."""
    masks: tuple[Tensor, ...]
    """Of each, [queries, slots behind the prefix] bool on the CPU; the queries are all of the
    request's in this pass. A query's own slot is among those it attends to."""


def verification_mask(tree: TokenTree) -> Tensor:
    """[n + 1, n + 1] bool: what the root and each node of ``tree`` may attend to, of the root and
    the nodes in their order."""
    mask = np.ones((len(tree) + 1, len(tree) + 1), np.bool_)
    mask[0, 1:] = False
    mask[1:, 1:] = tree.ancestor_mask()
    return torch.from_numpy(mask)


def attend(
    query: Tensor, pages: WidePages, mask: Tensor, prefix: int, scale: float, out: Tensor
) -> None:
    """Attention of one sequence's queries: softmax and sums in float32.

    Args:
        query: [n, heads, head_size] of any float dtype.
        pages: of the sequence, loaded up to ``prefix`` + t tokens; heads is a multiple of its
            KV heads, and query head h belongs to KV head h // (heads / KV heads).
        mask: [n, t] bool, which of the t tokens behind the prefix each query attends to. A row
            without any needs a prefix.
        prefix: tokens that every query attends to.
        scale: of the scores.
        out: [n, heads, head_size], written in its own dtype.
    """
    n, heads, width = query.shape
    length = prefix + mask.shape[1]
    keys, values = pages.keys(length), pages.values(length)
    kv_heads = keys.shape[0]
    group = heads // kv_heads
    rows = query.view(n, kv_heads, group, width).permute(1, 2, 0, 3).float() * scale
    rows = rows.reshape(kv_heads, group * n, width)
    places = out.view(n, kv_heads, group, width).permute(1, 2, 0, 3)
    hidden = ~mask
    at_once = max(torch.get_num_threads(), _SCORES // (group * n * length))
    for first in range(0, kv_heads, at_once):
        some = slice(first, first + at_once)
        scores = torch.bmm(rows[some], keys[some])
        scores.unflatten(1, (group, n))[..., prefix:].masked_fill_(hidden, -torch.inf)
        summed = torch.bmm(torch.softmax(scores, dim=-1), values[some])
        places[some] = summed.unflatten(1, (group, n)).to(out.dtype)


def attend_batch(
    query: Tensor,
    cache: Tensor,
    block_table: Tensor,
    starts: Sequence[int],
    trees: TreeRows,
    scale: float,
    pages: WidePages,
    out: Tensor,
) -> None:
    """Attention of the tree rows of a batch, whose K/V is in ``cache`` already.

    Args:
        query: [tokens, heads, head_size] of the whole batch.
        cache: [blocks, KV heads, block_size, 2 * head_size] of the layer.
        block_table: [requests, blocks] int, on the CPU.
        starts: [requests + 1] first query of each request, and the end.
        trees: which requests attend to what.
        scale: of the scores.
        pages: scratch.
        out: [tokens, heads, head_size]; the queries of other requests are left as they are.
    """
    size = cache.shape[2]
    for row, prefix, mask in zip(trees.rows, trees.prefixes, trees.masks, strict=True):
        own = slice(starts[row], starts[row + 1])
        used = -(-(prefix + mask.shape[1]) // size)
        pages.load(cache, block_table[row, :used].tolist())
        attend(query[own], pages, mask, prefix, scale, out[own])
