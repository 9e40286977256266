# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Quantized weights at rest: searching good scales takes minutes for a large model, reading back
what was found takes seconds.

A file in the weight store's format (`store_format`), a block for each matrix. Codes of at most 4
bits are kept two to the byte, so that the file belongs to no kernel and to no machine.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from vllm_subspec.weights.direct_io import aligned_buffer
from vllm_subspec.weights.quantized_weight import QuantFormat, QuantizedWeight
from vllm_subspec.weights.store import open_or_create
from vllm_subspec.weights.store_format import BlockLayout, Fingerprint, TensorSpec
from vllm_subspec.weights.store_writer import StoreWriter

SCALE_DTYPE = torch.bfloat16
"""Of the scales that `quantize` makes."""


class SubstituteStore:
    """Those of an earlier start, or a place where this start keeps its own for the next one.

    Args:
        path: of the file.
        identity: of the weights and of how they are quantized; a file of another is replaced.
        matrices: name and shape [N, K] of every matrix that will be asked for.
        fmt: of all of them.

    Raises:
        StoreReadError: there is a file that cannot be read.
        StoreWriteError: the folder cannot be written.
    """

    def __init__(
        self,
        path: str,
        identity: Fingerprint,
        matrices: Mapping[str, tuple[int, int]],
        fmt: QuantFormat,
    ) -> None:
        self.path = path
        self._shapes = dict(matrices)
        self._format = fmt
        self._blocks = [_layout(name, *shape, fmt) for name, shape in matrices.items()]
        self._index = {name: index for index, name in enumerate(matrices)}
        opened = open_or_create(path, identity, self._blocks)
        self._writer: StoreWriter | None = None
        if isinstance(opened, StoreWriter):
            self._writer = opened.__enter__()
            return
        self._reader = opened.open_reader()
        self._buffer = aligned_buffer(max(block.nbytes for block in self._blocks))
        opened.close()

    @property
    def complete(self) -> bool:
        """Whether every matrix is there already."""
        return self._writer is None

    def weight(self, name: str, quantize: Callable[[], QuantizedWeight]) -> QuantizedWeight:
        """The matrix ``name``: kept before, in host memory, or made by ``quantize`` and kept now.

        Raises:
            StoreReadError: it cannot be read.
            StoreWriteError: it cannot be written.
        """
        index, fmt = self._index[name], self._format
        if self._writer is not None:
            made = quantize()
            codes = _pack(made.codes, fmt.bits)
            tensors = {"codes": codes, "scales": made.scales, "zeros": made.zeros}
            self._writer.write_block(index, tensors)
            return made
        self._reader.read(index, self._buffer)
        kept = self._blocks[index].views(self._buffer)
        codes = _unpack(kept["codes"], fmt.bits, self._shapes[name])
        return QuantizedWeight(codes, kept["scales"].clone(), kept["zeros"].clone(), fmt)

    def finish(self) -> None:
        """Everything was asked for: what was made is kept, what was read is closed."""
        if self._writer is not None:
            self._writer.__exit__(None, None, None)
        else:
            self._reader.close()
            del self._buffer

    def abort(self) -> None:
        """Leave nothing behind of what was not finished."""
        if self._writer is not None:
            self._writer.abort()


def _layout(name: str, rows: int, columns: int, fmt: QuantFormat) -> BlockLayout:
    groups = columns // fmt.columns_per_group(columns)
    size = rows * columns
    return BlockLayout(
        name,
        (
            TensorSpec("codes", (size // 2 if _paired(size, fmt.bits) else size,), torch.uint8),
            TensorSpec("scales", (rows, groups), SCALE_DTYPE),
            TensorSpec("zeros", (rows, groups), torch.uint8),
        ),
    )


def _paired(size: int, bits: int) -> bool:
    return bits <= 4 and size % 2 == 0


def _pack(codes: Tensor, bits: int) -> Tensor:
    """[N, K] uint8 -> vector; a byte holds a code of the first half and one of the second."""
    flat = codes.reshape(-1)
    if not _paired(flat.numel(), bits):
        return flat
    first, second = flat.chunk(2)
    return second.bitwise_left_shift(4).bitwise_or_(first)


def _unpack(packed: Tensor, bits: int, shape: tuple[int, int]) -> Tensor:
    if not _paired(shape[0] * shape[1], bits):
        return packed.clone().view(shape)
    codes = packed.new_empty(2 * packed.numel())
    torch.bitwise_and(packed, 15, out=codes[: packed.numel()])
    torch.bitwise_right_shift(packed, 4, out=codes[packed.numel() :])
    return codes.view(shape)
