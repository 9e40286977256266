# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Tree attention on a GPU, alone and inside vLLM's FlashAttention backend. Skipped without one."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.unit.test_tree_attention_triton import (
    BLOCK,
    attach,
    attended,
    batch_of,
    frontier,
    implementation,
    metadata,
    random_tree,
    uploaded,
)
from vllm_subspec.core.tree_attention import verification_mask
from vllm_subspec.core.tree_attention_triton import attend_paged, move_slots

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

GPU = torch.device("cuda")
# Absolute, of outputs that are averages of standard normal values. The weights of a 16-bit product
# are rounded to 16 bits as well, as in FlashAttention.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def assert_close(out: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert (out.double() - expected).abs().max() <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "shape", [(4, 4, 64), (6, 2, 80), (4, 1, 96), (28, 4, 128), (32, 8, 128), (8, 2, 256)]
)
def test_trees_of_a_verification(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    trees = [(p, verification_mask(random_tree(n, n))) for n, p in [(64, 1000), (0, 7), (300, 0)]]
    batch = batch_of([trees[0], (40, 5), *trees[1:]], *shape, dtype=dtype, device=GPU)
    out, expected = attended(batch), batch.expected()
    plain = slice(batch.starts[1], batch.starts[2])
    assert out[plain].isnan().all()
    out[plain] = expected[plain].to(dtype)
    assert_close(out, expected, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("splits", [None, 1, 2, 7, 64])
def test_a_frontier_behind_a_long_prefix(splits: int | None, dtype: torch.dtype) -> None:
    batch = batch_of([(5000, frontier(6, 70))], 28, 4, 128, dtype=dtype, device=GPU)
    assert_close(attended(batch, splits), batch.expected(), dtype)


def test_nothing_waits_for_the_device() -> None:
    batch = batch_of([(900, frontier(6, 70))], 8, 2, 64, torch.bfloat16, GPU)
    attended(batch)  # compiles
    out = torch.empty_like(batch.query)
    slots = torch.arange(9, device=GPU)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trees = uploaded(batch)
        attend_paged(batch.query, *batch.caches, batch.table, trees, batch.scale, out)
        move_slots(*batch.caches, slots + 3, slots)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_plain_and_tree_rows_of_one_pass(dtype: torch.dtype) -> None:
    from vllm_subspec.engine import attention_cuda as backend

    tree = verification_mask(random_tree(40))
    batch = batch_of([(9, 30), (500, tree), (77, 1)], 4, 2, 64, dtype, GPU, unused=0.0)
    passed = metadata(backend, batch)
    attach(backend, passed, batch)
    impl = implementation(backend)
    assert backend.refusal(impl) is None
    one = torch.ones((), device=GPU)
    layer = SimpleNamespace(_q_scale=one, _k_scale=one, _v_scale=one)
    # The K/V of one more token of the last request goes where the kernel will read it.
    last = batch.prefixes[-1]
    slot = batch.table[-1, last // BLOCK].long() * BLOCK + last % BLOCK
    key, value = torch.randn(2, 1, 2, 64, device=GPU).to(dtype)
    impl.do_kv_cache_update(layer, key, value, batch.kv_cache, slot.view(1))
    for cache, written in zip(backend.cache_views(batch.kv_cache, 64), (key, value), strict=True):
        assert torch.equal(cache.flatten(0, 1)[slot], written[0])
    out = torch.full_like(batch.query, torch.nan)
    impl.forward(layer, batch.query, None, None, batch.kv_cache, passed, out)
    assert_close(out, batch.expected(), dtype)


def microseconds(run: Callable[[], object], repeats: int = 30) -> float:
    for _ in range(3):
        run()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1000 / repeats


@pytest.mark.parametrize("prefix", [512, 8192])
def test_time_beside_flash_attentions_chain(
    prefix: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prints, and asserts nothing: a figure of one GPU says little about another."""
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version

    lines = [f"\nprefix {prefix}, 28 heads of 128 on 4 KV heads, bfloat16, microseconds"]
    for nodes in (1, 32, 64, 128, 256, 512):
        mask = verification_mask(random_tree(nodes - 1))
        batch = batch_of([(prefix, mask)], 28, 4, 128, torch.bfloat16, GPU, unused=0.0)
        trees, out = uploaded(batch), torch.empty_like(batch.query)
        keys, values = batch.caches
        passed = (batch.query, keys, values, batch.table, trees, batch.scale, out)
        starts = torch.tensor(batch.starts, dtype=torch.int32, device=GPU)
        lengths = torch.tensor([prefix + nodes], dtype=torch.int32, device=GPU)
        chain = {
            "q": batch.query,
            "k": keys,
            "v": values,
            "out": out,
            "cu_seqlens_q": starts,
            "max_seqlen_q": nodes,
            "seqused_k": lengths,
            "max_seqlen_k": prefix + nodes,
            "softmax_scale": batch.scale,
            "causal": True,
            "block_table": batch.table,
            "fa_version": get_flash_attn_version(head_size=128),
        }
        tree = microseconds(lambda passed=passed: attend_paged(*passed))  # type: ignore[misc]
        flash = microseconds(lambda chain=chain: flash_attn_varlen_func(**chain))  # type: ignore[misc]
        lines.append(f"{nodes:4d} nodes: tree {tree:8.1f}, FlashAttention's chain {flash:8.1f}")
    with capsys.disabled():
        print("\n".join(lines))
