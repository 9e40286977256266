# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""What one pass of the target verifies: every request's draft, and what became of it."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_subspec.core.acceptance import Walks
from vllm_subspec.core.draft_tokens import DraftTokens
from vllm_subspec.core.tree_attention import TreeRows, verification_mask


@dataclass
class Verification:
    """A batch in the order of vLLM's runner. A request without a draft has an empty one.

    The queries of a request that drafted are its root and its draft's nodes; the last of any
    request's queries that are sampled from are 1 + the nodes of its draft.
    """

    request_ids: list[str]
    drafts: list[DraftTokens]
    starts: np.ndarray
    """[requests + 1] first query of each request in the pass, and the end."""
    roots: np.ndarray
    """[requests] position of each root: of the last committed token."""
    computed: np.ndarray
    """[requests] tokens of each whose K/V existed before the pass."""
    walks: Walks | None = None
    """What was accepted, once the pass was sampled from."""

    @classmethod
    def of(
        cls, scheduled: dict[str, Any], request_ids: list[str], computed: np.ndarray, counts: Any
    ) -> "Verification":
        """The verification that a scheduled pass is.

        Args:
            scheduled: the draft tokens of the requests that have any, by request.
            request_ids: of the batch.
            computed: [requests] tokens of each whose K/V exists.
            counts: [requests] queries of each.
        """
        none = DraftTokens.none()
        drafts = [scheduled.get(name, none) for name in request_ids]
        if any(not isinstance(draft, DraftTokens) for draft in drafts):
            raise TypeError("draft tokens lost the shape of their tree on the way to the worker")
        sizes = np.array([len(draft) for draft in drafts])
        starts = np.append(0, np.cumsum(counts))
        roots = computed + counts - 1 - sizes
        return cls(request_ids, drafts, starts, roots, computed.copy())

    @property
    def sizes(self) -> np.ndarray:
        """[requests] nodes of each draft."""
        return np.array([len(draft) for draft in self.drafts])

    def positions(self) -> tuple[np.ndarray, np.ndarray]:
        """``[m]`` queries of nodes and the positions of their tokens: root plus depth."""
        queries, positions = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for row, draft in enumerate(self.drafts):
            if not draft.tree.is_chain:
                end = self.starts[row + 1]
                queries.append(np.arange(end - len(draft), end))
                positions.append(self.roots[row] + draft.tree.depths)
        return np.concatenate(queries), np.concatenate(positions)

    def trees(self) -> TreeRows:
        """The requests whose queries are no plain sequence."""
        rows = [i for i, draft in enumerate(self.drafts) if not draft.tree.is_chain]
        return TreeRows(
            tuple(rows),
            tuple(int(self.roots[row]) for row in rows),
            tuple(verification_mask(self.drafts[row].tree) for row in rows),
        )
