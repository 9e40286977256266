# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Two opinions on a token: an intermediate model's, and that of what drafts for it.

In the published design (arXiv 2505.22179) the intermediate model decides. But the drafter below it
may know better: text that repeats itself is continued more surely by what stood there before than
by a small model. How often each of them is right where they differ can be seen from the target's
own tokens, whichever of the two was drafted; so it is learnt, and the better one is followed.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from vllm_subspec.core.acceptance_model import AcceptanceModel, Floats
from vllm_subspec.core.tree import TokenTree

Ints = npt.NDArray[np.int64]

# Where the two differ at most one is right; little is known beforehand, and learnt quickly.
_PRIOR_OPPOSED = 0.5
_PRIOR_RIVAL = 0.3
_PRIOR_COUNT = 4.0


@dataclass(frozen=True, eq=False)
class Opinions:
    """What is said of the tokens after n nodes."""

    own: Ints
    """[n] the intermediate's tokens."""
    confidence: Floats
    """[n] its probabilities of them, sharpened."""
    rivals: Ints
    """[n] the tokens that were drafted for it there, the best ones; -1 where none was."""
    rival_confidence: Floats
    """[n] the drafter's confidence in them."""

    @classmethod
    def of_tree(
        cls, tree: TokenTree, drafted: npt.ArrayLike, own: Ints, confidence: Floats
    ) -> Self:
        """After the root and each node of ``tree``, n + 1 in all.

        Args:
            drafted: [n] the drafter's confidence in each node.
            own, confidence: [n + 1]
        """
        rivals, certain = np.full(own.size, -1), np.zeros(own.size)
        order = np.argsort(drafted, kind="stable")  # of a node's children the best one is last
        rivals[tree.parents[order] + 1] = tree.tokens[order]
        certain[tree.parents[order] + 1] = np.asarray(drafted, np.float64)[order]
        return cls(own, confidence, rivals, certain)

    def select(self, which: npt.NDArray[np.integer]) -> "Opinions":
        return Opinions(
            self.own[which],
            self.confidence[which],
            self.rivals[which],
            self.rival_confidence[which],
        )

    @classmethod
    def join(cls, parts: "list[Opinions]") -> "Opinions":
        return cls(
            *(
                np.concatenate([getattr(part, name) for part in parts])
                for name in ("own", "confidence", "rivals", "rival_confidence")
            )
        )


class Judge:
    """Learns whom to believe."""

    def __init__(self) -> None:
        self._alone = AcceptanceModel()  # own tokens where no other was drafted,
        self._agreed = AcceptanceModel()  # where the same was,
        self._opposed = AcceptanceModel(_PRIOR_OPPOSED, _PRIOR_COUNT)  # and where another was
        self._rival = AcceptanceModel(_PRIOR_RIVAL, _PRIOR_COUNT)

    def choose(self, said: Opinions) -> tuple[Ints, Floats]:
        """[n] the tokens to draft, and [n] the probabilities that the target accepts them."""
        probability = np.where(
            said.rivals < 0,
            self._alone.estimate(said.confidence),
            self._agreed.estimate(said.confidence),
        )
        differ = _differ(said)
        probability[differ] = self._opposed.estimate(said.confidence[differ])
        rival = np.where(differ, self._rival.estimate(said.rival_confidence), 0.0)
        better = rival > probability
        return np.where(better, said.rivals, said.own), np.where(better, rival, probability)

    def observe(self, said: Opinions, truth: npt.NDArray[np.integer]) -> None:
        """What the target said: [n] its tokens where the opinions were given."""
        right, differ = said.own == truth, _differ(said)
        alone, agreed = said.rivals < 0, (said.rivals >= 0) & ~differ
        self._alone.observe(said.confidence[alone], right[alone])
        self._agreed.observe(said.confidence[agreed], right[agreed])
        self._opposed.observe(said.confidence[differ], right[differ])
        self._rival.observe(said.rival_confidence[differ], (said.rivals == truth)[differ])


def _differ(said: Opinions) -> npt.NDArray[np.bool_]:
    return (said.rivals >= 0) & (said.rivals != said.own)
