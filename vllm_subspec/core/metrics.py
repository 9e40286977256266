# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""What a server's ``/metrics`` tell of speculation: names, kinds, labels, meanings."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

PREFIX = "vllm_subspec:"
COMMON = ("model_name", "rank")
"""Labels of every metric; the rank is the tensor-parallel one."""
# A half stands for none: histograms of Ray have no bucket of 0.
DEPTHS = (0.5, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
NODES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 512)
SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)


@dataclass(frozen=True)
class Metric:
    """One family of samples."""

    kind: Literal["counter", "histogram", "gauge"]
    name: str
    meaning: str
    labels: tuple[str, ...] = ()
    buckets: Sequence[float] = ()

    @property
    def samples(self) -> list[str]:
        """Their names in ``/metrics``."""
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}
        return [f"{PREFIX}{self.name}{suffix}" for suffix in suffixes.get(self.kind, [""])]


METRICS = (
    Metric("counter", "rounds", "Passes of the target that verified drafts."),
    Metric("counter", "rested_rounds", "Passes before which drafts would not have paid."),
    Metric("counter", "draft_tokens", "Drafted tokens that were verified."),
    Metric("counter", "emitted_tokens", "Tokens of the requests that had drafted."),
    Metric("counter", "tested_tokens", "Drafted tokens that the target decided on.", ("depth",)),
    Metric("counter", "accepted_tokens", "Drafted tokens that it accepted.", ("depth",)),
    Metric("counter", "streamed_bytes", "Bytes of weights that passes streamed."),
    Metric("counter", "passes", "Passes of the target that streamed weights."),
    Metric("counter", "ring_blocks", "Blocks that passes took from the ring."),
    Metric("counter", "ring_misses", "Blocks that a pass stood still for."),
    Metric("counter", "stream_stall_seconds", "Seconds that passes stood still for blocks."),
    Metric("counter", "read_seconds", "Seconds of reading in the background; 0 if CUDA copies."),
    Metric("counter", "read_failures", "Blocks that could not be read."),
    Metric(
        "histogram",
        "accepted_depth",
        "Accepted tokens of a request's draft; tau is 1 + their mean.",
        buckets=DEPTHS,
    ),
    Metric("histogram", "draft_nodes", "Tokens of a request's draft.", buckets=NODES),
    Metric("histogram", "draft_depth", "Levels of a request's draft.", buckets=DEPTHS),
    Metric("histogram", "draft_seconds", "Seconds of a round's drafting.", buckets=SECONDS),
    Metric(
        "histogram", "verify_seconds", "Seconds of a round's pass and sampling.", buckets=SECONDS
    ),
    Metric(
        "histogram", "stall_seconds", "Of them, seconds of waiting for weights.", buckets=SECONDS
    ),
    Metric("gauge", "speculating", "Whether requests draft: 0 when switched off."),
    Metric("gauge", "planned_memory_bytes", "Memory that the plan gave to the rank."),
    Metric(
        "gauge",
        "peak_memory_bytes",
        "The most memory that the rank has had; of a CPU since it was loaded.",
    ),
    Metric(
        "gauge",
        "store_info",
        "1: where streamed weights are, and whether a store was reused.",
        ("source", "reused"),
    ),
)
SAMPLES = {
    sample: COMMON + metric.labels + (("le",) if sample.endswith("_bucket") else ())
    for metric in METRICS
    for sample in metric.samples
}
"""Every sample of ours in ``/metrics``, and its labels."""
