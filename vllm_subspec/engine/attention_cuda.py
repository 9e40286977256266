# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Token trees in vLLM's FlashAttention backend.

FlashAttention has no masks, so requests whose queries lie in a tree are attended to by a kernel of
our own (`core.tree_attention_triton`), on the same paged cache. Which requests those are travels in
the pass's attention metadata; without any, the backend is FlashAttention's, unchanged.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.utils.torch_utils import is_quantized_kv_cache
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType, CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from vllm_subspec.core.tree_attention import TreeRows
from vllm_subspec.core.tree_attention_triton import (
    LARGEST_HEAD,
    DeviceTrees,
    attend_paged,
    move_slots,
)

BACKEND = AttentionBackendEnum.FLASH_ATTN


def install() -> None:
    """Put `TreeFlashAttentionBackend` in the place of vLLM's FlashAttention backend.

    For the whole process, to be called before the model is built: its layers choose their backend
    then.
    """
    register_backend(BACKEND, f"{__name__}.{TreeFlashAttentionBackend.__qualname__}")


def refusal(impl: Any) -> str | None:
    """What of a layer's attention (``Attention.impl``) trees cannot do; None if they can do all."""
    if not isinstance(impl, TreeFlashAttentionImpl):
        return f"the backend {type(impl).__name__} instead of --attention-backend FLASH_ATTN"
    features = {
        "sliding-window attention": impl.sliding_window != (-1, -1),
        "ALiBi": impl.alibi_slopes is not None,
        "a soft cap on attention logits": bool(impl.logits_soft_cap),
        "attention sinks": impl.sinks is not None,
        f"a KV cache of {impl.kv_cache_dtype}": is_quantized_kv_cache(impl.kv_cache_dtype),
        f"attention of type {AttentionType(impl.attn_type).value}": impl.attn_type
        != AttentionType.DECODER,
        f"heads of {impl.head_size} elements": impl.head_size > LARGEST_HEAD,
    }
    return next((name for name, used in features.items() if used), None)


def cache_views(kv_cache: Tensor, head_size: int) -> tuple[Tensor, Tensor]:
    """K and V of a layer's cache, each a [blocks, block_size, KV heads, head_size] view.

    Args:
        kv_cache: [blocks, KV heads, block_size, 2 * head_size], as FlashAttention keeps it.
    """
    keys, values = kv_cache.transpose(1, 2).split(head_size, dim=-1)
    return keys, values


@dataclass
class TreeFlashAttentionMetadata(FlashAttentionMetadata):
    """FlashAttention's, and the requests of the pass that it does not serve."""

    trees: DeviceTrees | None = None
    """None for a pass of plain causal requests."""


class TreeFlashAttentionMetadataBuilder(FlashAttentionMetadataBuilder):
    """Builds `TreeFlashAttentionMetadata`, without trees.

    FlashAttention's updates keep them: that of the block table copies the object, whatever its
    class (a description holds no blocks), and that of a draft's metadata changes it in place.
    """

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """A whole-model graph would replay the attention of the pass that was captured, without
        its trees. Attention between the pieces of a graph runs in Python as before."""
        return AttentionCGSupport.NEVER

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> TreeFlashAttentionMetadata:
        built = super().build(common_prefix_len, common_attn_metadata, fast_build)
        return TreeFlashAttentionMetadata(**vars(built))

    def attach(
        self, metadata: TreeFlashAttentionMetadata, trees: TreeRows, starts: Sequence[int]
    ) -> None:
        """Make ``metadata``, which `build` has made, attend along ``trees``: they are copied to
        the device for all layers, without waiting for it.

        Args:
            starts: [requests + 1] first query of each request in the pass, and the end.

        Raises:
            ValueError: a mask does not have a row for each query of its request.
        """
        metadata.trees = DeviceTrees.upload(
            trees.rows, starts, trees.prefixes, trees.masks, self.device
        )


class TreeFlashAttentionImpl(FlashAttentionImpl):
    """FlashAttention, and the tree kernel for the tree rows of a pass."""

    def forward(
        self,
        layer: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: TreeFlashAttentionMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """As `FlashAttentionImpl.forward`. The pass's own K/V is in the cache by now: this backend
        writes it in ``do_kv_cache_update``, which vLLM runs before."""
        trees = None if attn_metadata is None else attn_metadata.trees
        if trees is None or not trees.whole_pass:
            # FlashAttention also computes the tree rows, as if causal, and they are overwritten:
            # leaving them out needs other metadata, lengths and a schedule of the plain rows only.
            super().forward(
                layer,
                query,
                key,
                value,
                kv_cache,
                attn_metadata,
                output,
                output_scale,
                output_block_scale,
            )
        if attn_metadata is not None and trees is not None:
            attend_paged(
                query,
                *cache_views(kv_cache, self.head_size),
                attn_metadata.block_table,
                trees,
                self.scale,
                output,
            )
        return output


class TreeFlashAttentionBackend(FlashAttentionBackend):
    """FlashAttention with token trees, under the same name."""

    @staticmethod
    def get_impl_cls() -> type[TreeFlashAttentionImpl]:
        return TreeFlashAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[TreeFlashAttentionMetadataBuilder]:
        return TreeFlashAttentionMetadataBuilder


def move_pages(layers: Iterable[Any], sources: Tensor, destinations: Tensor) -> None:
    """Copy the K/V of slots ``sources`` [m] to ``destinations`` [m], both int64, in each of vLLM's
    attention ``layers``; all sources of a layer are read before it is written."""
    for layer in layers:
        move_slots(*cache_views(layer.kv_cache, layer.impl.head_size), sources, destinations)
