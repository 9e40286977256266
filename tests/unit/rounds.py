# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Rounds whose draft steps are all alike."""

from vllm_subspec.core.cost import Round


def even_round(
    rows: int,
    steps: int,
    verified_tokens: int,
    emitted_tokens: int,
    draft_seconds: float,
    verify_seconds: float,
    width: int = 1,
) -> Round:
    """A round of ``steps`` steps of ``width`` nodes a row; the seconds are those of all steps."""
    nodes, seconds = [rows * width] * steps, [draft_seconds / max(steps, 1)] * steps
    return Round(rows, nodes, seconds, verified_tokens, emitted_tokens, verify_seconds)
