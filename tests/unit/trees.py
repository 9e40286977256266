# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Random token trees whose siblings hold different tokens, as drafters make them."""

import numpy as np
from hypothesis import strategies as st

from vllm_subspec.core.tree import TokenTree


@st.composite
def token_trees(draw: st.DrawFn, most: int = 20) -> TokenTree:
    size = draw(st.integers(0, most))
    parents = [draw(st.integers(-1, i - 1)) for i in range(size)]
    # A node's rank among its siblings is its token: small tokens, often the same in other places.
    tokens = [parents[:i].count(parents[i]) for i in range(size)]
    scores: list[float] = []
    for parent in parents:
        scores.append((scores[parent] if parent >= 0 else 1.0) * 0.5)
    return TokenTree(np.array(tokens, int), np.array(parents, int), np.array(scores, float))
