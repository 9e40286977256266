# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""OpenTelemetry spans of the rounds, where ``--otlp-traces-endpoint`` sends vLLM's own."""

import time

from vllm.tracing import instrument_manual

from vllm_subspec.core.round_log import RoundRecord


def record(one: RoundRecord) -> None:
    """Two spans of a round that is over, "SubSpec draft" and "SubSpec verify".

    A round serves a batch, so they hang on no request's trace.
    """
    # A round's clock has no date: what has passed since its moments is taken from the wall clock.
    wall, clock = time.time_ns(), time.perf_counter()

    def nanoseconds(moment: float) -> int:
        return wall - round(1e9 * (clock - moment))

    instrument_manual(
        "SubSpec draft",
        nanoseconds(one.draft_began),
        nanoseconds(one.draft_ended),
        {
            "subspec.requests": one.requests,
            "subspec.draft_tokens": one.nodes,
            "subspec.draft_forwards": one.steps,
            "subspec.forward_seconds": one.forward_seconds,
        },
    )
    instrument_manual(
        "SubSpec verify",
        nanoseconds(one.verify_began),
        nanoseconds(one.verify_ended),
        {
            "subspec.requests": one.requests,
            "subspec.draft_tokens": one.nodes,
            "subspec.emitted_tokens": one.emitted,
            "subspec.stall_seconds": one.stall_seconds,
            "subspec.streamed_bytes": one.streamed_bytes,
        },
    )
