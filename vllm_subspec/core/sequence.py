# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""How long a sequence does an intermediate model hand to the target? By measured cost and gain."""

import numpy as np
import numpy.typing as npt

from vllm_subspec.core.acceptance_model import Floats
from vllm_subspec.core.depth import DepthController
from vllm_subspec.core.resting import Reading


class SequenceController(DepthController):
    """Decides, pass by pass, whether an intermediate model drafts on (arXiv 2505.22179).

    A step is a pass over the intermediate model. It adds several tokens to a row's sequence, as
    many as the recent rounds' steps did on average, and the survival of each is that of the token
    before it times `AcceptanceModel.next_token`.

    Args:
        max_steps: most tokens of a sequence.
        least: tokens of a sequence before anything was measured.
    """

    def __init__(self, max_steps: int, least: int) -> None:
        super().__init__(max_steps)
        self.least = least

    def _gains(self, survival: npt.ArrayLike, displaced: npt.ArrayLike) -> Floats:
        _, steps, verified, _ = self.costs.means
        added = max(1.0, (verified - 1) / steps) if steps > 0 else 1.0
        reach = self.acceptance.next_token ** np.arange(1, np.ceil(added) + 1)
        expected = np.asarray(survival, np.float64) * reach.mean()
        return np.maximum(expected - self._token_price, 0.0) * added

    def goes_on(self, survival: npt.ArrayLike, lengths: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """[rows] whether each row is worth its place in the next pass; none if no pass pays.

        Args:
            survival: [rows] of each row's newest token; 0 for a row that may not draft on.
            lengths: [rows] tokens of each sequence.
        """
        going = np.asarray(survival, np.float64) > 0
        if self._rate == 0:
            return going & (np.asarray(lengths) < self.least)
        going &= self.expands(survival)
        return going & self.keep_drafting(np.where(going, survival, 0.0))


class FixedSequence(SequenceController):
    """Every sequence as long as ``least``, if its limits allow: nothing depends on the clock."""

    def pays(self, rows: int, reading: Reading | None = None) -> bool:
        return True

    def goes_on(self, survival: npt.ArrayLike, lengths: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        return (np.asarray(survival) > 0) & (np.asarray(lengths) < self.least)

    def lengths(self, survival: npt.ArrayLike) -> npt.NDArray[np.int64]:
        return (np.asarray(survival, np.float64) >= 0).sum(axis=1)
