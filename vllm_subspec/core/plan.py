# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""What lies where: resident and streamed layers, substitutes, ring. All sizes are bytes.

Also the two bounds on the speed of a round, which every benchmark prints beside its measurement.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

GIB = 1 << 30
WORKSPACE = GIB
"""On a GPU: activations, compiled code, the allocator's slack."""
PROCESS = 600 << 20
"""On a CPU, before there is a model: an interpreter with vLLM's libraries. Measured: 550 MB."""
GATHERED = 96 << 20
"""What a process on a CPU gathers under full batches, whatever the model: pages of libraries, code
of oneDNN for each shape of a product, what the allocator keeps. Measured: 70 to 130 MB, and 20 in a
process that serves one request at a time."""
PACKED_VOCABULARIES = 2
"""On a CPU whose packed linears are vLLM's: copies of an embedding's size. vLLM packs the embedding
and the output layer for oneDNN, tied or not, and keeps what it packed."""
_LOGIT_BYTES = 4  # float32
# Two slots let one layer compute while the next one loads. Further ones only smooth uneven reads,
# and a resident layer saves more than a slot of its size, so they are taken from what is left.
_RING_LEAST, _RING_MOST = 2, 4


@dataclass(frozen=True)
class ModelSizes:
    """Bytes of one rank's share of the model. ``layers`` and ``substitutes`` are by decoder layer:
    the full weights that would be streamed, and the low-bit stand-ins of the same weights."""

    layers: Sequence[int]
    substitutes: Sequence[int]
    other: int  # embeddings, norms, lm_head and all else that always stays
    kv_per_token: int  # of all models that have pages
    workspace: int  # activations, compiled code, the allocator's slack
    drafter: int = 0  # another model that drafts


@dataclass(frozen=True)
class Budget:
    device: int  # bytes that this rank may use on the device
    kv_tokens: int  # tokens that the KV cache must hold


@dataclass(frozen=True)
class MemoryPlan:
    """The decision. Streamed layers come before resident ones, each group in model order."""

    resident: tuple[int, ...]
    streamed: tuple[int, ...]
    substituted: tuple[int, ...]  # the streamed layers, and resident ones that the draft replaces
    ring_layers: int  # slots, each as large as the largest streamed layer
    resident_bytes: int
    substitute_bytes: int
    ring_bytes: int
    kv_bytes: int
    other_bytes: int
    drafter_bytes: int
    workspace_bytes: int
    store_bytes: int  # full weights of the streamed layers, in host memory or on disk
    device_bytes: int  # the budget

    @property
    def total(self) -> int:
        """Planned bytes on the device."""
        return (
            self.resident_bytes
            + self.substitute_bytes
            + self.ring_bytes
            + self.kv_bytes
            + self.other_bytes
            + self.drafter_bytes
            + self.workspace_bytes
        )

    def describe(self) -> str:
        """A table for the log, one part a line."""
        rows = [
            (f"{len(self.resident)} resident layers", self.resident_bytes),
            (f"{len(self.substituted)} substitutes", self.substitute_bytes),
            (f"ring of {self.ring_layers} layers", self.ring_bytes),
            ("KV cache", self.kv_bytes),
            ("other weights", self.other_bytes),
            *([("drafting model", self.drafter_bytes)] if self.drafter_bytes else []),
            ("workspace", self.workspace_bytes),
            ("total", self.total),
            ("budget", self.device_bytes),
            (f"store of {len(self.streamed)} streamed layers", self.store_bytes),
        ]
        return "\n".join(f"{name:<28}{size / GIB:9.3f} GiB" for name, size in rows)


def largest_pass(
    tokens: int, sampled: int, *, hidden: int, widest: int, vocabulary: int, itemsize: int
) -> int:
    """Bytes on a CPU: a layer's activations, and the logits twice.

    Args:
        tokens: of a pass at most.
        sampled: of them, those whose logits are computed, at most.
        widest: channels of the MLP, or of the hidden state if that is wider.
        itemsize: bytes of an activation.
    """
    layer = tokens * (4 * hidden + 3 * widest) * itemsize
    return layer + 2 * min(sampled, tokens) * vocabulary * _LOGIT_BYTES


def plan_memory(
    sizes: ModelSizes,
    budget: Budget,
    *,
    resident_weights_gib: Literal["auto"] | float = "auto",
    ring_layers: int | None = None,
    substitute_layers: Literal["auto", "all"] | Sequence[int] = "auto",
) -> MemoryPlan:
    """Keeps as many of the last layers resident as fit, and streams the ones before them.

    The first layers are the streamed ones, so that at the end of a pass the ring already loads
    the beginning of the next. Every streamed layer has a substitute. Resident layers have one
    where ``substitute_layers`` says so; ``"auto"`` with nothing streamed substitutes as many
    layers as fit beside the full weights, the first ones first, and may find room for none.

    Args:
        resident_weights_gib: ``"auto"``, or the GiB of full decoder layers to keep; 0 keeps none.
        ring_layers: slots of the ring; None: 2, and up to 4 from what is left. Never more than
            there are streamed layers.
        substitute_layers: ``"auto"``, ``"all"`` or the resident layers that the draft replaces.

    Raises:
        ValueError: the sizes are inconsistent, a layer does not exist, or no plan fits; the
            sentence says what is short by how much.
    """
    count = len(sizes.layers)
    if len(sizes.substitutes) != count:
        raise ValueError(f"{count} layers but {len(sizes.substitutes)} substitutes")
    if isinstance(substitute_layers, str):
        extra = set(range(count)) if substitute_layers == "all" else set()
    else:
        extra = set(substitute_layers)
        if missing := sorted(i for i in extra if not 0 <= i < count):
            raise ValueError(
                f'"substitute_layers" names layer {missing[0]}, but the model has layers 0 to '
                f"{count - 1}"
            )

    def plan(streamed: int, slots: int, extra: set[int]) -> MemoryPlan:
        substituted = tuple(sorted(extra.union(range(streamed))))
        slots = min(slots, streamed)
        return MemoryPlan(
            resident=tuple(range(streamed, count)),
            streamed=tuple(range(streamed)),
            substituted=substituted,
            ring_layers=slots,
            resident_bytes=sum(sizes.layers[streamed:]),
            substitute_bytes=sum(sizes.substitutes[i] for i in substituted),
            ring_bytes=slots * max(sizes.layers[:streamed], default=0),
            kv_bytes=budget.kv_tokens * sizes.kv_per_token,
            other_bytes=sizes.other,
            drafter_bytes=sizes.drafter,
            workspace_bytes=sizes.workspace,
            store_bytes=sum(sizes.layers[:streamed]),
            device_bytes=budget.device,
        )

    slots = ring_layers or _RING_LEAST
    if resident_weights_gib == "auto":
        candidates = [plan(streamed, slots, extra) for streamed in range(count + 1)]
    else:
        limit = int(resident_weights_gib * GIB)
        streamed = next(s for s in range(count + 1) if sum(sizes.layers[s:]) <= limit)
        candidates = [plan(streamed, slots, extra)]
    chosen = next((c for c in candidates if c.total <= budget.device), None)
    if chosen is None:
        least = min(candidates, key=lambda c: c.total)
        raise ValueError(_shortage(least, resident_weights_gib))

    streamed = len(chosen.streamed)
    if streamed and ring_layers is None:
        for slots in range(_RING_LEAST + 1, _RING_MOST + 1):
            wider = plan(streamed, slots, extra)
            chosen = wider if wider.total <= budget.device else chosen
    if not streamed and substitute_layers == "auto":
        for layer in range(count):
            wider = plan(0, slots, set(range(layer + 1)))
            chosen = wider if wider.total <= budget.device else chosen
    return chosen


def _shortage(least: MemoryPlan, resident_weights_gib: Literal["auto"] | float) -> str:
    parts = {
        "resident layers": least.resident_bytes,
        "substitutes": least.substitute_bytes,
        "ring": least.ring_bytes,
        "KV cache": least.kv_bytes,
        "other weights": least.other_bytes,
        "drafting model": least.drafter_bytes,
        "workspace": least.workspace_bytes,
    }
    listed = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items() if size)
    remedy = 'a smaller max_model_len or lower "bits"'
    if resident_weights_gib != "auto" and least.resident:
        remedy = 'a smaller "resident_weights_gib", ' + remedy
    return (
        f"subspec needs {least.total / GIB:.2f} GiB on the device ({listed}) but may use "
        f"{least.device_bytes / GIB:.2f} GiB: short by "
        f"{(least.total - least.device_bytes) / GIB:.2f} GiB; give it more memory, {remedy}"
    )


def choose_tier(store_bytes: int, host_bytes: int, device_is_host: bool) -> Literal["host", "disk"]:
    """Where streamed weights rest.

    Args:
        store_bytes: of all that is to rest there.
        host_bytes: of host memory that is available. A tenth is left for everything else.
        device_is_host: whether the model runs in host memory itself; then there is nothing to
            stream from it.
    """
    return "host" if not device_is_host and store_bytes <= 0.9 * host_bytes else "disk"


def overlapped_bound(tau: float, stream_seconds: float, draft_seconds: float) -> float:
    """Tokens/s when streaming and drafting overlap fully.

    Args:
        tau: tokens emitted per round.
        stream_seconds: streamed bytes / bandwidth, of one pass.
        draft_seconds: steps x step time, of one round.
    """
    return tau / max(stream_seconds, draft_seconds)


def serial_bound(tau: float, stream_seconds: float, draft_seconds: float) -> float:
    """Tokens/s when nothing overlaps; arguments as for ``overlapped_bound``."""
    return tau / (stream_seconds + draft_seconds)
