# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Structured output: valid, and what the engine without speculation answers."""

import json
import re
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams

from tests.engine.helpers import (
    CHAIN,
    ROUGH,
    Answer,
    Engines,
    assert_trees_were_tried,
    draft_counts,
    encode,
    generate,
    greedy,
    source_prompts,
)

# All of it ends by itself: this model of source code never closes a free string in time.
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["class", "function", "module"]},
        "public": {"type": "boolean"},
        "lines": {"type": "array", "items": {"enum": [1, 2, 3, 5, 8]}, "maxItems": 6},
        "parent": {"anyOf": [{"enum": ["object", "Exception"]}, {"type": "null"}]},
    },
    "required": ["kind", "public", "lines", "parent"],
    "additionalProperties": False,
}
REGEX = r"def [a-z]{2,8}\((self|cls)(, [a-z]{1,6}){0,3}\):"
CHOICE = ["ValueError", "TypeError", "KeyError: missing", "RuntimeError: wrong thread"]

# White space between a schema's tokens is free, and this model would go on with it for ever.
SETTINGS: dict[str, Any] = {
    "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True}
}

CONSTRAINTS: list[StructuredOutputsParams | None] = [
    StructuredOutputsParams(json=SCHEMA),
    StructuredOutputsParams(regex=REGEX),
    StructuredOutputsParams(choice=CHOICE),
    None,  # an unconstrained neighbour
]
PROMPTS = [
    *[encode(text) for text in ('{"kind": "class", "public":', "class Node:\n    ", "    raise ")],
    *source_prompts(17, 8, 120),
]
KINDS = [i % len(CONSTRAINTS) for i in range(len(PROMPTS))]


def params(temperature: float) -> list[SamplingParams]:
    return [
        SamplingParams(
            temperature=temperature,
            max_tokens=120 if CONSTRAINTS[kind] is not None else 60,
            structured_outputs=CONSTRAINTS[kind],
            ignore_eos=CONSTRAINTS[kind] is None,
            seed=i,
        )
        for i, kind in enumerate(KINDS)
    ]


def assert_valid(answer: Answer, kind: int) -> None:
    if kind == 3:
        assert len(answer.tokens) == 60
        return
    assert answer.finish_reason == "stop"
    if kind == 0:
        value = json.loads(answer.text)
        assert sorted(value) == sorted(SCHEMA["required"])
        assert value["kind"] in SCHEMA["properties"]["kind"]["enum"]
        assert isinstance(value["public"], bool)
        assert len(value["lines"]) <= 6 and set(value["lines"]) <= {1, 2, 3, 5, 8}
        assert value["parent"] in ("object", "Exception", None)
    elif kind == 1:
        assert re.fullmatch(REGEX, answer.text)
    else:
        assert answer.text in CHOICE


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_valid_and_equal(engines: Engines, temperature: float) -> None:
    expected = engines.reference(PROMPTS, params(temperature), **SETTINGS)
    llm = engines.get(ROUGH, **SETTINGS)
    before = draft_counts(llm)
    answers = generate(llm, PROMPTS, params(temperature))
    assert_trees_were_tried(draft_counts(llm) - before, 20)
    for answer, kind in zip(answers, KINDS, strict=True):
        assert_valid(answer, kind)
    assert answers == expected


@pytest.mark.parametrize("temperature", [0, 0.8])
@pytest.mark.parametrize("kind", [0, 1, 2], ids=["json", "regex", "choice"])
def test_constrained_alone(engines: Engines, kind: int, temperature: float) -> None:
    """Drafts know nothing of the grammar; the ones that fit it are accepted all the same."""
    chosen = [i for i, each in enumerate(KINDS) if each == kind]
    prompts, asked = [PROMPTS[i] for i in chosen], [params(temperature)[i] for i in chosen]
    expected = engines.reference(prompts, asked, **SETTINGS)
    llm = engines.get(ROUGH, **SETTINGS)
    before = draft_counts(llm)
    assert generate(llm, prompts, asked) == expected
    counts = draft_counts(llm) - before
    assert counts.accepted
    if kind < 2:  # what is left of a choice is soon a single path
        assert counts.trees and counts.wrong


def test_chains(engines: Engines) -> None:
    expected = engines.reference(PROMPTS, params(0.8), **SETTINGS)
    assert generate(engines.get(CHAIN, **SETTINGS), PROMPTS, params(0.8)) == expected


def test_a_wrong_schema_is_refused(engines: Engines) -> None:
    constraint = StructuredOutputsParams(json="not a schema")
    llm = engines.get(ROUGH, **SETTINGS)
    with pytest.raises(VLLMValidationError, match="JSON grammar"):
        generate(llm, PROMPTS[:1], [greedy(5, structured_outputs=constraint)])
    assert generate(llm, PROMPTS[3:4], [greedy(5)])[0].finish_reason == "length"
