# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_subspec.core.acceptance import verdicts, walk
from vllm_subspec.core.acceptance_model import AcceptanceModel
from vllm_subspec.core.cost import Round
from vllm_subspec.core.depth import DepthController
from vllm_subspec.core.draft_tokens import DraftTokens
from vllm_subspec.core.growth import Beam, Nodes, grow

VOCAB = 7
TEMPERATURE = 0.2


def logits_after(path: tuple[int, ...], steps: float | None = None) -> torch.Tensor:
    """[VOCAB] a draft's logits after a path; in ``steps`` of that size, for ties."""
    rng = np.random.default_rng([len(path), *path])
    logits = rng.normal(0, 0.4, VOCAB)
    if steps is not None:
        logits = np.round(logits / steps) * steps
    logits[rng.random(VOCAB) < 0.1] = -np.inf
    logits[rng.integers(VOCAB)] = 0.4
    return torch.tensor(logits, dtype=torch.float32)


class Drafted:
    """A beam, and the path of every node, kept by the caller."""

    def __init__(self, beam: Beam, roots: list[int], steps: float | None = None) -> None:
        self.beam, self.steps = beam, steps
        self.paths: dict[tuple[int, int], tuple[int, ...]] = {
            (row, -1): (root,) for row, root in enumerate(roots)
        }

    def logits(self, nodes: Nodes) -> torch.Tensor:
        for row, node, parent, token in zip(
            nodes.rows, nodes.indices, nodes.parents, nodes.tokens, strict=True
        ):
            if node >= 0:
                self.paths[int(row), int(node)] = (*self.paths[int(row), int(parent)], int(token))
        return torch.stack(
            [
                logits_after(self.paths[int(row), int(node)], self.steps)
                for row, node in zip(nodes.rows, nodes.indices, strict=True)
            ]
        )

    def extend(self) -> None:
        if self.beam.frontier.rows.size:
            self.beam.extend(self.logits(self.beam.frontier))


def reference_levels(root: int, depth: int, branching: int) -> list[list[tuple[tuple, float]]]:
    """Level by level the paths (below the root) that a beam keeps, with their probabilities."""
    levels: list[list[tuple[tuple, float]]] = []
    frontier: list[tuple[tuple, float]] = [((), 1.0)]
    for _ in range(depth):
        candidates = []
        for path, probability in frontier:
            chances = torch.softmax(logits_after((root, *path)).double() / TEMPERATURE, dim=0)
            for token in np.argsort(-chances.numpy())[:branching]:
                if chances[token] > 0:
                    candidates.append(((*path, int(token)), probability * float(chances[token])))
        frontier = sorted(candidates, key=lambda c: -c[1])[:branching]
        levels.append(frontier)
    return levels


def paths_of(draft: DraftTokens) -> list[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(draft.tree.tokens, draft.tree.parents, strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), int(token)))
    return paths


def confidence_of(root: int, path: tuple[int, ...]) -> float:
    """The share of the last token in what the better ones leave over."""
    chances = torch.softmax(logits_after((root, *path[:-1])).double() / TEMPERATURE, dim=0)
    better = chances[chances > chances[path[-1]]].sum()
    return float(chances[path[-1]] / (1 - better))


ROWS = st.lists(
    st.tuples(st.integers(0, 50), st.integers(0, 6), st.integers(0, 40)), min_size=1, max_size=4
)


def grown(
    rows: list[tuple[int, int, int]], branching: int, lengths: list[int]
) -> list[DraftTokens]:
    roots, depths, limits = (list(column) for column in zip(*rows, strict=True))
    beam = Beam(
        roots, depths, limits, [999] * len(roots), branching, TEMPERATURE, AcceptanceModel()
    )
    drafted = Drafted(beam, roots)
    for _ in range(6):
        drafted.extend()
    return beam.drafts(lengths)


@given(ROWS, st.integers(1, 8))
def test_beam_equals_brute_force(rows: list[tuple[int, int, int]], branching: int) -> None:
    drafts = grown([(root, depth, 999) for root, depth, _ in rows], branching, [999] * len(rows))
    for (root, depth, _), draft in zip(rows, drafts, strict=True):
        levels = reference_levels(root, depth, branching)
        expected = [path for level in levels for path, _ in level]
        assert paths_of(draft) == expected
        assert len(set(expected)) == len(expected)
        assert draft.confidence == pytest.approx(
            [confidence_of(root, path) for path in expected], rel=1e-3, abs=1e-4
        )


@given(ROWS, st.integers(1, 5), st.data())
def test_cut_keeps_the_best_closed_under_parents_and_the_best_siblings(
    rows: list[tuple[int, int, int]], branching: int, data: st.DataObject
) -> None:
    whole = grown([(root, depth, 999) for root, depth, _ in rows], branching, [999] * len(rows))
    for draft in whole:
        for parent in range(-1, len(draft.tree)):
            children = draft.tree.scores[draft.tree.parents == parent]
            above = draft.tree.scores[parent] if parent >= 0 else 1.0
            assert children.sum() <= above * (1 + 1e-5)
            assert (np.diff(children) <= 0).all()
    lengths = [data.draw(st.integers(0, 40)) for _ in rows]
    cut = grown([(root, depth, limit) for root, depth, limit in rows], branching, lengths)
    for full, draft, (_, _, limit), length in zip(whole, cut, rows, lengths, strict=True):
        size = min(len(full.tree), limit, length)
        if limit == 0:
            assert len(draft.tree) == 0
            continue
        best = np.sort(np.argsort(-full.tree.scores, kind="stable")[:size])
        every = paths_of(full)
        kept = [every[node] for node in best]
        assert paths_of(draft) == kept
        assert draft.tree.scores.tolist() == full.tree.scores[best].tolist()
        assert draft.confidence.tolist() == full.confidence[best].tolist()
        for path in kept:  # a worse sibling never without the better ones
            better = [
                p for p in every if p[:-1] == path[:-1] and every.index(p) < every.index(path)
            ]
            assert set(better) <= set(kept)


@given(st.lists(st.integers(0, 99), min_size=1, max_size=5), st.sampled_from([0.4, 0.8]))
def test_branching_one_is_the_greedy_chain_also_in_ties(roots: list[int], steps: float) -> None:
    depth = 12
    full = [depth] * len(roots)
    beam = Beam(roots, full, full, [999] * len(roots), 1, TEMPERATURE, AcceptanceModel())
    drafted = Drafted(beam, roots, steps)
    for _ in range(depth):
        drafted.extend()
    for root, draft in zip(roots, beam.drafts(full), strict=True):
        path = [root]
        for _ in range(depth):
            path.append(int(logits_after(tuple(path), steps).argmax()))
        assert draft.tree.is_chain
        assert draft.tree.tokens.tolist() == path[1:]
        survival = np.cumprod(AcceptanceModel().estimate(draft.confidence))
        assert draft.tree.scores == pytest.approx(survival, rel=1e-5)


@given(
    st.integers(0, 99),
    st.sampled_from([5, 511, 2048, 5000]),
    st.sampled_from([0.0, 0.25, 4.0]),
    st.integers(1, 6),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_children_are_the_best_tokens_of_any_vocabulary(
    seed: int, vocab: int, spread: float, branching: int, dtype: torch.dtype
) -> None:
    """``spread`` 0: all tie; 0.25: many do, in bfloat16 and rounded; 4: few."""
    logits = torch.randn(3, vocab, generator=torch.Generator().manual_seed(seed))
    logits = (logits * spread).round(decimals=1).to(dtype)
    beam = Beam([0] * 3, [1] * 3, [9] * 3, [9] * 3, branching, 1.0, AcceptanceModel())
    beam.extend(logits)
    for row, draft in enumerate(beam.drafts([9] * 3)):
        tokens = draft.tree.tokens.tolist()
        size = min(branching, vocab)
        assert len(set(tokens)) == len(tokens) == size
        assert tokens[0] == int(logits[row].argmax())
        best = logits[row].sort(descending=True).values[:size]
        assert logits[row, tokens].tolist() == best.tolist()
        chances = torch.softmax(logits[row].double(), dim=0)[tokens].numpy()
        left = 1 - np.cumsum(chances) + chances
        exact = left > 1e-3  # a smaller rest is lost in the rounding of float32
        assert draft.confidence[exact] == pytest.approx((chances / left)[exact], rel=1e-2)


def test_deep_paths_keep_their_order_below_the_smallest_float32() -> None:
    depth = 60
    beam = Beam([0], [depth + 1], [999], [999], 2, TEMPERATURE, AcceptanceModel())
    for _ in range(depth):
        logits = torch.zeros(beam.frontier.rows.size, 4000)
        logits[:, 7], logits[:, 8] = 0.02, 0.01
        beam.extend(logits)
    assert beam.frontier.scores[0] < np.log(np.finfo(np.float32).tiny)
    assert beam.frontier.scores[0] > beam.frontier.scores[1]
    tree = beam.drafts([999])[0].tree
    best = np.unique(tree.depths, return_index=True)[1]  # of each level the first
    assert tree.tokens[best].tolist() == [7] * depth
    assert tree.parents[best].tolist() == [-1, *best[:-1]]


@given(ROWS, st.integers(1, 4))
def test_displaced_is_the_last_node_that_still_fits(
    rows: list[tuple[int, int, int]], branching: int
) -> None:
    roots, depths, limits = (list(column) for column in zip(*rows, strict=True))
    beam = Beam(
        roots, depths, limits, [999] * len(roots), branching, TEMPERATURE, AcceptanceModel()
    )
    drafted = Drafted(beam, roots)
    for _ in range(6):
        drafted.extend()
        for row, floor in zip(beam.frontier.rows, beam.displaced, strict=True):
            own = sorted((s for s in beam.survival[row] if s >= 0), reverse=True)
            assert floor == (own[limits[row] - 1] if len(own) >= limits[row] else 0.0)


def test_invalid_options_are_refused() -> None:
    with pytest.raises(ValueError, match="branching"):
        Beam([0], [1], [1], [1], 0, TEMPERATURE, AcceptanceModel())
    with pytest.raises(ValueError, match="draft_temperature"):
        Beam([0], [1], [1], [1], 1, 0.0, AcceptanceModel())


# --- growth against a known text, with a clock that is computed ----------------------------------


@dataclass(frozen=True)
class Regime:
    rows: int
    step_seconds: tuple[float, float]  # for a step, for each node in it
    verify_seconds: tuple[float, float]  # for a pass, for each token in it


REGIMES = {
    "stream": Regime(1, (0.012, 0.0002), (0.6, 0.002)),
    "stream, dear nodes": Regime(2, (0.005, 0.004), (0.4, 0.01)),
    "resident": Regime(1, (0.010, 0.0005), (0.03, 0.006)),
    "resident, dear nodes": Regime(1, (0.001, 0.005), (0.02, 0.015)),
}
# The raw probabilities of the best three tokens after a node, by the kind of its place.
_PLACES = np.array([[0.97, 0.01, 0.005], [0.6, 0.3, 0.05], [0.4, 0.35, 0.2]])
_DEPTH, _BRANCHING, _NODES = 12, 3, 32


class Text:
    """A target that draws from a calibrated draft's raw distribution: 4 tokens, a place's kind
    depends on the round and the depth only."""

    def __init__(self, regime: Regime, seed: int) -> None:
        self.regime, self.rng = regime, np.random.default_rng(seed)

    def play(
        self, controller: DepthController, fixed_depth: int = 0, branching: int = _BRANCHING
    ) -> Round:
        """One round, as deep and wide as pays or, given a depth, a whole beam of that depth."""
        rows = self.regime.rows
        kinds = self.rng.choice(3, size=(rows, _DEPTH + 1), p=[0.8, 0.15, 0.05])
        raw = np.concatenate([_PLACES, 1 - _PLACES.sum(axis=1, keepdims=True)], axis=1)
        tokens = (self.rng.random((rows, _DEPTH + 1, 1)) > raw[kinds].cumsum(axis=2)).sum(axis=2)
        depths, limits = [fixed_depth or _DEPTH] * rows, [_NODES] * rows
        acceptance = controller.acceptance
        beam = Beam([0] * rows, depths, limits, [999] * rows, branching, TEMPERATURE, acceptance)

        sizes: list[int] = []

        def expand(nodes: Nodes) -> torch.Tensor:
            sizes.append(nodes.rows.size)
            return torch.tensor(np.log(raw[kinds[nodes.rows, beam.depth]]))

        if fixed_depth:
            for _ in range(fixed_depth):
                beam.extend(expand(beam.frontier))
            drafts = beam.drafts(limits)
        else:
            drafts = grow(beam, controller, expand)
        emitted = 0
        for row, draft in enumerate(drafts):
            sampled = tokens[row, np.append(0, draft.tree.depths)]
            path, _ = walk(draft.tree, sampled)
            emitted += len(path) + 1
            nodes, accepted, first = verdicts(draft.tree, path)
            acceptance.observe(draft.confidence[nodes], accepted, first)
        verified = sum(len(draft.tree) + 1 for draft in drafts)
        step_seconds = [np.dot(self.regime.step_seconds, [1, size]) for size in sizes]
        verify_seconds = np.dot(self.regime.verify_seconds, [1, verified])
        done = Round(rows, sizes, step_seconds, verified, emitted, verify_seconds)
        controller.observe_round(done)
        return done


def throughput(rounds: list[Round]) -> float:
    seconds = sum(r.draft_seconds + r.verify_seconds for r in rounds)
    return sum(r.emitted_tokens for r in rounds) / seconds


@pytest.mark.parametrize("name", REGIMES)
def test_grown_trees_reach_the_best_fixed_beam_or_chain(name: str) -> None:
    """Also where nodes are dear: there the tree thins out to what a chain would be."""
    controller, text = DepthController(_DEPTH), Text(REGIMES[name], 3)
    reached = throughput([text.play(controller) for _ in range(400)][200:])

    def fixed(depth: int, branching: int) -> float:
        text, other = Text(REGIMES[name], 3), DepthController(_DEPTH)
        return throughput([text.play(other, depth, branching) for _ in range(400)][200:])

    best = max(fixed(depth, branching) for depth in (1, 3, 12) for branching in (1, 3))
    assert reached >= 0.95 * best
    assert controller.costs.rate(REGIMES[name].rows) == pytest.approx(reached, rel=0.3)
