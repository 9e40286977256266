# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Do two sets of sampled token sequences come from one distribution?

A permutation test whose statistic is chi-square of the first 1, 2, .. L tokens, summed over
lengths and prompts; beginnings seen fewer than `_RARE` times count as one. If there is no
difference, the label "which engine" is exchangeable among the samples of one prompt, so the test
is exact for every sample size, although the terms of the sum depend on each other.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

Sequences = Sequence[tuple[int, ...]]

_RARE = 10


def p_value(
    first: Sequence[Sequences], second: Sequence[Sequences], *, permutations: int = 2000
) -> float:
    """Probability of a difference at least this large if there is none.

    Args:
        first, second: for each prompt the sampled sequences, of any lengths, with one engine and
            with the other. Same prompts, in the same order.
        permutations: relabelings drawn, by a fixed seed; the least p is 1 / (permutations + 1).
    """
    rng = np.random.default_rng(0)
    statistic = np.zeros(permutations + 1)  # of what was observed, then of each relabeling
    for mine, other in zip(first, second, strict=True):
        cell_of = _cells(Counter(mine) + Counter(other))
        cells = sorted(set(cell_of.values()))
        counts = np.array(
            [[Counter(map(cell_of.__getitem__, side))[c] for c in cells] for side in (mine, other)]
        )
        total = counts.sum(axis=0)
        share = len(mine) / total.sum()
        drawn = rng.multivariate_hypergeometric(total, len(mine), permutations, method="marginals")
        ours = np.concatenate([counts[:1], drawn])
        for labels in zip(*cells, strict=True):
            belongs = (np.array(labels)[:, None] == np.unique(labels)).astype(float)
            pooled = total @ belongs
            statistic += ((ours @ belongs - share * pooled) ** 2 / pooled).sum(axis=1)
    return float((np.sum(statistic[1:] >= statistic[0] - 1e-9) + 1) / (permutations + 1))


def _cells(seen: Counter[tuple[int, ...]]) -> dict[tuple[int, ...], tuple[int, ...]]:
    """For each sequence a label of its beginning of every length; -1 for all rare ones."""
    lengths = range(1, max(map(len, seen)) + 1)
    beginnings: Counter[tuple[int, ...]] = Counter()
    for sequence, count in seen.items():
        beginnings.update({sequence[:n]: count for n in {min(m, len(sequence)) for m in lengths}})
    label = {b: i if n >= _RARE else -1 for i, (b, n) in enumerate(sorted(beginnings.items()))}
    return {sequence: tuple(label[sequence[:n]] for n in lengths) for sequence in seen}
