# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Kinds of requests: every sampling parameter alone, all together, and mixed."""

from typing import Any

from vllm import SamplingParams

from tests.engine.helpers import encode

Params = dict[str, Any]

# The tokens that most often follow a beginning of these.
FREQUENT = [*encode(" 0"), *encode(":"), *encode("\n"), *encode("self")]
GREEDY: Params = {"temperature": 0}

KINDS: dict[str, list[Params]] = {
    # Requests take these in turn.
    "temperature 0.3": [{"temperature": 0.3}],
    "temperature 0.6": [{"temperature": 0.6}],
    "temperature 1": [{}],
    "temperature 2": [{"temperature": 2.0}],
    "top_k": [{"top_k": 3}],
    "top_k 1": [{"top_k": 1}],
    "top_p": [{"top_p": 0.7}],
    "top_k and top_p": [{"temperature": 0.8, "top_k": 20, "top_p": 0.9}],
    "min_tokens": [{"min_tokens": 9, "stop_token_ids": FREQUENT}],
    "min_p": [{"min_p": 0.15}],
    "logit_bias": [{"logit_bias": dict.fromkeys(FREQUENT, 3.0)}],
    "presence_penalty": [{"presence_penalty": 1.5}],
    "frequency_penalty": [{"frequency_penalty": 1.5}],
    "repetition_penalty": [{"repetition_penalty": 1.5}],
    "bad_words": [{"temperature": 0.5, "bad_words": [" self", ".", " = None", "()", "def __"]}],
    "allowed_token_ids": [{"allowed_token_ids": sorted(set(encode("if a b: is None [0, 1],")))}],
    "stop": [{"stop": ["self", "return", "):"]}],
    "all together": [
        {
            "temperature": 0.8,
            "top_k": 50,
            "top_p": 0.95,
            "min_tokens": 6,
            "stop_token_ids": FREQUENT,
            "stop": ["return"],
            "presence_penalty": 0.5,
            "frequency_penalty": 0.5,
            "repetition_penalty": 1.2,
            "bad_words": [" self", ".", " 0, 0"],
            "min_p": 0.02,
            "logit_bias": dict.fromkeys(encode("= ("), -2.0),
        }
    ],
    "mixed": [
        GREEDY,
        {"top_k": 3},
        {"temperature": 0.6, "presence_penalty": 1.0},
        {**GREEDY, "repetition_penalty": 1.3, "bad_words": [" self"]},
        {"min_tokens": 5, "stop_token_ids": FREQUENT},
        {"min_p": 0.1},
        {**GREEDY, "logit_bias": dict.fromkeys(FREQUENT, 2.0)},
        {"top_p": 0.5, "allowed_token_ids": [*range(3000)]},
        {**GREEDY, "min_tokens": 5, "stop_token_ids": FREQUENT},
    ],
}


def seeded(name: str, count: int, max_tokens: int = 32) -> list[SamplingParams]:
    """``count`` requests of a kind, each with a seed of its own."""
    kinds = KINDS[name]
    given = [
        {"temperature": 1.0, "seed": 100 + i, "max_tokens": max_tokens, "ignore_eos": True}
        | kinds[i % len(kinds)]
        for i in range(count)
    ]
    return [SamplingParams(**each) for each in given]
