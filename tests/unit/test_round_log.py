# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
import json

import numpy as np
import pytest

from vllm_subspec.core.acceptance import walk_batch
from vllm_subspec.core.draft_tokens import DraftTokens
from vllm_subspec.core.round_log import CONFIDENCE_EDGES, KEPT, RoundLog, RoundRecord
from vllm_subspec.core.tree import TokenTree

# Root -> 10, 11; 10 -> 20, 21; 20 -> 30.
TREE = TokenTree(
    np.array([10, 11, 20, 21, 30], np.int32),
    np.array([-1, -1, 0, 0, 2], np.int32),
    np.array([0.9, 0.1, 0.6, 0.3, 0.5], np.float32),
)
CONFIDENCE = [0.9, 0.5, 0.75, 0.96, 1.0]


def record(began: float = 0.0, emitted: int = 1) -> RoundRecord:
    return RoundRecord(
        *(began, began + 1, began + 1.5, began + 4),
        forward_seconds=0.75,
        steps=3,
        expanded_nodes=4,
        requests=1,
        nodes=5,
        depth=3,
        emitted=emitted,
        stall_seconds=0.25,
        streamed_bytes=100,
    )


def one(samples: list[int], limit: int = 8) -> RoundLog:
    log = RoundLog(limit)
    drafts = [DraftTokens(TREE, CONFIDENCE)]
    walks = walk_batch([TREE], np.array(samples))
    log.add(record(emitted=int(walks.counts[0]) + 1), drafts, walks)
    return log


def test_what_was_tested_is_counted_by_depth():
    # After the root the target wants 10, then 21: of depth 1 only 10 is tested, as the best child
    # was right; of depth 2 both children are; 30 is below a refused node.
    log = one([10, 21, 0, 0, 99, 0])
    assert log.emitted.tolist() == [0, 0, 0, 1] + [0] * 6
    assert log.by_depth.tested[:4].tolist() == [0, 1, 2, 0]
    assert log.by_depth.accepted[:4].tolist() == [0, 1, 1, 0]


def test_confidence_is_counted_in_its_interval():
    log = one([10, 20, 0, 30, 0, 7])  # 10, 20 and 30 are accepted
    tested = np.flatnonzero(log.by_confidence.tested)
    edges = [(CONFIDENCE_EDGES[i], CONFIDENCE_EDGES[i + 1]) for i in tested]
    assert np.allclose(edges, [(0.7, 0.8), (0.9, 0.95), (0.99, 1.0)])  # 1.0 lies in the last
    assert log.by_confidence.accepted.sum() == log.by_confidence.tested.sum() == 3


def test_deeper_than_known_counts_as_deepest():
    log = one([10, 20, 0, 30, 0, 7], limit=2)
    assert log.emitted.tolist() == [0, 0, 0, 1]
    assert log.by_depth.tested.tolist() == [0, 1, 2]
    assert log.draft_nodes.tolist() == log.draft_depths.tolist() == [0, 0, 1]


def test_requests_that_drafted_nothing_are_not_counted():
    log, none = RoundLog(8), DraftTokens.none()
    walks = walk_batch([none.tree, TREE], np.array([5, 10, 21, 0, 0, 99, 0]))
    log.add(record(emitted=3), [none, DraftTokens(TREE, CONFIDENCE)], walks)
    assert log.emitted.tolist() == [0, 0, 0, 1] + [0] * 6
    assert log.draft_nodes.tolist() == [0] * 5 + [1] + [0] * 3
    assert log.draft_depths.tolist() == [0] * 3 + [1] + [0] * 5


def test_the_rounds_that_somebody_has_not_seen():
    log = RoundLog(4)
    walks = walk_batch([], np.zeros(0, np.int64))
    assert log.newest(0) == []
    for number in range(3):
        log.add(record(float(number)), [], walks)
    assert [r.draft_began for r in log.newest(1)] == [1, 2]
    assert log.newest(3) == []
    for number in range(KEPT):
        log.add(record(float(number)), [], walks)
    assert len(log.newest(1)) == KEPT  # of more than are remembered: those that are


def test_totals_are_sums_and_the_newest_rounds_are_kept():
    log = RoundLog(4)
    walks = walk_batch([], np.zeros(0, np.int64))
    for number in range(KEPT + 5):
        log.add(record(float(number), emitted=2), [], walks)
    assert len(log.records) == KEPT
    totals = log.totals
    assert totals.rounds == totals.request_rounds == KEPT + 5
    assert totals.emitted_tokens == 2 * totals.rounds
    assert totals.draft_seconds == pytest.approx(totals.rounds)
    assert totals.verify_seconds == pytest.approx(2.5 * totals.rounds)
    assert totals.stall_seconds == pytest.approx(0.25 * totals.rounds)
    assert totals.streamed_bytes == 100 * totals.rounds
    known = json.loads(json.dumps(log.to_json_dict(since=KEPT)))
    assert [r["draft_began"] for r in known["records"]] == [KEPT + n for n in range(5)]
    assert known["totals"]["rounds"] == KEPT + 5
