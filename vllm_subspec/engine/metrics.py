# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Counters of drafting, read over ``collective_rpc`` (vLLM's own ``vllm:spec_decode_*`` metrics
count drafts and acceptance too, but know nothing of trees or of where the time goes: their draft
tokens are the nodes of a tree, of which only one path can be accepted)."""

from dataclasses import dataclass


@dataclass
class DraftingStats:
    """Totals since the engine started, over rounds in which every request drafted."""

    rounds: int = 0
    request_rounds: int = 0
    """Requests of each round, summed: tau is ``emitted_tokens / request_rounds``."""
    draft_nodes: int = 0
    """Drafted tokens that were verified."""
    draft_depth: int = 0
    """Depth of the drafts that were verified, summed: what could have been accepted at most."""
    emitted_tokens: int = 0
    steps: int = 0
    """Draft forwards, whatever the number of rows and nodes in each."""
    expanded_nodes: int = 0
    """Nodes that went through a draft forward, the roots included."""
    forward_seconds: float = 0.0
    """Of ``draft_seconds``, in the draft model's forwards (with CUDA, in launching them)."""
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    """From the start of the verifying pass until its tokens were known."""
