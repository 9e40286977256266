# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Reads of streamed weights that fail when they are told to."""

import threading

import torch

from vllm_subspec.weights.ring import BlockSource
from vllm_subspec.weights.store import StoreReadError


class FaultySource:
    """A source that, once armed, fails at one read of one block and then is well again."""

    def __init__(self, source: BlockSource) -> None:
        self._source = source
        self._fails_at: int | None = None
        self.failed = 0

    def arm(self, block: int) -> None:
        self._fails_at = block

    def read(self, index: int, out: torch.Tensor, cancel: threading.Event | None = None) -> None:
        if index == self._fails_at:
            self._fails_at = None
            self.failed += 1
            out.fill_(0xAA)  # a failed read leaves anything behind
            raise StoreReadError("reading block 'made to fail' failed: Input/output error")
        self._source.read(index, out, cancel)

    def close(self) -> None:
        self._source.close()
