# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Drafted tokens as a scheduler passes them around: a list that knows its shape as a tree."""

from typing import Self, SupportsIndex, overload

import numpy as np
import numpy.typing as npt

from vllm_subspec.core.tree import TokenTree


class DraftTokens(list[int]):
    """The tokens of a drafted tree, node by node, and the tree itself.

    A scheduler that knows only lists of draft tokens stores it, cuts it to what it can schedule
    (a prefix, which is closed under parents, since parents precede their children) and sends it
    to other processes; the shape goes along. It is not to be changed in place.

    Args:
        tree: of n nodes.
        confidence: [n] float64 the draft's confidence in each node (`AcceptanceModel`).
    """

    def __init__(self, tree: TokenTree, confidence: npt.ArrayLike) -> None:
        super().__init__(tree.tokens.tolist())
        self.tree = tree
        self.confidence = np.asarray(confidence, np.float64)
        if self.confidence.shape != (len(tree),):
            raise ValueError(
                f"{len(tree)} nodes need as many confidences, not {self.confidence.shape}"
            )

    @classmethod
    def none(cls) -> Self:
        """No draft at all."""
        return cls(TokenTree.chain([], []), [])

    @overload
    def __getitem__(self, index: SupportsIndex) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> "DraftTokens": ...

    def __getitem__(self, index: SupportsIndex | slice) -> "int | DraftTokens":
        if not isinstance(index, slice):
            return super().__getitem__(index)
        return self.select(np.arange(len(self))[index])

    def select(self, nodes: npt.NDArray[np.integer]) -> Self:
        """Some of the nodes.

        Args:
            nodes: [m] ascending, closed under parents.

        Raises:
            ValueError: a node's parent is not among them.
        """
        if len(nodes) == len(self):
            return self
        return type(self)(self.tree.select(nodes), self.confidence[nodes])
