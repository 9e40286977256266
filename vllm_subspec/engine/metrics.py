# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Counters of drafting, read over ``collective_rpc`` (vLLM's own ``vllm:spec_decode_*`` metrics
count drafts and acceptance too, but know nothing of where the time goes)."""

from dataclasses import dataclass


@dataclass
class DraftingStats:
    """Totals since the engine started, over rounds in which every request drafted."""

    rounds: int = 0
    draft_tokens: int = 0
    emitted_tokens: int = 0
    steps: int = 0
    """Draft forwards, whatever the number of rows in each."""
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    """From the start of the verifying pass until its tokens were known."""
