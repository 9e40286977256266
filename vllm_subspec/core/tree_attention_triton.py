# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Attention of a tree's nodes over pages, on a GPU.

FlashAttention (arXiv 2205.14135): a program keeps some queries in registers, walks the tiles of K
and V and folds each into a running softmax in float32, so scores never reach memory. The query
heads that share a KV head are rows of one tile, so K and V are read once for all of them. Tiles of
the prefix need no mask. Behind it a tile is 32 slots wide: one word of each query's bitmask.

A draft step has few queries over a long prefix, too few programs for a GPU. Then the tiles of a
sequence are dealt out to several programs and a second kernel combines their partial softmaxes
(flash-decoding, Dao et al. 2023).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor

_WORD = 32  # slots of one word of a bitmask, and of one tile behind the prefix
_LOG2_E = 1.4426950408889634  # the kernels work in powers of two, which GPUs compute faster
_TILE_ROWS = 64  # most rows (queries times query heads of a KV head) of a program
_TILE_SLOTS = 64  # slots of a tile of the prefix
_STAGES = 2  # tiles that are loaded ahead
_TILE_BYTES = 16 << 10  # most bytes of K (and of V) of such a tile: its stages share an SM
_SPLIT_TILES = 4  # fewest tiles that are worth a program of their own
_MOST_SPLITS = 64
LARGEST_HEAD = 256
"""Elements; more do not fit the registers and the shared memory of a program."""


def pack_masks(masks: Sequence[Tensor]) -> Tensor:
    """The rows of several masks as bits.

    Args:
        masks: [queries, slots] bool each, on the CPU.

    Returns:
        [queries of all masks, words] int32 on the CPU: bit j of word w of a row says whether the
        query attends to slot 32 * w + j behind its prefix. As many words as the widest needs.
    """
    words = max((-(-mask.shape[1] // _WORD) for mask in masks), default=0)
    queries = sum(mask.shape[0] for mask in masks)
    packed = np.zeros((queries, 4 * words), np.uint8)
    first = 0
    for mask in masks:
        octets = np.packbits(mask.numpy(), axis=1, bitorder="little")
        packed[first : first + mask.shape[0], : octets.shape[1]] = octets
        first += mask.shape[0]
    return torch.from_numpy(packed.view("<i4"))


@dataclass(frozen=True, eq=False)
class DeviceTrees:
    """The tree rows of a pass on the device, one description for all layers.

    Queries are those of all tree rows in their order, "slots" those behind a request's prefix.
    """

    requests: Tensor
    """[requests, 5] int32: row in the batch, first query, queries, prefix, slots."""
    queries: Tensor
    """[queries, 2] int32: token in the pass, words up to the query's last slot."""
    bits: Tensor
    """[queries, words] int32, see `pack_masks`."""
    most_queries: int
    """Of any request. Known on the host like the next two: they decide the launch."""
    longest_prefix: int
    whole_pass: bool
    """Whether the pass has no queries of other requests."""

    @classmethod
    def upload(
        cls,
        rows: Sequence[int],
        starts: Sequence[int],
        prefixes: Sequence[int],
        masks: Sequence[Tensor],
        device: torch.device,
    ) -> "DeviceTrees":
        """Describes tree rows on ``device`` by a single copy that the host does not wait for.

        Args:
            rows: [requests] in the batch.
            starts: [batch + 1] first query of each request of the batch, and the end.
            prefixes: [requests] slots of each that all its queries attend to.
            masks: [requests] of [queries, slots] bool on the CPU: what each query attends to
                behind the prefix.
            device: of the caches.

        Raises:
            ValueError: a mask does not have a row for each query of its request.
        """
        bits = pack_masks(masks).numpy()
        sizes = [mask.shape[0] for mask in masks]
        firsts = np.cumsum([0, *sizes])
        tokens: list[npt.NDArray[np.int64]] = []
        for row, size in zip(rows, sizes, strict=True):
            if size != starts[row + 1] - starts[row]:
                raise ValueError(
                    f"row {row} has {starts[row + 1] - starts[row]} queries, its mask {size}"
                )
            tokens.append(np.arange(starts[row], starts[row + 1]))
        reach = ((bits != 0) * np.arange(1, bits.shape[1] + 1)).max(axis=1, initial=0)
        slots = [mask.shape[1] for mask in masks]
        requests = np.array([rows, firsts[:-1], sizes, prefixes, slots]).T
        queries = np.stack([np.concatenate(tokens) if tokens else reach, reach], axis=1)
        parts = [array.astype(np.int32) for array in (requests, queries, bits)]
        flat = torch.from_numpy(np.concatenate([part.ravel() for part in parts]))
        if device.type == "cuda":
            flat = flat.pin_memory().to(device, non_blocking=True)
        pieces = flat.split([part.size for part in parts])
        views = [piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)]
        return cls(
            requests=views[0],
            queries=views[1],
            bits=views[2],
            most_queries=max(sizes, default=0),
            longest_prefix=max(prefixes, default=0),
            whole_pass=int(firsts[-1]) == starts[-1],
        )


@triton.jit
def _absorb(  # type: ignore[no-untyped-def]
    q,
    best,
    total,
    summed,
    keys,
    values,
    table,
    positions,
    inside,
    seen,
    scale,
    key_block,
    key_slot,
    key_width,
    value_block,
    value_slot,
    value_width,
    block_size,
    WIDTH: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Fold the K/V at ``positions`` into the running softmax of rows ``q``."""
    block = tl.load(table + positions // block_size, mask=inside, other=0).to(tl.int64)
    slot = positions % block_size
    width = tl.arange(0, TILE_WIDTH)
    k = tl.load(
        keys + (block * key_block + slot * key_slot)[None, :] + (width * key_width)[:, None],
        mask=inside[None, :] & (width < WIDTH)[:, None],
        other=0.0,
    )
    v = tl.load(
        values
        + (block * value_block + slot * value_slot)[:, None]
        + (width * value_width)[None, :],
        mask=inside[:, None] & (width < WIDTH)[None, :],
        other=0.0,
    )
    if WIDEN:
        k = k.to(tl.float32)
        v = v.to(tl.float32)
    scores = tl.where(seen, tl.dot(q, k, input_precision="ieee") * scale, float("-inf"))
    new_best = tl.maximum(best, tl.max(scores, 1))
    # A row that has seen nothing yet: -inf minus -inf is not a number, -inf minus 0 is.
    base = tl.where(new_best == float("-inf"), 0.0, new_best)
    weights = tl.exp2(scores - base[:, None])
    decay = tl.exp2(best - base)
    total = total * decay + tl.sum(weights, 1)
    summed = summed * decay[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    return new_best, total, summed


@triton.jit(do_not_specialize=["tiles", "words", "splits", "all_queries"])
def _attend(  # type: ignore[no-untyped-def]
    query,
    keys,
    values,
    table,
    requests,
    queries,
    bits,
    out,
    partial,
    scale,
    query_token,
    query_head,
    key_block,
    key_slot,
    key_head,
    key_width,
    value_block,
    value_slot,
    value_head,
    value_width,
    table_row,
    out_token,
    out_head,
    block_size,
    tiles,
    words,
    splits,
    all_queries,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_SLOTS: tl.constexpr,
    SPLIT: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """A tile of one request's queries, for one KV head, over one share of its slots."""
    request = requests + tl.program_id(0) // tiles * 5
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    row = tl.load(request)
    first_query = tl.load(request + 1)
    count = tl.load(request + 2)
    prefix = tl.load(request + 3)
    slots = tl.load(request + 4)

    AT_ONCE: tl.constexpr = TILE_ROWS // GROUP
    start = tl.program_id(0) % tiles * AT_ONCE
    if start >= count:  # the grid is as wide as the request of most queries needs
        return
    rows = tl.arange(0, TILE_ROWS)
    number = start + rows // GROUP
    alive = (number < count) & (rows < AT_ONCE * GROUP)
    number += first_query
    token = tl.load(queries + 2 * number, mask=alive, other=0).to(tl.int64)
    reach = tl.load(queries + 2 * number + 1, mask=alive, other=0)
    head = kv_head * GROUP + rows % GROUP
    width = tl.arange(0, TILE_WIDTH)
    stored = alive[:, None] & (width < WIDTH)[None, :]
    q = tl.load(
        query + (token * query_token + head * query_head)[:, None] + width[None, :],
        mask=stored,
        other=0.0,
    )
    if WIDEN:
        q = q.to(tl.float32)

    keys += kv_head.to(tl.int64) * key_head
    values += kv_head.to(tl.int64) * value_head
    table += row.to(tl.int64) * table_row
    best = tl.full([TILE_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([TILE_ROWS], tl.float32)
    summed = tl.zeros([TILE_ROWS, TILE_WIDTH], tl.float32)
    prefix_tiles = tl.cdiv(prefix, TILE_SLOTS)
    all_tiles = prefix_tiles + tl.max(reach, 0)
    share = tl.cdiv(all_tiles, splits)
    begin = split * share
    end = tl.minimum(begin + share, all_tiles)

    for tile in range(begin, tl.minimum(end, prefix_tiles)):
        positions = tile * TILE_SLOTS + tl.arange(0, TILE_SLOTS)
        inside = positions < prefix
        best, total, summed = _absorb(
            q,
            best,
            total,
            summed,
            keys,
            values,
            table,
            positions,
            inside,
            inside[None, :],
            scale,
            key_block,
            key_slot,
            key_width,
            value_block,
            value_slot,
            value_width,
            block_size,
            WIDTH,
            TILE_WIDTH,
            WIDEN,
        )
    for word in range(tl.maximum(begin - prefix_tiles, 0), end - prefix_tiles):
        bit = tl.arange(0, 32)
        marks = tl.load(bits + number * words + word, mask=alive, other=0)
        seen = ((marks[:, None] >> bit[None, :]) & 1) != 0
        behind = word * 32 + bit
        best, total, summed = _absorb(
            q,
            best,
            total,
            summed,
            keys,
            values,
            table,
            prefix + behind,
            behind < slots,
            seen,
            scale,
            key_block,
            key_slot,
            key_width,
            value_block,
            value_slot,
            value_width,
            block_size,
            WIDTH,
            TILE_WIDTH,
            WIDEN,
        )

    if SPLIT:
        heads = tl.num_programs(1) * GROUP
        place = (split * all_queries + number) * heads + head
        base = partial + place.to(tl.int64) * (WIDTH + 2)
        tl.store(base, best, mask=alive)
        tl.store(base + 1, total, mask=alive)
        tl.store(base[:, None] + 2 + width[None, :], summed, mask=stored)
    else:
        result = summed / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(
            out + (token * out_token + head * out_head)[:, None] + width[None, :],
            result.to(out.dtype.element_ty),
            mask=stored,
        )


@triton.jit(do_not_specialize=["splits", "all_queries"])
def _combine(  # type: ignore[no-untyped-def]
    partial,
    queries,
    out,
    out_token,
    out_head,
    splits,
    all_queries,
    WIDTH: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
):
    """One query of one head: the partial softmaxes of its splits as one."""
    number = tl.program_id(0)
    head = tl.program_id(1)
    width = tl.arange(0, TILE_WIDTH)
    inside = width < WIDTH
    best = float("-inf")
    total = 0.0
    summed = tl.zeros([TILE_WIDTH], tl.float32)
    for split in range(splits):
        place = (split * all_queries + number) * tl.num_programs(1) + head
        base = partial + place.to(tl.int64) * (WIDTH + 2)
        share_best = tl.load(base)
        new_best = tl.maximum(best, share_best)
        level = tl.where(new_best == float("-inf"), 0.0, new_best)
        decay = tl.exp2(best - level)
        gain = tl.exp2(share_best - level)
        total = total * decay + tl.load(base + 1) * gain
        summed = summed * decay + tl.load(base + 2 + width, mask=inside, other=0.0) * gain
        best = new_best
    token = tl.load(queries + 2 * number).to(tl.int64)
    result = summed / tl.where(total == 0.0, 1.0, total)
    tl.store(
        out + token * out_token + head * out_head + width,
        result.to(out.dtype.element_ty),
        mask=inside,
    )


# Triton's interpreter holds bfloat16 as 16-bit integers and its dot multiplies those, silently.
_INTERPRETED = not isinstance(_attend, triton.JITFunction)


@dataclass(frozen=True)
class Launch:
    """Sizes of a launch of the kernel, from what the host knows."""

    tile_rows: int
    tile_slots: int
    tile_width: int
    tiles: int
    """Of the queries of a request."""
    warps: int

    @classmethod
    def of(cls, most_queries: int, group: int, width: int, element_size: int) -> "Launch":
        """For requests of up to ``most_queries`` queries, each of ``group`` query heads of
        ``width`` elements per KV head."""
        tile_width = triton.next_power_of_2(max(width, 16))
        most_rows = max(_TILE_ROWS, triton.next_power_of_2(group))
        tile_rows = min(max(16, triton.next_power_of_2(most_queries * group)), most_rows)
        # 16: the narrowest operand of tl.dot.
        tile_slots = max(16, min(_TILE_SLOTS, _TILE_BYTES // (tile_width * element_size)))
        return cls(
            tile_rows,
            tile_slots,
            tile_width,
            triton.cdiv(most_queries, tile_rows // group),
            warps=8 if tile_rows * tile_width >= _TILE_ROWS * LARGEST_HEAD else 4,
        )


def _splits(programs: int, tiles: int, device: torch.device) -> int:
    """Programs that share the ``tiles`` of a sequence, so that two run on each multiprocessor."""
    if device.type != "cuda":
        return 1
    wanted = 2 * torch.cuda.get_device_properties(device).multi_processor_count // programs
    return max(1, min(wanted, tiles // _SPLIT_TILES, _MOST_SPLITS))


def attend_paged(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    trees: DeviceTrees,
    scale: float,
    out: Tensor,
    splits: int | None = None,
) -> None:
    """Attention of the tree rows of a pass, whose K/V is in the cache already.

    Each query attends to all slots of its request's prefix and behind it to those that its bits
    allow. Products take the dtype of the caches, softmax and sums float32; float32 inputs are
    multiplied exactly (no TF32), which takes 140 KB of shared memory for heads of 256. Nothing
    waits for the device. A query that attends to nothing gets zeros.

    Args:
        query: [tokens, heads, head_size] float32, bfloat16 or float16, the last dimension dense;
            query head h belongs to KV head h // (heads / KV heads).
        key_cache, value_cache: [blocks, block_size, KV heads, head_size] of the same dtype, any
            strides.
        block_table: [batch, blocks] int32, the last dimension dense.
        trees: on the device of the caches.
        scale: of the scores.
        out: [tokens, heads, head_size] of any float dtype, the last dimension dense; only the rows
            of ``trees`` are written.
        splits: programs that share a sequence; chosen by its length and the device if None.

    Raises:
        ValueError: head_size is above 256.
    """
    _, heads, width = query.shape
    kv_heads = key_cache.shape[2]
    group = heads // kv_heads
    if width > LARGEST_HEAD:
        raise ValueError(f"head_size is {width}, but tree attention takes {LARGEST_HEAD} at most")
    all_queries, words = trees.bits.shape
    if not all_queries:
        return
    launch = Launch.of(trees.most_queries, group, width, query.element_size())
    grid_rows = trees.requests.shape[0] * launch.tiles
    if splits is None:
        tiles = triton.cdiv(trees.longest_prefix, launch.tile_slots) + words
        splits = _splits(grid_rows * kv_heads, tiles, query.device)
    # Of each split, query and head: its largest score, its sum of weights, its weighted values.
    partial = (
        out
        if splits == 1
        else torch.empty(splits, all_queries, heads, width + 2, device=out.device)
    )
    _attend[grid_rows, kv_heads, splits](
        query,
        key_cache,
        value_cache,
        block_table,
        trees.requests,
        trees.queries,
        trees.bits,
        out,
        partial,
        scale * _LOG2_E,
        *query.stride()[:2],
        *key_cache.stride(),
        *value_cache.stride(),
        block_table.stride(0),
        *out.stride()[:2],
        key_cache.shape[1],
        launch.tiles,
        words,
        splits,
        all_queries,
        GROUP=group,
        WIDTH=width,
        TILE_WIDTH=launch.tile_width,
        TILE_ROWS=launch.tile_rows,
        TILE_SLOTS=launch.tile_slots,
        SPLIT=splits > 1,
        WIDEN=_INTERPRETED,
        num_warps=launch.warps,
        num_stages=_STAGES,
    )
    if splits > 1:
        _combine[all_queries, heads](
            partial,
            trees.queries,
            out,
            *out.stride()[:2],
            splits,
            all_queries,
            WIDTH=width,
            TILE_WIDTH=launch.tile_width,
            num_warps=2,
        )


def move_slots(
    key_cache: Tensor, value_cache: Tensor, sources: Tensor, destinations: Tensor
) -> None:
    """Copy the K/V of some slots to others, in the layout that `attend_paged` reads.

    All sources are read before anything is written, so the two may overlap.

    Args:
        key_cache, value_cache: [blocks, block_size, KV heads, head_size], any strides.
        sources, destinations: [m] int64 on the device of the caches: block number times block_size
            plus offset.
    """
    size = key_cache.shape[1]
    read_at = sources // size, sources % size
    write_at = destinations // size, destinations % size
    for cache in (key_cache, value_cache):
        cache[write_at] = cache[read_at]
