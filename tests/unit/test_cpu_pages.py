# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Pages and attention as vLLM's CPU operations write and compute them."""

import pytest
import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.platforms import current_platform
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from vllm_subspec.core.paged_kv import BlockLayout, WidePages
from vllm_subspec.core.tree import TokenTree
from vllm_subspec.core.tree_attention import TreeRows, attend_batch, verification_mask

pytestmark = pytest.mark.skipif(
    not current_platform.is_cpu(), reason="the operations of vLLM's CPU backend"
)


def halves(cache: Tensor) -> tuple[Tensor, Tensor]:
    blocks, heads, size, _ = cache.shape
    keys, values = cache.view(blocks, heads, 2 * size, -1).chunk(2, dim=2)
    return keys, values


def layout_of(dtype: torch.dtype, block_size: int, head_size: int) -> BlockLayout:
    isa = _get_attn_isa(dtype, block_size, head_size)

    def write(key: Tensor, value: Tensor, cache: Tensor, slots: Tensor) -> None:
        ops.cpu_attn_reshape_and_cache(
            key, value, *halves(cache), slots, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto"
        )

    return BlockLayout.learn(write, block_size, head_size, dtype)


@pytest.mark.parametrize("block_size", [32, 64, 128])
@pytest.mark.parametrize("head_size", [64, 80])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_layout_of_the_vector_instructions(
    dtype: torch.dtype, head_size: int, block_size: int
) -> None:
    if _get_attn_isa(dtype, block_size, head_size) not in ("vec", "vec16"):
        pytest.skip("another instruction set packs the pages in its own way")
    layout = layout_of(dtype, block_size, head_size)
    order = torch.arange(block_size * head_size)
    assert torch.equal(layout.keys, order.view(head_size, block_size).T)
    assert torch.equal(layout.values, order.view(block_size, head_size))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_chain_is_attended_to_as_by_the_causal_operation(dtype: torch.dtype) -> None:
    heads, kv_heads, width, size, prefix, n = 8, 4, 64, 32, 150, 9
    layout = layout_of(dtype, size, width)
    isa = _get_attn_isa(dtype, size, width)
    if isa == "amx":  # an engine's first product by oneDNN asks the kernel for these instructions
        assert torch.cpu._init_amx()
    torch.manual_seed(0)
    table = torch.randperm(6, dtype=torch.int32).unsqueeze(0)
    cache = torch.zeros(6, kv_heads, size, 2 * width, dtype=dtype)
    places = torch.arange(prefix + n)
    slots = table[0, places // size].long() * size + places % size
    key, value = torch.randn(2, prefix + n, kv_heads, width).to(dtype)
    ops.cpu_attn_reshape_and_cache(
        key, value, *halves(cache), slots, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto"
    )
    query = torch.randn(n, heads, width).to(dtype)
    causal, out = torch.empty_like(query), torch.empty_like(query)
    starts = torch.tensor([0, n], dtype=torch.int32)
    lengths = torch.tensor([prefix + n], dtype=torch.int32)
    schedule = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=1, num_heads=heads, num_kv_heads=kv_heads, head_dim=width, seq_lens=lengths,
        dtype=dtype, query_start_loc=starts, causal=True, sliding_window_size=-1, isa=isa,
        enable_kv_split=True, dynamic_causal=None, kv_cache_dtype="auto",
    )  # fmt: skip
    keys, values = halves(cache)
    ops.cpu_attention_with_kv_cache(
        query=query, key_cache=keys, value_cache=values, output=causal, query_start_loc=starts,
        seq_lens=lengths, scale=width**-0.5, causal=True, alibi_slopes=None, sliding_window=-1,
        block_table=table, softcap=0, scheduler_metadata=schedule, s_aux=None, dynamic_causal=None,
        k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto",
    )  # fmt: skip
    chain = TokenTree.chain(range(n - 1), [0.5] * (n - 1))
    batch = TreeRows((0,), (prefix,), (verification_mask(chain),))
    pages = WidePages(layout)
    attend_batch(query, cache, table, [0, n], batch, width**-0.5, pages, out)
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    assert torch.allclose(out.float(), causal.float(), atol=tolerance)
