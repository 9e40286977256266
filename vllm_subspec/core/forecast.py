# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""How fast it will be: what a pass and a draft step take, from bytes and bandwidths.

A draft step reads the substitutes and the output layer once, and launches its kernels: read from
published SubSpec runs (RTX 4090, 1,008 GB/s) a step takes 12 ms for 4.8 GB in 28 layers and 36 ms
for 19.1 GB in 64, which is 0.26 and 0.27 ms a layer beside the reading.
"""

from dataclasses import dataclass

from vllm_subspec.core.plan import MemoryPlan, overlapped_bound, serial_bound

LAYER_SECONDS = 0.00026
"""Of a step, in each layer, beside reading weights."""


@dataclass(frozen=True)
class Machine:
    link: float  # bytes/s that streamed weights arrive with
    device: float  # bytes/s that weights on the device are read with
    layer_seconds: float = LAYER_SECONDS


@dataclass(frozen=True)
class Drafted:
    """What is expected of a draft."""

    steps: int  # of a round
    tokens: float  # emitted in a round: tau


@dataclass(frozen=True)
class Forecast:
    """Seconds and tokens per second of one request."""

    stream_seconds: float  # of the streamed weights, once
    pass_seconds: float  # of the target: streaming, or reading all its weights if that takes longer
    step_seconds: float  # of a draft step
    draft_seconds: float  # of a round
    plain: float  # tokens/s without speculation, the device full of resident layers
    serial: float  # tokens/s if nothing overlaps
    overlapped: float  # tokens/s if streaming and drafting overlap fully

    @property
    def speedup(self) -> float:
        """Of the serial bound over no speculation."""
        return self.serial / self.plain


def expected_tokens(acceptance: float, steps: int) -> float:
    """Tokens a round when each of ``steps`` levels is accepted with probability ``acceptance``,
    below 1, if those above it are: a geometric series, the target's own token included."""
    return float((1 - acceptance ** (steps + 1)) / (1 - acceptance))


def forecast(
    plan: MemoryPlan,
    plain: MemoryPlan,
    head_bytes: int,
    drafted: Drafted,
    machine: Machine,
    active_share: float = 1.0,
) -> Forecast:
    """What `plan` is worth.

    All weights are streamed in every pass, those of experts that no token uses as well.

    Args:
        plan: with substitutes.
        plain: of the same model and memory without any: what streaming alone would keep resident.
        head_bytes: of the output layer.
        drafted: measured or published.
        active_share: of the decoder layers, what a token reads.
    """
    layers = len(plan.resident) + len(plan.streamed)
    stream = plan.store_bytes / machine.link
    # Resident layers without a substitute of their own are read in full.
    shared = plan.resident_bytes * _share_without_substitute(plan)
    read = (plan.substitute_bytes + shared) * active_share + head_bytes
    step = read / machine.device + layers * machine.layer_seconds
    draft = drafted.steps * step
    read_plain = (plain.resident_bytes + plain.store_bytes) * active_share + head_bytes
    alone = plain.store_bytes / machine.link + read_plain / machine.device
    verify = max(stream, read_plain / machine.device)
    return Forecast(
        stream_seconds=stream,
        pass_seconds=verify,
        step_seconds=step,
        draft_seconds=draft,
        plain=1 / alone,
        serial=serial_bound(drafted.tokens, verify, draft),
        overlapped=overlapped_bound(drafted.tokens, verify, draft),
    )


def _share_without_substitute(plan: MemoryPlan) -> float:
    if not plan.resident:
        return 0.0
    return len(set(plan.resident) - set(plan.substituted)) / len(plan.resident)
