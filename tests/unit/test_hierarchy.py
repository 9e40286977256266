# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""A hierarchy drafts what its intermediate model would have drafted alone, or, where that turned
out better, what the inner drafter proposed. The intermediate is a function of the text here: the
engine's own are tested in `tests/engine`."""

from collections.abc import Sequence

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_subspec.core.acceptance import Walks
from vllm_subspec.core.cost import ExpectedCosts, Round
from vllm_subspec.core.draft_tokens import DraftTokens
from vllm_subspec.core.opinions import Opinions
from vllm_subspec.core.resting import Reading
from vllm_subspec.core.sequence import FixedSequence, SequenceController
from vllm_subspec.core.tree import TokenTree
from vllm_subspec.drafters.base import ComputedRow, Drafting, DraftRow
from vllm_subspec.drafters.hierarchy import Hierarchy, SequenceDraft

VOCAB = 7
CPU = torch.device("cpu")


def logits_after(text: Sequence[int]) -> torch.Tensor:
    """Of a language whose next token depends on the last three."""
    generator = torch.Generator().manual_seed(hash(tuple(text[-3:])) % (1 << 31))
    return torch.randn(VOCAB, generator=generator)


def next_token(text: Sequence[int]) -> int:
    return int(logits_after(text).argmax())


class FunctionIntermediate:
    """Remembers what it was asked, as pages would, and that it is asked in order."""

    def __init__(self) -> None:
        self.kept: dict[str, list[int]] = {}
        self.passes = 0
        self._rows: list[DraftRow] = []
        self._drafts: list[DraftTokens] = []

    def verify(self, rows: list[DraftRow], drafts: list[DraftTokens]) -> torch.Tensor:
        self.passes += 1
        self._rows, self._drafts = rows, drafts
        found = []
        for row, draft in zip(rows, drafts, strict=True):
            text = row.history.tolist()
            kept = self.kept.get(row.request_id, text[:-1])
            assert kept == text[:-1], "the accepted path of the pass before"
            assert 1 + len(draft) <= row.slots
            found.append(logits_after(text))
            for node in range(len(draft)):
                path, at = [], node
                while at >= 0:
                    path.append(int(draft.tree.tokens[at]))
                    at = int(draft.tree.parents[at])
                found.append(logits_after(text + path[::-1]))
        return torch.stack(found)

    def keep(self, walks: Walks) -> None:
        for row, draft, path in zip(self._rows, self._drafts, walks.paths, strict=True):
            tokens = [draft[int(node)] for node in path]
            self.kept[row.request_id] = row.history.tolist() + tokens

    def follow(self, rows: list[ComputedRow]) -> None:
        raise AssertionError("nobody follows here")


class RandomDrafter:
    """Trees whose first path is right up to some depth; siblings are wrong."""

    max_depth = 64
    last = Drafting([1], [0.0])

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)

    def pays(self, rows: int, reading: Reading | None = None) -> bool:
        raise AssertionError("whether it pays is for the outer drafter to say")

    def expect(self, costs: ExpectedCosts) -> None:
        raise AssertionError("what rounds cost is the outer drafter's affair")

    def observe_plain(self, rows: int, seconds: float, pure: bool) -> None:
        raise AssertionError("whoever drafts in passes has no plain ones")

    def propose(self, rows: list[DraftRow]) -> list[DraftTokens]:
        drafts = []
        for row in rows:
            assert row.depth >= 1 and row.limit >= 1
            text, parent = row.history.tolist(), -1
            tokens: list[int] = []
            parents: list[int] = []
            for _ in range(int(self._random.integers(0, min(row.depth, 4) + 1))):
                right = next_token(text)
                wrong = (right + 1) % VOCAB
                first = self._random.random() < 0.5
                for token in [right, wrong] if first else [wrong, right]:
                    if len(tokens) < row.limit:
                        tokens.append(token)
                        parents.append(parent)
                ours = len(tokens) - (2 if first else 1)
                if ours < 0 or tokens[ours] != right:
                    break
                parent = ours
                text.append(right)
            scores = 0.5 ** np.arange(1, len(tokens) + 1)
            tree = TokenTree(np.array(tokens, int), np.array(parents, int), scores)
            drafts.append(DraftTokens(tree, np.full(len(tokens), 0.5)))
        return drafts

    def follow(self, rows: list[ComputedRow]) -> None:
        raise AssertionError("nobody follows here")

    def observe(self, drafts: Sequence[DraftTokens], walks: Walks) -> None:
        assert len(drafts) == walks.counts.size

    def observe_round(self, done: Round) -> None:
        assert done.emitted_tokens >= done.rows


def opinion(row: DraftRow, draft: list[int]) -> list[bool]:
    """Of each drafted token whether it is the intermediate's own."""
    text, own = row.history.tolist(), []
    for token in draft:
        own.append(token == next_token(text))
        text.append(token)
    return own


def believe(hierarchy: Hierarchy, rivals: bool) -> None:
    """Where the two differ, the one or the other is always right."""
    ones = np.ones(50, np.int64)
    said = Opinions(ones, np.linspace(0, 1, 50), 2 * ones, np.linspace(0, 1, 50))
    for _ in range(20):
        hierarchy.judge.observe(said, 2 * ones if rivals else ones)


rows_of = st.lists(
    st.tuples(
        st.lists(st.integers(0, VOCAB - 1), min_size=3, max_size=9),
        st.integers(1, 12),  # depth
        st.integers(1, 12),  # limit
        st.integers(1, 24),  # slots
    ),
    min_size=1,
    max_size=4,
)


@given(rows_of, st.integers(1, 9), st.integers(0, 1 << 20), st.booleans())
def test_a_sequence_is_as_long_as_asked_and_believes_the_better_one(
    asked: list[tuple[list[int], int, int, int]], least: int, seed: int, rivals: bool
) -> None:
    rows = [
        DraftRow(i, str(i), np.array(text, np.int32), depth, limit, slots)
        for i, (text, depth, limit, slots) in enumerate(asked)
    ]
    intermediate, inner = FunctionIntermediate(), RandomDrafter(seed)
    hierarchy = Hierarchy(intermediate, inner, FixedSequence(16, least), 8, 0.2, CPU)
    believe(hierarchy, rivals)
    drafts = hierarchy.propose(rows)
    assert len(hierarchy.last.nodes) == len(hierarchy.last.seconds) == intermediate.passes
    for row, draft in zip(rows, drafts, strict=True):
        most = min(row.depth, row.limit)
        assert min(least, most, row.slots) <= len(draft) <= most
        assert draft.tree.is_chain
        assert isinstance(draft, SequenceDraft)
        own, rival = np.array(opinion(row, list(draft))), np.array(draft.said.rivals)
        differ = (rival >= 0) & (rival != draft.said.own)
        assert (own == ~(differ & rivals)).all()
        assert (np.array(list(draft))[~own] == rival[~own]).all()


def test_growth_ends_where_nothing_is_gained() -> None:
    """Passes that cost as much as the target's own and add little are not taken."""

    def drafted(step_seconds: float) -> int:
        growth = SequenceController(32, 4)
        for _ in range(40):
            growth.observe_round(Round(1, [8] * 4, [step_seconds] * 4, 9, 6, 1.0))
        hierarchy = Hierarchy(FunctionIntermediate(), RandomDrafter(1), growth, 8, 0.2, CPU)
        row = DraftRow(0, "a", np.array([1, 2, 3], np.int32), 32, 32, 64)
        (draft,) = hierarchy.propose([row])
        return len(draft)

    assert drafted(1.0) < drafted(0.001)
