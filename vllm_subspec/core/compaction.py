# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Which K/V moves after a walk, so that the accepted path lies in consecutive slots.

The root's K/V lies at the row's committed length, node i's at i + 1 behind it. A path's nodes
ascend, so the j-th of them lies at or behind the place j + 1 where it belongs. Sources may be
destinations of other moves (of the same row only): read all sources before writing.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_subspec.core.acceptance import Walks

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Moves:
    """K/V to move. All arrays [m] int64; empty when every accepted path is a prefix of its tree,
    as in a chain."""

    rows: Ints
    sources: Ints  # position in the row's sequence
    destinations: Ints  # below the source

    def slots(self, block_table: npt.NDArray[np.integer], block_size: int) -> tuple[Ints, Ints]:
        """Sources and destinations as slots: block number times ``block_size`` plus offset.

        Args:
            block_table: [rows, blocks] block numbers of each row's sequence.
        """

        def slot(positions: Ints) -> Ints:
            blocks = block_table[self.rows, positions // block_size].astype(np.int64)
            return blocks * block_size + positions % block_size

        return slot(self.sources), slot(self.destinations)


def moves(walks: Walks, committed: npt.ArrayLike) -> Moves:
    """The moves that make each row's accepted path contiguous.

    Args:
        committed: [rows] position of each row's root.
    """
    rows = np.repeat(np.arange(walks.counts.size), walks.counts)
    steps = np.arange(rows.size) - np.repeat(np.cumsum(walks.counts) - walks.counts, walks.counts)
    out_of_place = walks.nodes != steps
    rows = rows[out_of_place]
    first = np.asarray(committed, np.int64)[rows] + 1
    return Moves(rows, first + walks.nodes[out_of_place], first + steps[out_of_place])
