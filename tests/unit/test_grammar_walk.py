# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""A walk through a tree says of each node what the grammar says after that node's path alone."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.engine.arg_utils import EngineArgs
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.structured_output.backend_guidance import GuidanceBackend
from vllm.v1.structured_output.backend_outlines import OutlinesBackend
from vllm.v1.structured_output.backend_types import StructuredOutputOptions
from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend

from tests.unit.trees import token_trees
from vllm_subspec.core.grammar_walk import ROOT, best_path, fill_masks, valid_nodes, walk
from vllm_subspec.core.tree import TokenTree

# How vLLM calls xgrammar.
pytestmark = pytest.mark.filterwarnings("ignore:max_rollback_tokens:DeprecationWarning")

MODEL = Path(__file__).parents[2] / "models" / "pystd-1m"
END = 1  # of the automata below; a frequent token of `token_trees`
STATES = 4
REFUSED = -1


@dataclass
class Automaton:
    """A finite automaton that is strict about how it is used.

    Args:
        follows: [STATES, tokens] the next state, or `REFUSED`. After `END` nothing is accepted.
    """

    follows: list[list[int]]
    taken: list[int] = field(default_factory=list)
    states: list[int] = field(default_factory=lambda: [0])
    accepts: int = 0
    deepest: int = 0

    def accept_tokens(self, request_id: str, tokens: list[int], /) -> bool:
        assert self.validate_tokens(tokens) == tokens, "a refusal is logged as an error"
        for token in tokens:
            self.states.append(self.follows[self.states[-1]][token])
            self.taken.append(token)
        self.accepts += 1
        return True

    def validate_tokens(self, tokens: list[int], /) -> list[int]:
        state, accepted = self.states[-1], list[int]()
        for token in [] if self.is_terminated() else tokens:
            state = self.follows[state][token]
            if state == REFUSED:
                break
            accepted.append(token)
            if token == END:
                break
        return accepted

    def rollback(self, num_tokens: int, /) -> None:
        assert 1 <= num_tokens <= len(self.taken)
        self.deepest = max(self.deepest, num_tokens)
        del self.taken[-num_tokens:], self.states[-num_tokens:]

    def is_terminated(self) -> bool:
        return self.taken[-1:] == [END]

    def fill_bitmask(self, bitmask: torch.Tensor, index: int, /) -> None:
        assert not self.is_terminated()
        allowed = self.follows[self.states[-1]]
        bitmask[index] = sum(1 << token for token, state in enumerate(allowed) if state != REFUSED)


@st.composite
def automata(draw: st.DrawFn) -> Automaton:
    states = st.sampled_from([REFUSED, *range(STATES)])
    rows = st.lists(states, min_size=20, max_size=20)
    return Automaton(draw(st.lists(rows, min_size=STATES, max_size=STATES)))


def paths(tree: TokenTree) -> list[list[int]]:
    """For each node the tokens from the root down to it."""
    return [tree.tokens[np.flatnonzero(row)].tolist() for row in tree.ancestor_mask()]


def replayed_mask(grammar: Any, path: list[int], words: int) -> list[int]:
    """The mask of ``grammar``, which is fresh, after ``path``."""
    mask = torch.zeros(1, words, dtype=torch.int32)
    for token in path:
        assert grammar.accept_tokens("", [token])
    if grammar.is_terminated():
        return [-1] * words
    grammar.fill_bitmask(mask, 0)
    return mask[0].tolist()


def expected_masks(
    tree: TokenTree, valid: list[int], fresh: Callable[[], Any], words: int
) -> list[list[int]]:
    masks = {ROOT: replayed_mask(fresh(), [], words)}
    for node, path in enumerate(paths(tree)):
        inherited = masks[int(tree.parents[node])]
        masks[node] = replayed_mask(fresh(), path, words) if node in valid else inherited
    return [masks[node] for node in range(-1, len(tree))]


@given(token_trees(), automata())
def test_valid_nodes_are_those_whose_path_is_accepted(tree: TokenTree, grammar: Automaton) -> None:
    expected = [i for i, path in enumerate(paths(tree)) if grammar.validate_tokens(path) == path]
    valid = valid_nodes(tree, grammar, "request")
    assert valid.tolist() == expected
    assert grammar.taken == [], "as found"
    tree.select(valid)  # closed under parents


@given(token_trees(), automata())
def test_each_node_is_visited_once_in_its_own_state(tree: TokenTree, grammar: Automaton) -> None:
    seen: dict[int, list[int]] = {}

    def visit(node: int) -> None:
        assert node not in seen
        seen[node] = grammar.taken.copy()

    accepted = walk(tree, grammar, "request", visit)
    assert seen == {ROOT: []} | {node: paths(tree)[node] for node in accepted.tolist()}
    assert grammar.accepts == len(accepted)
    assert grammar.deepest <= tree.depths.max(initial=0)


@given(token_trees(), automata())
def test_masks_are_those_after_each_path(tree: TokenTree, grammar: Automaton) -> None:
    masks = torch.zeros(1 + len(tree), 1, dtype=torch.int32)
    valid = valid_nodes(tree, grammar, "request").tolist()
    fill_masks(tree, grammar, "request", masks)
    expected = expected_masks(tree, valid, lambda: Automaton(grammar.follows), words=1)
    assert masks.tolist() == expected
    assert grammar.taken == []


@given(token_trees(), automata(), st.integers(0, 10))
def test_an_error_leaves_the_grammar_as_found(
    tree: TokenTree, grammar: Automaton, calls: int
) -> None:
    remaining = calls

    def visit(node: int) -> None:
        nonlocal remaining
        remaining -= 1
        if remaining < 0:
            raise OSError("visit")

    committed = grammar.validate_tokens([0, 0])
    if committed:
        grammar.accept_tokens("", committed)
    size = len(valid_nodes(tree, grammar, "request"))
    if calls <= size:
        with pytest.raises(OSError, match="visit"):
            walk(tree, grammar, "request", visit)
    else:
        walk(tree, grammar, "request", visit)
    assert grammar.taken == committed


def test_a_deep_tree_needs_no_recursion() -> None:
    size = 2000
    tree = TokenTree.chain([0] * size, np.ones(size))
    grammar = Automaton([[0] * 20])
    assert valid_nodes(tree, grammar, "request").tolist() == list(range(size))
    assert grammar.taken == []


def test_nothing_is_valid_after_the_end() -> None:
    grammar = Automaton([[0] * 20])
    grammar.accept_tokens("", [END])
    tree = TokenTree(np.array([0, END]), np.array([-1, -1]), np.array([0.5, 0.5]))
    masks = torch.zeros(3, 1, dtype=torch.int32)
    assert valid_nodes(tree, grammar, "request").size == 0
    fill_masks(tree, grammar, "request", masks)
    assert masks.tolist() == [[-1], [-1], [-1]]
    assert grammar.taken == [END]


@given(token_trees())
def test_the_best_path_goes_to_the_first_child(tree: TokenTree) -> None:
    children = [np.flatnonzero(tree.parents == node).tolist() for node in range(-1, len(tree))]
    expected: list[int] = []
    while children[1 + (expected[-1] if expected else ROOT)]:
        expected.append(children[1 + (expected[-1] if expected else ROOT)][0])
    assert best_path(tree).tolist() == expected
    assert tree.select(best_path(tree)).is_chain


# vLLM's grammars

REGEX = "(a[ab]|b[acd])*(cd|ce?)"  # siblings have different followers
COMMITTED = "ab"  # accepted before any draft
BACKENDS = [XgrammarBackend, GuidanceBackend, OutlinesBackend]


@dataclass
class Compiled:
    backend: Any
    alphabet: list[int]  # the tokens that occur in drafts
    committed: list[int]

    def fresh(self, committed: bool = True) -> Any:
        grammar = self.backend.compile_grammar(
            StructuredOutputOptions.REGEX,
            REGEX,
            stop_token_ids={self.backend.tokenizer.eos_token_id},
        )
        if committed:
            assert grammar.accept_tokens("", self.committed)
        return grammar


@pytest.fixture(scope="module", params=BACKENDS, ids=lambda backend: backend.__name__)
def compiled(request: pytest.FixtureRequest) -> Compiled:
    config = EngineArgs(
        model=str(MODEL),
        max_model_len=512,
        speculative_config={
            "method": "ngram",
            "num_speculative_tokens": 20,
            "prompt_lookup_max": 2,
        },
        enforce_eager=True,
    ).create_engine_config()
    tokenizer = cached_tokenizer_from_config(config.model_config)
    backend = request.param(config, tokenizer, config.model_config.get_vocab_size())

    def encode(text: str) -> list[int]:
        tokens: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return tokens

    alphabet = [token for letter in "abcde" for token in encode(letter)]
    return Compiled(backend, [*alphabet, tokenizer.eos_token_id], encode(COMMITTED))


def state(grammar: Any) -> list[Any]:
    names = ("num_processed_tokens", "_is_terminated", "terminated", "rollback_lag")
    return [getattr(grammar, name, None) for name in names]


def spelled(tree: TokenTree, alphabet: list[int]) -> TokenTree:
    """``tree`` with ranks replaced by tokens, some children of a node left without."""
    within = np.array(alphabet)[tree.tokens % len(alphabet)]
    return TokenTree(within, tree.parents, tree.scores)


@given(st.data())
def test_vllms_grammars_go_through_a_tree(compiled: Compiled, data: st.DataObject) -> None:
    alphabet = data.draw(st.permutations(compiled.alphabet))
    tree = spelled(data.draw(token_trees()), alphabet)
    grammar = compiled.fresh()
    before = state(grammar)
    valid = valid_nodes(tree, grammar, "request")
    expected = [i for i, path in enumerate(paths(tree)) if grammar.validate_tokens(path) == path]
    assert valid.tolist() == expected
    masks = compiled.backend.allocate_token_bitmask(1 + len(tree))
    fill_masks(tree, grammar, "request", masks)
    assert masks.tolist() == expected_masks(tree, expected, compiled.fresh, masks.shape[1])
    assert state(grammar) == before
    after = replayed_mask(grammar, [], masks.shape[1])
    assert after == masks[0].tolist()
    grammar.rollback(len(compiled.committed))
    start = replayed_mask(grammar, [], masks.shape[1])
    assert start == replayed_mask(compiled.fresh(committed=False), [], masks.shape[1])


def test_the_end_is_valid_where_nothing_else_is(compiled: Compiled) -> None:
    """Also as a second child, and with further nodes behind it."""
    a, b, c, d, e, end = compiled.alphabet
    tree = TokenTree(
        np.array([b, c, d, e, a, end, b, end, a, end]),
        np.array([-1, -1, 1, 1, 2, 2, 3, 3, 5, 1]),
        np.full(10, 0.5),
    )
    grammar = compiled.fresh()
    before = state(grammar)
    assert valid_nodes(tree, grammar, "request").tolist() == [0, 1, 2, 3, 5, 7, 9]
    assert state(grammar) == before
