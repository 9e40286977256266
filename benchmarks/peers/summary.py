# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""What a run of the peers comes to."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Answers = Sequence[Mapping[str, Any]]
"""One per prompt, as `serving` writes them."""


def speed(answer: Mapping[str, Any]) -> float | None:
    """Tokens per second of the whole answer; None if there was only one step.

    The step that reads the prompt counts like any other: every peer moves all weights for it, and
    one that drafts ends it with its first draft.
    """
    if len(answer["steps"]) < 2:
        return None
    seconds: float = answer["first_token_seconds"] + answer["decode_seconds"]
    return len(answer["tokens"]) / seconds


def first_difference(answer: Sequence[int], reference: Sequence[int]) -> int | None:
    """Index of the first token that differs, as far as both go; None if none does."""
    pairs = enumerate(zip(answer, reference, strict=False))
    return next((index for index, (mine, theirs) in pairs if mine != theirs), None)


def summarize(
    answers: Mapping[str, Answers], ours: str, reference: str
) -> dict[str, dict[str, Any]]:
    """A row per peer.

    Args:
        ours: the peer that the others' speeds are compared with.
        reference: the peer whose answers are the target's own.
    """
    speeds = {name: _harmonic_mean(mine) for name, mine in answers.items()}
    rows = {}
    for name, mine in answers.items():
        row: dict[str, Any] = {"tokens_per_second": speeds[name]}
        if (own := speeds.get(ours)) and (theirs := speeds[name]):
            row[f"{ours}_over_this"] = own / theirs
        row["first_token_seconds"] = statistics.median(a["first_token_seconds"] for a in mine)
        row["tokens_per_step"] = statistics.mean(len(a["tokens"]) / len(a["steps"]) for a in mine)
        if reference in answers:
            pairs = [
                (a["tokens"], b["tokens"]) for a, b in zip(mine, answers[reference], strict=False)
            ]
            row["compared_tokens"] = [min(len(a), len(b)) for a, b in pairs]
            row["first_difference"] = [first_difference(a, b) for a, b in pairs]
        rows[name] = row
    return rows


def _harmonic_mean(answers: Answers) -> float | None:
    speeds = [value for answer in answers if (value := speed(answer))]
    return statistics.harmonic_mean(speeds) if speeds else None
