# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.unit.trees import token_trees
from vllm_subspec.core.paged_kv import BlockLayout, WidePages, WritePages
from vllm_subspec.core.tree import TokenTree
from vllm_subspec.core.tree_attention import TreeRows, attend, attend_batch, verification_mask

BLOCK, HEAD = 4, 8


def writer(keys: Tensor, values: Tensor) -> WritePages:
    """Writes pages of a layout, token by token."""

    def write(key: Tensor, value: Tensor, cache: Tensor, slots: Tensor) -> None:
        size = cache.shape[2]
        halves = cache.view(cache.shape[0], cache.shape[1], 2, -1)
        for token, slot in enumerate(slots.tolist()):
            for head in range(cache.shape[1]):
                halves[slot // size, head, 0, keys[slot % size]] = key[token, head]
                halves[slot // size, head, 1, values[slot % size]] = value[token, head]

    return write


PLAIN = torch.arange(BLOCK * HEAD).view(BLOCK, HEAD)
TRANSPOSED = torch.arange(BLOCK * HEAD).view(HEAD, BLOCK).T.contiguous()
SHUFFLED = torch.randperm(BLOCK * HEAD, generator=torch.Generator().manual_seed(0)).view_as(PLAIN)
LAYOUTS = {
    "transposed keys": BlockLayout(TRANSPOSED, PLAIN),
    "packed": BlockLayout(SHUFFLED, SHUFFLED.flip(0)),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", LAYOUTS)
def test_learnt_layout_is_the_one_written(name: str, dtype: torch.dtype) -> None:
    layout = LAYOUTS[name]
    learnt = BlockLayout.learn(writer(layout.keys, layout.values), BLOCK, HEAD, dtype)
    assert torch.equal(learnt.keys, layout.keys)
    assert torch.equal(learnt.values, layout.values)


def test_pages_that_lose_elements_are_refused() -> None:
    with pytest.raises(ValueError, match="each element"):
        BlockLayout.learn(writer(PLAIN // 2, PLAIN), BLOCK, HEAD, torch.float32)
    with pytest.raises(ValueError, match="K half"):
        BlockLayout(PLAIN // 2, PLAIN)


def pages_of(
    layout: BlockLayout, tokens: int, kv_heads: int, rows: int, seed: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A cache with random K/V [rows, tokens, kv_heads, HEAD] in blocks of random order; the K/V and
    the block table."""
    noise = torch.Generator().manual_seed(seed)
    blocks = -(-tokens // BLOCK)
    table = torch.randperm(rows * blocks, generator=noise).view(rows, blocks)
    key, value = torch.randn(2, rows, tokens, kv_heads, HEAD, generator=noise).to(dtype)
    cache = torch.zeros(rows * blocks, kv_heads, BLOCK, 2 * HEAD, dtype=dtype)
    write = writer(layout.keys, layout.values)
    for row in range(rows):
        places = torch.arange(tokens)
        write(key[row], value[row], cache, table[row, places // BLOCK] * BLOCK + places % BLOCK)
    return cache, key, value, table


def reference(query: Tensor, key: Tensor, value: Tensor, seen: list[int], scale: float) -> Tensor:
    """[heads, HEAD] float64 attention of one query over the tokens it sees."""
    group = query.shape[0] // key.shape[1]
    out = []
    for head in range(query.shape[0]):
        scores = key[seen, head // group].double() @ query[head].double() * scale
        out.append(torch.softmax(scores, dim=0) @ value[seen, head // group].double())
    return torch.stack(out)


def ancestry(tree: TokenTree, node: int) -> list[int]:
    path = []
    while node >= 0:
        path.append(node)
        node = int(tree.parents[node])
    return path


@settings(max_examples=40)
@given(
    st.lists(st.tuples(token_trees(12), st.integers(0, 30)), min_size=1, max_size=3),
    st.sampled_from([(1, 1), (2, 1), (4, 2), (6, 2)]),
    st.sampled_from(list(LAYOUTS)),
    st.integers(0, 99),
)
def test_every_node_sees_the_prefix_and_its_ancestors(
    rows: list[tuple[TokenTree, int]], heads: tuple[int, int], name: str, seed: int
) -> None:
    layout = LAYOUTS[name]
    trees, prefixes = (list(column) for column in zip(*rows, strict=True))
    cache, key, value, table = pages_of(
        layout, max(p + len(t) + 1 for t, p in rows), heads[1], len(rows), seed, torch.float32
    )
    starts = [0, *np.cumsum([len(tree) + 1 for tree in trees]).tolist()]
    query = torch.randn(starts[-1], heads[0], HEAD, generator=torch.Generator().manual_seed(seed))
    out = torch.full_like(query, torch.nan)
    masks = tuple(verification_mask(tree) for tree in trees)
    batch = TreeRows(tuple(range(len(rows))), tuple(prefixes), masks)
    attend_batch(query, cache, table, starts, batch, 0.3, WidePages(layout), out)
    for row, (tree, prefix) in enumerate(rows):
        for node in range(-1, len(tree)):
            seen = [*range(prefix + 1), *(prefix + 1 + i for i in ancestry(tree, node))]
            at = starts[row] + 1 + node
            expected = reference(query[at], key[row], value[row], seen, 0.3)
            assert torch.allclose(out[at].double(), expected, atol=1e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_frontier_attends_to_pages_loaded_step_by_step(name: str) -> None:
    """Draft steps: the prefix is loaded once, later steps read the blocks behind it only."""
    layout, prefix, kv_heads = LAYOUTS[name], 9, 2
    cache, key, value, table = pages_of(layout, 40, kv_heads, 1, 5, torch.float32)
    pages, blocks = WidePages(layout), table[0].tolist()
    untouched = cache.clone()
    for tail in (1, 4, 7, 20):  # root, then three frontiers of three
        used = -(-(prefix + tail) // BLOCK)
        behind = prefix // BLOCK if tail > 1 else 0
        cache[blocks[behind:]] = untouched[blocks[behind:]]
        pages.load(cache, blocks[:used], behind)
        cache.fill_(torch.nan)  # what was loaded is kept; what is loaded next is written again
        query = torch.randn(3, 4, HEAD)
        mask = torch.rand(3, tail) < 0.5
        out = torch.empty_like(query)
        attend(query, pages, mask, prefix, 0.5, out)
        for i in range(3):
            seen = [*range(prefix), *(prefix + np.flatnonzero(mask[i].numpy())).tolist()]
            expected = reference(query[i], key[0], value[0], seen, 0.5)
            assert torch.allclose(out[i].double(), expected, atol=1e-5)
    with pytest.raises(ValueError, match="never loaded"):
        WidePages(layout).load(untouched, blocks, 2)


@given(st.data(), st.sampled_from(list(LAYOUTS)), st.sampled_from([torch.bfloat16, torch.float32]))
def test_moved_slots_hold_the_keys_and_values_of_their_sources(
    data: st.DataObject, name: str, dtype: torch.dtype
) -> None:
    layout, tokens = LAYOUTS[name], 24
    cache, key, value, table = pages_of(layout, tokens, 2, 1, 1, dtype)
    sources = sorted(data.draw(st.sets(st.integers(0, tokens - 1), max_size=9)))
    order = list(range(tokens))
    order[: len(sources)] = sources  # as compaction does: the sources overlap the destinations

    def slots(positions: list[int]) -> Tensor:
        places = torch.tensor(positions, dtype=torch.int64)
        return table[0, places // BLOCK] * BLOCK + places % BLOCK

    layout.move(cache, slots(sources), slots(list(range(len(sources)))))
    pages = WidePages(layout)
    pages.load(cache, table[0].tolist())
    assert torch.equal(pages.keys(tokens).permute(2, 0, 1), key[0, order].float())
    assert torch.equal(pages.values(tokens).transpose(0, 1), value[0, order].float())


def test_bfloat16_is_widened_and_accumulated_in_float32() -> None:
    layout, prefix = LAYOUTS["transposed keys"], 200
    tree = TokenTree.chain([1, 2, 3], [0.9, 0.8, 0.7])
    cache, key, value, table = pages_of(layout, prefix + 4, 1, 1, 2, torch.bfloat16)
    query = torch.randn(4, 2, HEAD).bfloat16()
    out = torch.empty_like(query)
    pages = WidePages(layout)
    batch = TreeRows((0,), (prefix,), (verification_mask(tree),))
    attend_batch(query, cache, table, [0, 4], batch, 0.35, pages, out)
    for i in range(4):
        expected = reference(query[i], key[0], value[0], list(range(prefix + 1 + i)), 0.35)
        error = (out[i].double() - expected).abs()
        assert (
            error <= expected.abs() / 256 + 1e-6
        ).all()  # half a unit in the last place of 8 bits
