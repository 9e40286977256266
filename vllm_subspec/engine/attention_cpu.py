# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Tree attention on vLLM's CPU backend.

vLLM's C++ operator is causal and takes no mask. It goes on serving every request whose queries
are a plain sequence, chains included; the requests of a tree are served by
`core.tree_attention`, on the same pages.
"""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from vllm_subspec.core.paged_kv import BlockLayout, WidePages
from vllm_subspec.core.tree_attention import TreeRows, attend_batch

BACKEND = AttentionBackendEnum.CPU_ATTN


@dataclass(frozen=True)
class _Plain:
    """The requests of a pass that are no trees, as a batch of their own."""

    queries: Tensor  # [m] int64, which of the pass's queries are theirs
    metadata: CPUAttentionMetadata


@dataclass(frozen=True)
class _Trees:
    rows: TreeRows
    starts: Sequence[int]  # first query of each request, and the end
    plain: _Plain | None
    pages: WidePages  # scratch, shared by all layers


@dataclass
class TreeCPUAttentionMetadata(CPUAttentionMetadata):
    trees: _Trees | None = None


class TreeCPUAttentionMetadataBuilder(CPUAttentionMetadataBuilder):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pages: WidePages | None = None

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> TreeCPUAttentionMetadata:
        built = super().build(common_prefix_len, common_attn_metadata, fast_build)
        return TreeCPUAttentionMetadata(
            **{field.name: getattr(built, field.name) for field in fields(built)}
        )

    def attach(
        self, metadata: TreeCPUAttentionMetadata, trees: TreeRows, starts: Sequence[int]
    ) -> None:
        """Make ``metadata``, which `build` has made, attend along ``trees``.

        Args:
            starts: [requests + 1] first query of each request in the pass, and the end.
        """
        if self._pages is None:
            layout = page_layout(self.isa, self.block_size, self.head_dim, self.dtype)
            self._pages = WidePages(layout)
        others = np.delete(np.arange(len(starts) - 1), trees.rows)
        metadata.trees = _Trees(trees, starts, self._plain(metadata, others, starts), self._pages)

    def _plain(
        self, metadata: CPUAttentionMetadata, rows: np.ndarray, starts: Sequence[int]
    ) -> _Plain | None:
        if not rows.size:
            return None
        begins, ends = np.asarray(starts)[rows], np.asarray(starts)[rows + 1]
        counts = ends - begins
        queries = torch.as_tensor(np.concatenate([*map(np.arange, begins, ends)]))
        index = torch.as_tensor(rows)
        starts_of = torch.as_tensor(np.append(0, np.cumsum(counts)), dtype=torch.int32)
        common = CommonAttentionMetadata(
            query_start_loc=starts_of,
            query_start_loc_cpu=starts_of,
            seq_lens=metadata.seq_lens[index],
            num_reqs=rows.size,
            num_actual_tokens=int(counts.sum()),
            max_query_len=int(counts.max()),
            max_seq_len=metadata.max_seq_len,
            block_table_tensor=metadata.block_table[index],
            slot_mapping=metadata.slot_mapping[queries],
            causal=True,
        )
        return _Plain(queries, super().build(0, common))


class TreeCPUAttentionImpl(CPUAttentionBackendImpl):
    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: TreeCPUAttentionMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        rest = (output_scale, output_block_scale)
        if attn_metadata is None or (trees := attn_metadata.trees) is None:
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *rest)
        if trees.plain is not None:
            own = trees.plain.queries
            part = torch.empty_like(output[own])
            super().forward(
                layer, query[own], key, value, kv_cache, trees.plain.metadata, part, *rest
            )
            output[own] = part
        attend_batch(
            query,
            kv_cache,
            attn_metadata.block_table,
            trees.starts,
            trees.rows,
            self.scale,
            trees.pages,
            output,
        )
        return output


class TreeCPUAttentionBackend(CPUAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[TreeCPUAttentionImpl]:
        return TreeCPUAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[TreeCPUAttentionMetadataBuilder]:
        return TreeCPUAttentionMetadataBuilder


def install() -> None:
    """Let vLLM's CPU engine of this process use the backend above. Without trees it is vLLM's."""
    register_backend(BACKEND, f"{__name__}.{TreeCPUAttentionBackend.__name__}")


def refusal(impl: CPUAttentionBackendImpl) -> str | None:
    """What of a layer's attention trees cannot do; None if they can do all of it."""
    features = {
        "sliding-window attention": impl.sliding_window != -1,
        "ALiBi": impl.alibi_slopes is not None,
        "a soft cap on attention logits": bool(impl.logits_soft_cap),
        "attention sinks": impl.sinks is not None,
        "an FP8 KV cache": impl.is_fp8_kv_cache,
    }
    return next((name for name, used in features.items() if used), None)


@functools.cache
def page_layout(isa: str, block_size: int, head_size: int, dtype: torch.dtype) -> BlockLayout:
    """How this machine's operator lays out a KV block."""

    def write(key: Tensor, value: Tensor, cache: Tensor, slots: Tensor) -> None:
        halves = cache.view(*cache.shape[:2], 2 * block_size, head_size)
        ops.cpu_attn_reshape_and_cache(key, value, *halves.chunk(2, dim=2), slots, isa)

    return BlockLayout.learn(write, block_size, head_size, dtype)


def move_pages(layers: Iterable[Any], sources: Tensor, destinations: Tensor) -> None:
    """Copy the K/V of slots ``sources`` [m] to ``destinations`` [m], both int64, in each of vLLM's
    attention ``layers``; all sources of a layer are read before it is written."""
    for layer in layers:
        cache = layer.kv_cache
        size = cache.shape[3] // 2
        layout = page_layout(layer.isa, cache.shape[2], size, cache.dtype)
        layout.move(cache, sources, destinations)
