# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Drafts found in the text itself: what followed earlier occurrences of its newest tokens.

Prompt lookup decoding (Saxena 2023; also LLMA, arXiv 2304.04487) takes one earlier occurrence.
Here the continuations of several are merged into a tree: those after the longest matches first, of
equally long ones the most recent first.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from vllm_subspec.core.draft_tokens import DraftTokens
from vllm_subspec.core.tree import TokenTree


def lookup(
    text: npt.NDArray[np.integer],
    shortest: int,
    longest: int,
    depth: int,
    branching: int,
    limit: int,
    estimate: Callable[[npt.ArrayLike], npt.NDArray[np.float64]],
) -> DraftTokens:
    """The tree of what may follow ``text``, scored by how likely its nodes are to be reached.

    The confidence of a node is n / (n + 1) where n newest tokens of the text and the path to the
    node occurred before in this order.

    Args:
        text: [n] tokens, the newest last.
        shortest: tokens that must match, at least 1.
        longest: tokens beyond which matches count as equally long.
        depth: levels of the tree at most.
        branching: continuations that are merged at most.
        limit: nodes at most.
        estimate: of confidences [m] the probabilities that these tokens come next, if those before
            them do and their older siblings do not (`AcceptanceModel.estimate`).
    """
    ends, lengths = _matches(text, shortest, longest)
    order = np.lexsort((-ends, -lengths))
    children: dict[tuple[int, int], int] = {}  # (parent, token) -> node
    tokens: list[int] = []
    parents: list[int] = []
    matched: list[int] = []
    merged = 0
    for match in order:
        if merged == branching or len(tokens) >= limit:
            break
        node, grown = -1, False
        following = text[ends[match] + 1 : ends[match] + 1 + depth].tolist()
        for level, token in enumerate(following):
            parent, node = node, children.get((node, token), -1)
            if node < 0:
                if len(tokens) >= limit:
                    break
                node = children[(parent, token)] = len(tokens)
                tokens.append(token)
                parents.append(parent)
                matched.append(int(lengths[match]) + level)
                grown = True
        merged += grown
    confidence = np.array(matched) / (np.array(matched) + 1.0)
    given = estimate(confidence)
    reached = np.ones(len(tokens) + 1)  # the last entry is the root's, parent -1
    left = np.ones(len(tokens) + 1)  # below each node, what its children so far leave over
    for node, parent in enumerate(parents):
        reached[node] = reached[parent] * left[parent] * given[node]
        left[parent] *= 1 - given[node]
    tree = TokenTree(
        np.array(tokens, np.int32),
        np.array(parents, np.int32),
        reached[:-1].astype(np.float32),
    )
    return DraftTokens(tree, confidence)


def _matches(
    text: npt.NDArray[np.integer], shortest: int, longest: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """[m] last places of the earlier occurrences, and [m] how many tokens match there."""
    ends = np.flatnonzero(text[:-1] == text[-1]) if text.size else np.zeros(0, np.int64)
    lengths = np.ones(ends.size, np.int64)
    for n in range(1, min(longest, text.size)):
        equal = (lengths == n) & (ends >= n)
        equal[equal] = text[ends[equal] - n] == text[-1 - n]
        if not equal.any():
            break
        lengths[equal] += 1
    enough = lengths >= shortest
    return ends[enough], lengths[enough]
