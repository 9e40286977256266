# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vllm_subspec.core.acceptance import Walks
from vllm_subspec.core.compaction import moves

BLOCK = 4


@st.composite
def accepted(draw: st.DrawFn) -> tuple[list[list[int]], list[int], int]:
    """Ascending paths, the position of each row's root, and a seed."""
    paths = [
        sorted(draw(st.sets(st.integers(0, 19), max_size=8)))
        for _ in range(draw(st.integers(1, 4)))
    ]
    committed = [draw(st.integers(0, 11)) for _ in paths]
    return paths, committed, draw(st.integers(0, 99))


def walked(paths: list[list[int]]) -> Walks:
    counts = np.array([len(path) for path in paths])
    return Walks(np.array(sum(paths, []), np.int64), counts, np.zeros(len(paths), np.int64))


@given(accepted())
def test_gather_then_scatter_makes_every_path_contiguous(
    drawn: tuple[list[list[int]], list[int], int],
) -> None:
    paths, committed, seed = drawn
    rows, blocks = len(paths), 8  # 12 positions of prefix and root, 20 nodes
    table = np.random.default_rng(seed).permutation(rows * blocks).reshape(rows, blocks)
    # What every slot holds: the row and the position it was written for.
    memory = np.empty((rows * blocks * BLOCK, 2), int)
    for row in range(rows):
        for position in range(blocks * BLOCK):
            memory[table[row, position // BLOCK] * BLOCK + position % BLOCK] = row, position

    found = moves(walked(paths), committed)
    assert (found.destinations < found.sources).all()
    sources, destinations = found.slots(table, BLOCK)
    before = memory.copy()
    memory[destinations] = memory[sources]

    untouched = np.setdiff1d(np.arange(len(memory)), destinations)
    assert np.array_equal(memory[untouched], before[untouched])
    for row, (path, root) in enumerate(zip(paths, committed, strict=True)):
        kept = [*range(root + 1), *(root + 1 + node for node in path)]
        for position, source in enumerate(kept):
            slot = table[row, position // BLOCK] * BLOCK + position % BLOCK
            assert memory[slot].tolist() == [row, source]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5))
def test_a_chain_moves_nothing(lengths: list[int]) -> None:
    found = moves(walked([list(range(length)) for length in lengths]), [3] * len(lengths))
    assert found.sources.size == found.destinations.size == found.rows.size == 0
