# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""What happened in the rounds: totals since the start, and the newest rounds one by one."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from vllm_subspec.core.acceptance import Walks, verdicts
from vllm_subspec.core.draft_tokens import DraftTokens

KEPT = 4096
"""Rounds that are remembered one by one."""
CONFIDENCE_EDGES = np.append(np.linspace(0, 0.9, 10), [0.95, 0.99, 1.0])
"""Draft probability is counted in the intervals between these, the last one closed."""


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """A pass of the target that verified drafts. Times are of ``time.perf_counter``."""

    draft_began: float
    draft_ended: float
    verify_began: float
    verify_ended: float
    """When the tokens were known."""
    forward_seconds: float
    """Of drafting, in the draft models' forwards (with CUDA, in launching them)."""
    steps: int
    """Draft forwards, whatever the number of rows and nodes in each."""
    expanded_nodes: int
    """Nodes that went through a draft forward, the roots included."""
    requests: int
    """Those that drafted; the pass may have computed others' tokens, too."""
    nodes: int
    """Drafted tokens that were verified, of all requests."""
    depth: int
    """Depth of the drafts that were verified, summed: what could have been accepted at most."""
    emitted: int
    """Tokens of the requests that drafted."""
    stall_seconds: float = 0.0
    """Of verifying, spent waiting for streamed weights."""
    streamed_bytes: int = 0

    @property
    def draft_seconds(self) -> float:
        return self.draft_ended - self.draft_began

    @property
    def verify_seconds(self) -> float:
        return self.verify_ended - self.verify_began


@dataclass
class RoundTotals:
    """Sums over rounds (`RoundRecord`) since the engine started."""

    rounds: int = 0
    rested: int = 0
    """Rounds in which requests drafted nothing, as it would not have paid; counted nowhere else."""
    request_rounds: int = 0
    """Requests of each round, summed: tau is ``emitted_tokens / request_rounds``."""
    draft_nodes: int = 0
    draft_depth: int = 0
    emitted_tokens: int = 0
    steps: int = 0
    expanded_nodes: int = 0
    forward_seconds: float = 0.0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    stall_seconds: float = 0.0
    streamed_bytes: int = 0

    def add(self, record: RoundRecord) -> None:
        self.rounds += 1
        self.request_rounds += record.requests
        self.draft_nodes += record.nodes
        self.draft_depth += record.depth
        self.emitted_tokens += record.emitted
        self.steps += record.steps
        self.expanded_nodes += record.expanded_nodes
        self.forward_seconds += record.forward_seconds
        self.draft_seconds += record.draft_seconds
        self.verify_seconds += record.verify_seconds
        self.stall_seconds += record.stall_seconds
        self.streamed_bytes += record.streamed_bytes


@dataclass
class Tested:
    """Draft tokens that the target decided on, and those that it accepted, in classes [n]."""

    tested: np.ndarray
    accepted: np.ndarray

    @classmethod
    def of(cls, classes: int) -> "Tested":
        return cls(np.zeros(classes, np.int64), np.zeros(classes, np.int64))

    def count(self, classes: np.ndarray, accepted: np.ndarray) -> None:
        """Adds m tokens.

        Args:
            classes: [m] of each; beyond the last one counts as the last one.
            accepted: [m] whether each was.
        """
        classes = np.minimum(classes, self.tested.size - 1)
        np.add.at(self.tested, classes, 1)
        np.add.at(self.accepted, classes, accepted)


@dataclass
class RoundLog:
    """Counts all rounds and remembers the newest.

    Args:
        limit: tokens that a draft has at most, and so its levels.
    """

    limit: int
    totals: RoundTotals = field(default_factory=RoundTotals)
    records: deque[RoundRecord] = field(default_factory=lambda: deque(maxlen=KEPT))

    def __post_init__(self) -> None:
        self.emitted = np.zeros(self.limit + 2, np.int64)
        """[limit + 2] requests' rounds that emitted so many tokens."""
        self.draft_nodes = np.zeros(self.limit + 1, np.int64)
        """[limit + 1] requests' rounds whose drafts had so many tokens."""
        self.draft_depths = np.zeros(self.limit + 1, np.int64)
        """[limit + 1] requests' rounds whose drafts had so many levels."""
        self.by_depth = Tested.of(self.limit + 1)
        """Entry d: tokens of depth d whose ancestors were accepted; entry 0 stays empty."""
        self.by_confidence = Tested.of(CONFIDENCE_EDGES.size - 1)

    def add(self, record: RoundRecord, drafts: Sequence[DraftTokens], walks: Walks) -> None:
        """A round is over.

        Args:
            drafts: what each request of the pass had drafted; empty of those that had not.
            walks: what became of them.
        """
        self.records.append(record)
        self.totals.add(record)
        for draft, path in zip(drafts, walks.paths, strict=True):
            if not draft:
                continue
            self.emitted[min(path.size, self.limit) + 1] += 1
            self.draft_nodes[min(len(draft), self.limit)] += 1
            self.draft_depths[min(int(draft.tree.depths.max()), self.limit)] += 1
            nodes, accepted, _ = verdicts(draft.tree, path)
            self.by_depth.count(draft.tree.depths[nodes], accepted)
            places = np.searchsorted(CONFIDENCE_EDGES, draft.confidence[nodes], "right") - 1
            self.by_confidence.count(places, accepted)

    def newest(self, seen: int) -> list[RoundRecord]:
        """The rounds after the first ``seen``, as far as they are remembered."""
        new = min(self.totals.rounds - seen, len(self.records))
        return list(self.records)[len(self.records) - new :]

    def to_json_dict(self, since: float = 0.0) -> dict[str, Any]:
        """Everything, as plain numbers and lists.

        Args:
            since: leaves out the records of rounds that began to draft earlier.
        """
        return {
            "totals": asdict(self.totals),
            "emitted": self.emitted.tolist(),
            "draft_nodes": self.draft_nodes.tolist(),
            "draft_depths": self.draft_depths.tolist(),
            "by_depth": _lists(self.by_depth),
            "by_confidence": _lists(self.by_confidence),
            "records": [asdict(r) for r in self.records if r.draft_began >= since],
        }


def _lists(tested: Tested) -> Mapping[str, list[int]]:
    return {"tested": tested.tested.tolist(), "accepted": tested.accepted.tolist()}
