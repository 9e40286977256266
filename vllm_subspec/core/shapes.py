# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""How large a model is, as far as it matters to what lies where."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vllm_subspec.core.plan import ModelSizes


@dataclass(frozen=True)
class Linear:
    """A weight matrix of a decoder layer, or several of one shape (experts)."""

    rows: int
    columns: int
    count: int = 1

    @property
    def size(self) -> int:
        """Elements."""
        return self.rows * self.columns * self.count


@dataclass(frozen=True)
class ModelShape:
    """Parameters in elements, not bytes."""

    layers: Sequence[Sequence[Linear]]
    """The linears of each decoder layer."""
    other: int
    """Embeddings, norms, biases and the output layer."""
    head: int
    """Of these the output layer's, which every draft step reads."""
    experts_used: int
    """For a token, of a layer's experts; 0 in a dense model."""
    kv_heads: int
    head_size: int

    def sizes(
        self,
        itemsize: int,
        ranks: int,
        substitute: Callable[[Linear], int],
        workspace: int,
    ) -> ModelSizes:
        """One rank's share.

        Args:
            itemsize: bytes of an element of the full weights and of the K/V.
            ranks: tensor-parallel ranks. Linears, embeddings and the output layer are split; of the
                K/V heads each rank has at least one.
            substitute: bytes of the stand-ins of one linear, all of its count.
            workspace: bytes, as in `ModelSizes`.
        """
        return ModelSizes(
            layers=[itemsize * sum(part.size for part in layer) // ranks for layer in self.layers],
            substitutes=[sum(map(substitute, layer)) // ranks for layer in self.layers],
            other=itemsize * self.other // ranks,
            kv_per_token=self.kv_per_token(itemsize, ranks),
            workspace=workspace,
        )

    @property
    def active_share(self) -> float:
        """Of the decoder layers, what a single token reads."""
        parts = [part for layer in self.layers for part in layer]
        used = sum(
            part.size * min(self.experts_used or 1, part.count) // part.count for part in parts
        )
        return used / sum(part.size for part in parts)

    def kv_per_token(self, itemsize: int, ranks: int = 1) -> int:
        """Bytes of one token's K and V in all layers, of one rank."""
        heads = max(1, self.kv_heads // ranks)
        return 2 * heads * self.head_size * len(self.layers) * itemsize
