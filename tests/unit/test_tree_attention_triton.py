# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Tree attention's GPU path, without a GPU.

Triton decides when it is imported whether kernels are interpreted, and here another library may
have imported it long ago. So a process of its own runs this file again for the tests that execute
kernels. The compiler needs no GPU: the kernels are translated to machine code here.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.unit.trees import token_trees
from vllm_subspec.core import tree_attention_triton
from vllm_subspec.core.tree import TokenTree
from vllm_subspec.core.tree_attention import TreeRows, verification_mask
from vllm_subspec.core.tree_attention_triton import (
    DeviceTrees,
    Launch,
    attend_paged,
    move_slots,
    pack_masks,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CPU = torch.device("cpu")
BLOCK = 16


@dataclass
class Batch:
    """Requests of a pass with random queries and K/V, laid out as vLLM's FlashAttention does."""

    query: Tensor  # [tokens, heads, width]
    kv_cache: Tensor  # [blocks, KV heads, BLOCK, 2 * width]
    table: Tensor  # [requests, blocks] int32
    starts: list[int]
    prefixes: list[int]
    masks: list[Tensor]
    trees: TreeRows
    scale: float

    @property
    def caches(self) -> tuple[Tensor, Tensor]:
        keys, values = self.kv_cache.transpose(1, 2).split(self.query.shape[2], dim=-1)
        return keys, values

    def expected(self) -> Tensor:
        """[tokens, heads, width] float64 dense attention of all requests."""
        keys, values = self.caches
        group = self.query.shape[1] // keys.shape[2]
        out = []
        requests = zip(pairwise(self.starts), self.prefixes, self.masks, strict=True)
        for row, ((first, end), prefix, mask) in enumerate(requests):
            places = torch.arange(prefix + mask.shape[1], device=self.query.device)
            blocks = self.table[row, places // BLOCK].long()
            key = keys[blocks, places % BLOCK].double().repeat_interleave(group, 1)
            value = values[blocks, places % BLOCK].double().repeat_interleave(group, 1)
            scores = torch.einsum("qhw,khw->hqk", self.query[first:end].double(), key) * self.scale
            scores[..., prefix:].masked_fill_(~mask.to(scores.device), -torch.inf)
            out.append(torch.einsum("hqk,khw->qhw", torch.softmax(scores, -1), value))
        return torch.cat(out)


def batch_of(
    requests: list[tuple[int, Tensor | int]],
    heads: int,
    kv_heads: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    seed: int = 0,
    unused: float = torch.nan,
) -> Batch:
    """Requests of a prefix and a mask; a number in its place is a plain request of so many queries.

    Slots of no request hold ``unused``.
    """
    noise = torch.Generator().manual_seed(seed)
    masks = [torch.ones(r, r).tril().bool() if isinstance(r, int) else r for _, r in requests]
    prefixes = [prefix for prefix, _ in requests]
    lengths = [prefix + mask.shape[1] for prefix, mask in zip(prefixes, masks, strict=True)]
    wide = -(-max(lengths) // BLOCK)
    table = torch.randperm(len(requests) * wide, generator=noise).view(-1, wide)
    kv_cache = torch.full((table.numel(), kv_heads, BLOCK, 2 * width), unused)
    for row, length in enumerate(lengths):
        places = torch.arange(length)
        content = torch.randn(length, kv_heads, 2 * width, generator=noise)
        kv_cache[table[row, places // BLOCK], :, places % BLOCK] = content
    starts = [0]
    for mask in masks:
        starts.append(starts[-1] + mask.shape[0])
    rows = tuple(i for i, (_, r) in enumerate(requests) if not isinstance(r, int))
    trees = TreeRows(rows, tuple(prefixes[i] for i in rows), tuple(masks[i] for i in rows))
    return Batch(
        torch.randn(starts[-1], heads, width, generator=noise).to(device, dtype),
        kv_cache.to(device, dtype),
        table.to(device, torch.int32),
        starts,
        prefixes,
        masks,
        trees,
        width**-0.5,
    )


def attended(batch: Batch, splits: int | None = None) -> Tensor:
    """[tokens, heads, width] what the kernel writes, NaN elsewhere."""
    out = torch.full_like(batch.query, torch.nan)
    trees = uploaded(batch)
    attend_paged(batch.query, *batch.caches, batch.table, trees, batch.scale, out, splits)
    return out


def uploaded(batch: Batch) -> DeviceTrees:
    rows = batch.trees
    return DeviceTrees.upload(
        rows.rows, batch.starts, rows.prefixes, rows.masks, batch.query.device
    )


def frontier(queries: int, slots: int, seed: int = 0) -> Tensor:
    """[queries, slots] mask of a draft step: the newest slots, each with some of those before."""
    mask = torch.rand(queries, slots, generator=torch.Generator().manual_seed(seed)) < 0.3
    mask[:, slots - queries :] = torch.eye(queries, dtype=torch.bool)
    return mask


def random_tree(nodes: int, seed: int = 0) -> TokenTree:
    noise = torch.Generator().manual_seed(seed)
    parents = [int(torch.randint(-1, i, (), generator=noise)) for i in range(nodes)]
    return TokenTree(range(nodes), parents, [0.0] * nodes)  # type: ignore[arg-type]


class TestUnderTheInterpreter:
    __test__ = INTERPRETED

    # No shrinking: a failure would take minutes to be told.
    @settings(max_examples=6, derandomize=True, phases=[Phase.generate])
    @given(
        st.lists(st.tuples(token_trees(12), st.integers(0, 90)), min_size=1, max_size=2),
        st.sampled_from([(1, 1, 64), (2, 2, 80), (4, 2, 64), (6, 2, 80), (7, 1, 64)]),
        st.sampled_from([None, 2, 3]),
        st.integers(0, 99),
    )
    def test_every_node_sees_the_prefix_and_its_ancestors(
        self,
        rows: list[tuple[TokenTree, int]],
        shape: tuple[int, int, int],
        splits: int | None,
        seed: int,
    ) -> None:
        requests: list[tuple[int, Tensor | int]] = [(p, verification_mask(t)) for t, p in rows]
        requests.insert(1, (5, 2))  # a plain request: its rows are not written
        batch = batch_of(requests, *shape, seed=seed)
        out = attended(batch, splits)
        plain = slice(batch.starts[1], batch.starts[2])
        assert out[plain].isnan().all()
        out[plain] = batch.expected()[plain].float()
        assert torch.allclose(out.double(), batch.expected(), atol=1e-5, rtol=0)

    @pytest.mark.parametrize(
        ("dtype", "shape"),
        [(torch.bfloat16, (3, 1, 96)), (torch.bfloat16, (2, 1, 256)), (torch.float16, (2, 1, 128))],
    )
    def test_halves_are_widened_and_rounded_once(
        self, dtype: torch.dtype, shape: tuple[int, int, int]
    ) -> None:
        batch = batch_of([(70, verification_mask(random_tree(9)))], *shape, dtype=dtype)
        error = (attended(batch).double() - batch.expected()).abs()
        # A whole unit in the last place: the interpreter cuts bfloat16 where a GPU rounds.
        assert (error <= batch.expected().abs() * torch.finfo(dtype).eps + 1e-6).all()

    def test_a_tree_of_many_tiles_and_words(self) -> None:
        batch = batch_of([(21, verification_mask(random_tree(99)))], 2, 1, 64)
        assert torch.allclose(attended(batch).double(), batch.expected(), atol=1e-5, rtol=0)

    @pytest.mark.parametrize("splits", [1, 4, 9])
    def test_a_frontier_is_attended_to_alike_in_any_number_of_splits(self, splits: int) -> None:
        """More splits than tiles leave some without any."""
        batch = batch_of([(150, frontier(6, 70)), (3, frontier(2, 33))], 2, 1, 64)
        assert torch.allclose(attended(batch, splits).double(), batch.expected(), atol=1e-5, rtol=0)

    @pytest.mark.parametrize("splits", [1, 2])
    def test_who_sees_nothing_gets_zeros(self, splits: int) -> None:
        mask = frontier(3, 40)
        mask[1] = False
        batch = batch_of([(0, mask)], 2, 1, 64)
        out = attended(batch, splits).double()
        assert (out[1] == 0).all()
        assert torch.allclose(out[::2], batch.expected()[::2], atol=1e-5, rtol=0)

    def test_a_pass_without_tree_rows_writes_nothing(self) -> None:
        assert attended(batch_of([(5, 2)], 2, 1, 64)).isnan().all()


@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
def test_kernels_under_the_interpreter() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
        + ["-k", "TestUnderTheInterpreter"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize(("capability", "dtype"), [(80, "bf16"), (90, "bf16"), (80, "fp32")])
def test_the_kernel_compiles_for_a_gpu(capability: int, dtype: str) -> None:
    """bfloat16 uses tensor cores; float32 must not, they would round it to TF32."""
    compiler = pytest.importorskip("triton.compiler")
    target = pytest.importorskip("triton.backends.compiler").GPUTarget("cuda", capability, 32)
    half = dtype == "bf16"
    launch = Launch.of(6, 4 if half else 1, 64 if half else 16, 2 if half else 4)
    fixed = {"key_width": 1, "value_width": 1, "GROUP": 4 if half else 1}
    fixed |= {"WIDTH": 64 if half else 16, "TILE_WIDTH": launch.tile_width}
    fixed |= {"TILE_ROWS": launch.tile_rows, "TILE_SLOTS": launch.tile_slots}
    fixed |= {"SPLIT": True, "WIDEN": False}
    tensors = dict.fromkeys(("query", "keys", "values", "out"), f"*{dtype}")
    tensors |= dict.fromkeys(("table", "requests", "queries", "bits"), "*i32")
    kinds = {**tensors, "partial": "*fp32", "scale": "fp32"}
    names = tree_attention_triton._attend.arg_names
    source = compiler.ASTSource(
        tree_attention_triton._attend,
        {name: "constexpr" if name in fixed else kinds.get(name, "i32") for name in names},
        {(names.index(name),): value for name, value in fixed.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in tensors},
    )
    options = {"num_warps": launch.warps, "num_stages": 2}
    compiled = compiler.compile(source, target=target, options=options)
    assert compiled.metadata.shared <= 99 << 10  # of compute capability 8.6 and 8.9
    assert bool(re.search(r"\bw?g?mma\b", compiled.asm["ptx"])) == half


@pytest.mark.parametrize("nodes", [0, 1, 30, 31, 32, 33, 100, 512])
def test_bits_say_who_sees_whom(nodes: int) -> None:
    masks = [verification_mask(random_tree(nodes)), frontier(2, 5)]
    bits = pack_masks(masks)
    assert bits.dtype == torch.int32
    assert bits.shape == (nodes + 3, -(-max(nodes + 1, 5) // 32))
    wide = torch.zeros(nodes + 3, bits.shape[1] * 32, dtype=torch.bool)
    wide[: nodes + 1, : nodes + 1], wide[nodes + 1 :, :5] = masks
    for word in range(bits.shape[1]):
        for j in range(32):
            assert torch.equal((bits[:, word] >> j) & 1 != 0, wide[:, 32 * word + j])


def test_a_mask_that_is_not_its_requests_is_refused() -> None:
    with pytest.raises(ValueError, match="row 1 has 3 queries, its mask 4"):
        DeviceTrees.upload([1], [0, 2, 5], [7], [frontier(4, 4)], CPU)


def test_heads_that_are_too_large_are_refused() -> None:
    with pytest.raises(ValueError, match="head_size is 264"):
        attended(batch_of([(0, frontier(1, 1))], 1, 1, 264))


@given(st.data(), st.sampled_from([torch.bfloat16, torch.float32]))
def test_moved_slots_hold_what_their_sources_held(data: st.DataObject, dtype: torch.dtype) -> None:
    kv_cache = torch.randn(3, 2, BLOCK, 16).to(dtype)
    keys, values = kv_cache.transpose(1, 2).split(8, dim=-1)
    slots = st.integers(0, 3 * BLOCK - 1)
    sources = data.draw(st.lists(slots, max_size=20))
    destinations = data.draw(
        st.lists(slots, unique=True, min_size=len(sources), max_size=len(sources))
    )
    held = {s: (keys[s // BLOCK, s % BLOCK], values[s // BLOCK, s % BLOCK]) for s in range(48)}
    held = {slot: (key.clone(), value.clone()) for slot, (key, value) in held.items()}
    held |= {d: held[s] for s, d in zip(sources, destinations, strict=True)}
    move_slots(keys, values, torch.tensor(sources).long(), torch.tensor(destinations).long())
    for slot, (key, value) in held.items():
        assert torch.equal(keys[slot // BLOCK, slot % BLOCK], key)
        assert torch.equal(values[slot // BLOCK, slot % BLOCK], value)


@pytest.fixture
def backend() -> Any:
    return pytest.importorskip("vllm_subspec.engine.attention_cuda")


def implementation(backend: Any, **options: Any) -> Any:
    plain: dict[str, Any] = dict.fromkeys(("alibi_slopes", "sliding_window", "sinks"))
    given = {"num_heads": 4, "head_size": 64, "scale": 0.125, "num_kv_heads": 2}
    return backend.TreeFlashAttentionImpl(**plain | given | {"kv_cache_dtype": "auto"} | options)


def metadata(backend: Any, batch: Batch) -> Any:
    return backend.TreeFlashAttentionMetadata(
        num_actual_tokens=batch.starts[-1],
        max_query_len=max(mask.shape[0] for mask in batch.masks),
        query_start_loc=torch.tensor(batch.starts, dtype=torch.int32, device=batch.query.device),
        max_seq_len=batch.table.shape[1] * BLOCK,
        seq_lens=torch.tensor(
            [
                prefix + mask.shape[1]
                for prefix, mask in zip(batch.prefixes, batch.masks, strict=True)
            ],
            dtype=torch.int32,
            device=batch.query.device,
        ),
        block_table=batch.table,
        slot_mapping=torch.empty(0, dtype=torch.int64, device=batch.query.device),
    )


def attach(backend: Any, passed: Any, batch: Batch) -> None:
    builder = object.__new__(backend.TreeFlashAttentionMetadataBuilder)
    builder.device = batch.query.device
    builder.attach(passed, batch.trees, batch.starts)


def test_vllm_finds_the_backend_under_flash_attentions_name(backend: Any) -> None:
    flash = backend.AttentionBackendEnum.FLASH_ATTN
    backend.install()
    try:
        chosen = flash.get_class()
    finally:
        flash.clear_override()
    assert chosen is backend.TreeFlashAttentionBackend
    assert chosen.get_impl_cls() is backend.TreeFlashAttentionImpl
    support = chosen.get_builder_cls().get_cudagraph_support(None, None)
    assert support is backend.AttentionCGSupport.NEVER
    assert chosen.get_name() == "FLASH_ATTN"
    assert not chosen.forward_includes_kv_cache_update


def test_the_builder_takes_over_what_flash_attention_built(
    backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = batch_of([(4, frontier(3, 3))], 4, 2, 64)
    mine = metadata(backend, batch)
    built = backend.FlashAttentionMetadata(
        **{name: value for name, value in vars(mine).items() if name != "trees"}
    )
    parent = backend.FlashAttentionMetadataBuilder
    monkeypatch.setattr(parent, "build", lambda self, *args: built)
    builder = object.__new__(backend.TreeFlashAttentionMetadataBuilder)
    wrapped = builder.build(0, SimpleNamespace())
    assert isinstance(wrapped, backend.TreeFlashAttentionMetadata)
    assert vars(wrapped) == {**vars(built), "trees": None}
    attach(backend, wrapped, batch)
    other = builder.update_block_table(wrapped, batch.table + 1, wrapped.slot_mapping)
    assert other.trees is wrapped.trees
    assert other.block_table is not wrapped.block_table


@pytest.mark.parametrize("plain", ["none", "some", "all"])
def test_tree_rows_overwrite_flash_attentions(
    backend: Any, plain: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = batch_of([(4, frontier(3, 3)), (6, 2 if plain != "none" else frontier(2, 2))], 4, 2, 64)
    flash = backend.FlashAttentionImpl
    ran = []

    def forward(self: Any, layer: Any, query: Tensor, *rest: Any) -> Tensor:
        ran.append("flash")
        return rest[4].fill_(1)

    def attend(query: Tensor, keys: Tensor, values: Tensor, table: Tensor, *rest: Any) -> None:
        ran.append("trees")
        assert torch.equal(keys.nan_to_num(), batch.caches[0].nan_to_num())
        assert torch.equal(values.nan_to_num(), batch.caches[1].nan_to_num())
        assert table is batch.table
        assert rest[1] == 0.125
        rest[2][:3] = 2

    monkeypatch.setattr(flash, "forward", forward)
    monkeypatch.setattr(backend, "attend_paged", attend)
    passed = metadata(backend, batch)
    if plain != "all":
        attach(backend, passed, batch)
    out = torch.zeros_like(batch.query)
    impl = implementation(backend)
    assert impl.forward(None, batch.query, None, None, batch.kv_cache, passed, out) is out
    assert ran == {"none": ["trees"], "some": ["flash", "trees"], "all": ["flash"]}[plain]
    assert (out[:3] == (1 if plain == "all" else 2)).all()


def test_a_profiling_run_is_left_to_flash_attention(backend: Any) -> None:
    impl, out = implementation(backend), torch.ones(2, 4, 64)
    impl.vllm_flash_attn_version = 2
    empty = torch.empty(0)
    assert (impl.forward(None, out, out, out, empty, None, out) == 0).all()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"sliding_window": 128}, "sliding-window"),
        ({"alibi_slopes": [1.0] * 4}, "ALiBi"),
        ({"logits_soft_cap": 30.0}, "a soft cap"),
        ({"attn_type": "encoder_only"}, "attention of type encoder_only"),
        ({"head_size": 512}, "heads of 512 elements"),
    ],
)
def test_options_that_the_kernel_lacks_are_refused(
    backend: Any, options: dict[str, Any], reason: str
) -> None:
    assert backend.refusal(implementation(backend)) is None
    assert reason in backend.refusal(implementation(backend, **options))


@pytest.mark.parametrize(
    ("attribute", "value", "reason"),
    [("sinks", torch.zeros(4), "sinks"), ("kv_cache_dtype", "fp8", "a KV cache of fp8")],
)
def test_options_that_need_a_gpu_to_be_built_are_refused(
    backend: Any, attribute: str, value: Any, reason: str
) -> None:
    impl = implementation(backend)
    setattr(impl, attribute, value)
    assert reason in backend.refusal(impl)


def test_other_backends_are_refused(backend: Any) -> None:
    assert "the backend SimpleNamespace" in backend.refusal(SimpleNamespace())
