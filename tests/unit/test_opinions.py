# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vllm_subspec.core.opinions import Judge, Opinions
from vllm_subspec.core.tree import TokenTree


@st.composite
def trees(draw: st.DrawFn) -> tuple[TokenTree, np.ndarray]:
    size = draw(st.integers(0, 12))
    parents = [draw(st.integers(-1, node - 1)) for node in range(size)]
    scores = np.ones(size + 1, np.float32)
    for node, parent in enumerate(parents):
        scores[node] = 0.9 * scores[parent]
    tree = TokenTree(np.arange(size) + 10, np.array(parents, int), scores[:size])
    return tree, np.array(draw(st.lists(st.floats(0, 1), min_size=size, max_size=size)))


@given(trees())
def test_the_rival_is_the_best_child(drawn: tuple[TokenTree, np.ndarray]) -> None:
    tree, confidence = drawn
    said = Opinions.of_tree(tree, confidence, np.zeros(len(tree) + 1, int), np.ones(len(tree) + 1))
    for node in range(-1, len(tree)):
        children = np.flatnonzero(tree.parents == node)
        if not children.size:
            assert said.rivals[node + 1] == -1
            continue
        best = confidence[children].max()
        assert said.rival_confidence[node + 1] == best
        assert said.rivals[node + 1] in tree.tokens[children[confidence[children] == best]]


def opinions(own: list[int], rivals: list[int]) -> Opinions:
    n = len(own)
    return Opinions(np.array(own), np.full(n, 0.9), np.array(rivals), np.full(n, 0.8))


def test_whoever_was_right_more_often_is_believed() -> None:
    said = opinions([1, 1, 1], [-1, 1, 2])
    judge = Judge()
    tokens, probability = judge.choose(said)
    assert tokens.tolist() == [1, 1, 1]
    assert probability[2] < min(probability[:2])
    for _ in range(30):
        judge.observe(said, np.array([1, 1, 2]))
    tokens, probability = judge.choose(said)
    assert tokens.tolist() == [1, 1, 2]
    assert (probability > 0.8).all()
    for _ in range(90):
        judge.observe(said, np.array([3, 1, 1]))
    tokens, probability = judge.choose(said)
    assert tokens.tolist() == [1, 1, 1]
    assert probability[0] < 0.4 < 0.6 < probability[2] < probability[1]


@given(st.integers(1, 30), st.integers(0, 1000))
def test_joined_and_selected(count: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    parts = [
        Opinions(
            random.integers(0, 9, n), random.random(n), random.integers(-1, 9, n), random.random(n)
        )
        for n in random.integers(0, 4, count)
    ]
    joined = Opinions.join(parts)
    start = 0
    for part in parts:
        same = joined.select(np.arange(start, start + part.own.size))
        start += part.own.size
        for name in ("own", "confidence", "rivals", "rival_confidence"):
            assert (getattr(same, name) == getattr(part, name)).all()
