# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
import numpy as np

from vllm_subspec.core.acceptance import walk_batch
from vllm_subspec.core.cost import Round
from vllm_subspec.core.depth import DepthController, FullGrowth
from vllm_subspec.core.draft_tokens import DraftTokens
from vllm_subspec.drafters.base import DraftRow
from vllm_subspec.drafters.ngram import NgramDrafter

# After 1, 2, 3 came 4, 5, 6 once and 7, 8, 9 once.
TEXT = np.array([1, 2, 3, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3], np.int32)


def draft(drafter: NgramDrafter, limit: int = 32) -> DraftTokens:
    (found,) = drafter.propose([DraftRow(0, "a", TEXT, 8, limit, 64)])
    return found


def test_everything_is_drafted_unless_pruned() -> None:
    drafter = NgramDrafter(2, 5, FullGrowth(3), 4)
    found = draft(drafter)
    assert list(found) == [4, 5, 6, 7, 8, 9]
    assert found.tree.parents.tolist() == [-1, 0, 1, -1, 3, 4]
    first, second = found.tree.scores[[0, 3]]
    assert first > second > 0
    assert len(draft(drafter, limit=4)) == 4


def test_what_is_refused_is_drafted_less_where_nodes_are_dear() -> None:
    def drafted(accepted: bool, node_seconds: float) -> int:
        drafter = NgramDrafter(2, 5, DepthController(3), 4)
        for _ in range(100):
            found = draft(drafter)
            target = [4, 5, 6, 0] if accepted else [0] * 4
            after_root = target[0]
            samples = [after_root, *(target[d] for d in found.tree.depths)]
            walks = walk_batch([found.tree], samples)
            drafter.observe([found], walks)
            cost = 1 + node_seconds * len(found)
            emitted = int(walks.counts[0]) + 1
            drafter.observe_round(Round(1, [1], [1e-6], 1 + len(found), emitted, cost))
        return len(draft(drafter))

    assert drafted(True, 0.0) == drafted(False, 0.0) == 6
    assert drafted(True, 0.5) == 3
    assert drafted(False, 0.5) == 1
