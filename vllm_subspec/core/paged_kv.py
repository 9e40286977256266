# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""K/V pages of vLLM's CPU backend as plain tensors.

A layer's cache is [blocks, heads, block_size, 2 * head_size]; of each block and head the first
half of the elements is K and the second V. How they are ordered inside their half depends on the
instruction set that the backend chose: with "vec" and "vec16" (AVX2, AVX-512) K is transposed,
[head_size, block_size], and V is plain, [block_size, head_size], for every dtype and block size;
others may pack both. So the order is not assumed: `BlockLayout.learn` reads it from values written
through the backend's own operation.
"""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor

# key, value [tokens, heads, head_size], the cache, slots [tokens]
WritePages = Callable[[Tensor, Tensor, Tensor, Tensor], None]

_DIGIT = 128  # bfloat16 holds integers up to 256 exactly


class BlockLayout:
    """Where the elements of a token lie inside the K half and the V half of a block.

    Args:
        keys: [block_size, head_size] int64 offset of each token's elements in the K half.
        values: [block_size, head_size] int64 the same for V.

    Raises:
        ValueError: the offsets are not a permutation of the half's elements.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        elements = torch.arange(keys.numel())
        for name, order in (("K", keys), ("V", values)):
            if not torch.equal(order.flatten().sort().values, elements):
                raise ValueError(f"the {name} half of a KV block does not hold each element once")
        self.keys, self.values = keys, values
        # What reorders a half into the shapes that attention reads; None where a view is enough.
        wanted = keys.T.flatten(), values.flatten()
        self._key_order, self._value_order = (
            None if torch.equal(order, elements) else order for order in wanted
        )

    @property
    def block_size(self) -> int:
        return self.keys.shape[0]

    @classmethod
    def learn(cls, write: WritePages, block_size: int, head_size: int, dtype: torch.dtype) -> Self:
        """The layout that ``write`` uses, by writing one block of one head.

        Each element is numbered; the number is written digit by digit, so that every dtype of at
        least 8 significant bits carries it exactly.

        Raises:
            ValueError: what was written does not come back as a permutation.
        """
        numbers = torch.arange(block_size * head_size).view(block_size, 1, head_size)
        slots = torch.arange(block_size)
        read = torch.zeros(2, block_size * head_size, dtype=torch.int64)
        scale = 1
        while scale < block_size * head_size:
            cache = torch.zeros(1, 1, block_size, 2 * head_size, dtype=dtype)
            digits = (numbers // scale % _DIGIT).to(dtype)
            write(digits, digits.clone(), cache, slots)
            read += cache.view(2, -1).long() * scale
            scale *= _DIGIT
        for half in read:
            if not torch.equal(half.sort().values, numbers.flatten()):
                raise ValueError("a KV block does not hold each element that was written to it")
        keys, values = (half.argsort().view(block_size, head_size) for half in read)
        return cls(keys, values)

    def keys_of(self, cache: Tensor, block: int) -> Tensor:
        """[heads, head_size, block_size] K of a block; a view where the layout allows."""
        half = _halves(cache)[block, :, 0]
        half = half if self._key_order is None else half[:, self._key_order]
        return half.view(half.shape[0], -1, self.block_size)

    def values_of(self, cache: Tensor, block: int) -> Tensor:
        """[heads, block_size, head_size] V of a block; a view where the layout allows."""
        half = _halves(cache)[block, :, 1]
        half = half if self._value_order is None else half[:, self._value_order]
        return half.view(half.shape[0], self.block_size, -1)

    def move(self, cache: Tensor, sources: Tensor, destinations: Tensor) -> None:
        """Copy the K/V of slots ``sources`` [m] to ``destinations`` [m], both int64.

        All sources are read before anything is written, so the two may overlap.
        """
        halves = _halves(cache)
        for half, order in ((0, self.keys), (1, self.values)):
            view = halves[:, :, half]
            read = view[_elements(sources, order)]
            view[_elements(destinations, order)] = read


class WidePages:
    """The K/V of one sequence in one layer, gathered from its pages and widened to float32.

    Widening once is cheaper than in every product: few CPUs multiply bfloat16. The buffers grow
    and are reused, since fresh memory costs as much as the copy. One object may serve all layers
    and sequences of a pass in turn, or keep a sequence's prefix while drafts add to its end.
    """

    def __init__(self, layout: BlockLayout) -> None:
        self._layout = layout
        self._keys = torch.empty(0, 0, 0)
        self._values = torch.empty(0, 0, 0)

    def load(self, cache: Tensor, blocks: list[int], first: int = 0) -> None:
        """Read the ``blocks`` of the sequence, from its ``first``-th on; those before are kept.

        Raises:
            ValueError: blocks to be kept were never loaded.
        """
        size = self._layout.block_size
        heads, width = cache.shape[1], cache.shape[3] // 2
        if self._keys.shape[0] != heads or self._keys.shape[2] < len(blocks) * size:
            if first and self._keys.shape[2] < first * size:
                raise ValueError(f"blocks before {first} were never loaded")
            capacity = max(2 * self._keys.shape[2], len(blocks) * size)
            keys = torch.empty(heads, width, capacity)
            values = torch.empty(heads, capacity, width)
            if first:
                keys[:, :, : first * size] = self._keys[:, :, : first * size]
                values[:, : first * size] = self._values[:, : first * size]
            self._keys, self._values = keys, values
        for index in range(first, len(blocks)):
            place = slice(index * size, (index + 1) * size)
            self._keys[:, :, place] = self._layout.keys_of(cache, blocks[index])
            self._values[:, place] = self._layout.values_of(cache, blocks[index])

    def keys(self, length: int) -> Tensor:
        """[heads, head_size, length] float32, a view."""
        return self._keys[:, :, :length]

    def values(self, length: int) -> Tensor:
        """[heads, length, head_size] float32, a view."""
        return self._values[:, :length]


def _halves(cache: Tensor) -> Tensor:
    """[blocks, heads, 2, block_size * head_size] view of a layer's cache."""
    return cache.view(*cache.shape[:2], 2, -1)


def _elements(slots: Tensor, order: Tensor) -> tuple[Tensor, slice, Tensor]:
    """Index of [blocks, heads, elements] that gives [m, head_size, heads] of ``slots``."""
    block_size = order.shape[0]
    return (slots // block_size).unsqueeze(1), slice(None), order[slots % block_size]
