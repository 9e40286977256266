# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""What drafters have in common that draft as far as pays, and learn what pays."""

from collections.abc import Sequence

from vllm_subspec.core.acceptance import Walks, verdicts
from vllm_subspec.core.cost import ExpectedCosts, Round
from vllm_subspec.core.depth import DepthController
from vllm_subspec.core.draft_tokens import DraftTokens
from vllm_subspec.core.resting import Reading
from vllm_subspec.drafters.base import Drafting


class GrowingDrafter:
    """A `Drafter` but for `propose` and `follow`.

    Args:
        growth: decides how deep and how wide, and learns from what happened.
    """

    def __init__(self, growth: DepthController) -> None:
        self.growth = growth
        self.last = Drafting()

    @property
    def max_depth(self) -> int:
        return self.growth.max_steps

    def pays(self, rows: int, reading: Reading | None = None) -> bool:
        return self.growth.pays(rows, reading)

    def observe(self, drafts: Sequence[DraftTokens], walks: Walks) -> None:
        for draft, path in zip(drafts, walks.paths, strict=True):
            nodes, accepted, first = verdicts(draft.tree, path)
            self.growth.acceptance.observe(draft.confidence[nodes], accepted, first)

    def expect(self, costs: ExpectedCosts) -> None:
        self.growth.costs.expect(costs)

    def observe_round(self, done: Round) -> None:
        self.growth.observe_round(done)

    def observe_plain(self, rows: int, seconds: float, pure: bool) -> None:
        self.growth.observe_plain(rows, seconds, pure)
