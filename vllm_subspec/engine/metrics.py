# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Names of the plugin's metrics."""

_COUNTERS: dict[str, tuple[str, ...]] = {
    "rounds": (),
    "draft_tokens": (),
    "emitted_tokens": (),
    "tested_tokens": ("depth",),
    "accepted_tokens": ("depth",),
    "streamed_bytes": (),
    "passes": (),
    "ring_blocks": (),
    "ring_misses": (),
    "stream_stall_seconds": (),
    "read_seconds": (),
    "read_failures": (),
}
_HISTOGRAMS = (
    *("accepted_depth", "draft_nodes", "draft_depth"),
    *("draft_seconds", "verify_seconds", "stall_seconds"),
)
_GAUGES: dict[str, tuple[str, ...]] = {
    "speculating": (),
    "store_info": ("source", "reused"),
    "planned_memory_bytes": (),
    "peak_memory_bytes": (),
}
_COMMON = ("model_name", "rank")

SAMPLES: dict[str, tuple[str, ...]] = {
    f"vllm_subspec:{name}": (*_COMMON, *labels)
    for name, labels in (
        *((f"{name}_total", labels) for name, labels in _COUNTERS.items()),
        *((f"{name}_bucket", ("le",)) for name in _HISTOGRAMS),
        *((f"{name}_{end}", ()) for name in _HISTOGRAMS for end in ("sum", "count")),
        *_GAUGES.items(),
    )
}
"""Every sample of ours in ``/metrics``, and its labels."""
