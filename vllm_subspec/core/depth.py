# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""When does another draft step pay? Growth of the draft by measured cost and expected gain.

A round drafts, verifies and emits tokens; rounds follow each other like the renewals of a process
with rewards, so throughput in the long run is E[tokens of a round] / E[seconds of a round]
(renewal-reward theorem). Dinkelbach (1967, Management Science 13:492-498): a policy maximises
that ratio r* exactly when it maximises E[tokens] - r* E[seconds], and replacing r by the ratio
that the best policy for r achieves converges to r*. Here a policy is a rule of stopping, and a
step is worth taking while the tokens it is expected to add exceed its seconds times r, the
throughput achieved so far. Survival never rises with depth, so looking one step ahead is enough.
In a tree the tokens that a step is expected to add are a sum over the nodes it expands: the target
follows one path, so the events are exclusive. A chain is the case of one node per row. An r that is
too low drafts deeper, one too high stops earlier, and both are corrected by the next rounds'
measurements.

Everything is a pure function of the numbers passed in: no clock is read and nothing is drawn at
random, so that ranks given the same numbers decide alike.
"""

import numpy as np
import numpy.typing as npt

from vllm_subspec.core.acceptance_model import AcceptanceModel, Floats
from vllm_subspec.core.cost import Round, RoundCosts
from vllm_subspec.core.resting import Reading, Resting

# What nodes cost to verify is seen only if their number varies. So the first rounds verify these
# shares of what they would.
_EXPLORED = (0.25, 1.0, 0.5, 0.25, 1.0, 0.5)


class DepthController:
    """Decides, step by step, whether to grow the drafts of a batch by one more level.

    A round that drafts drafts at least one level, so that acceptance and costs stay observed.
    Whether a round drafts at all, `pays` says: where plain rounds are faster (large batches, whose
    passes compute longer than they stream), drafting rests and is tried again now and then; and it
    rests while passes over long prompts compute all the time. Before anything was measured,
    drafting goes on while the next token is more likely accepted than not.

    Args:
        max_steps: most levels drafted; of a chain, its most tokens.
    """

    def __init__(self, max_steps: int) -> None:
        if max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, not {max_steps}")
        self.max_steps = max_steps
        self.acceptance = AcceptanceModel()
        self.costs = RoundCosts()
        self._resting = Resting(self.costs, len(_EXPLORED))
        self._steps = 0  # of the round that is drafted now
        self._rate = 0.0  # tokens that must be expected from a second to pay for it
        self._saved = 0.0  # seconds by which a step shortens the verification
        self._token_price = 0.0  # probability above which verifying a token pays

    def pays(self, rows: int, reading: Reading | None = None) -> bool:
        """Whether the next round is to draft: `Resting.pays`."""
        return self._resting.pays(rows, reading)

    def observe_plain(self, rows: int, seconds: float, pure: bool = True) -> None:
        """A round without drafts took so long: `Resting.observe_plain`."""
        self._resting.observe_plain(rows, seconds, pure)

    def begin_round(self, rows: int) -> None:
        """Fixes the prices of a step and of a verified token for a round of ``rows`` rows."""
        self._steps = 0
        self._rate = self.costs.best_rate(rows)
        if self._rate == 0:
            self._saved, self._token_price = 0.0, 0.5
            return
        token_seconds = self.costs.verify.slope
        # Where streaming goes on while drafting, verification is shorter after a longer draft and
        # the slope negative: the saving belongs to the step, which hides that much streaming.
        _, steps, verified, _ = self.costs.means
        tokens_of_a_step = rows * (verified - 1) / steps if steps > 0 else rows
        self._saved = max(0.0, -token_seconds) * tokens_of_a_step
        self._token_price = max(0.0, token_seconds) * self._rate

    def survival(self, previous: npt.ArrayLike, top1: npt.ArrayLike) -> Floats:
        """[rows] probability that each row's newest draft token and all before it are accepted.

        Args:
            previous: [rows] the same for the token before; 1 for the root, 0 for a row that
                may not draft on.
            top1: [rows] the draft's top-1 probability, sharpened by the draft temperature.
        """
        return np.asarray(previous, np.float64) * self.acceptance.estimate(top1)

    def _gains(self, survival: npt.ArrayLike, displaced: npt.ArrayLike) -> Floats:
        """[nodes] tokens that expanding each node is expected to add, less their verification."""
        expected = np.asarray(survival, np.float64) * self.acceptance.next_token
        worst = np.maximum(np.asarray(displaced, np.float64), self._token_price)
        return np.maximum(expected - worst, 0.0)

    def expands(
        self, survival: npt.ArrayLike, displaced: npt.ArrayLike = 0.0
    ) -> npt.NDArray[np.bool_]:
        """[nodes] whether each node of the frontier is worth its place in the next step.

        The arguments are those of `keep_drafting`, which asks whether the step as a whole pays.
        Before the first step every row's root is.
        """
        gains = self._gains(survival, displaced)
        if self._steps == 0:
            return np.asarray(survival, np.float64) > 0
        return gains > max(0.0, self.costs.step.slope) * self._rate

    def keep_drafting(self, survival: npt.ArrayLike, displaced: npt.ArrayLike = 0.0) -> bool:
        """Whether another step pays that expands the given nodes; of chains, one for each row.

        True counts as one step taken; after ``max_steps`` of them the answer is False.

        Args:
            survival: [nodes] survival of each; 0 for a node that is not expanded.
            displaced: [nodes] survival of the node that a child would push out of its row's draft,
                0 where there is room.
        """
        nodes = int((np.asarray(survival, np.float64) > 0).sum())
        if self._steps >= self.max_steps or not nodes:
            return False
        price = max(0.0, self.costs.step.predict(nodes) - self._saved) * self._rate
        pays = self._gains(survival, displaced).sum() > price
        self._steps += 1
        return bool(pays) or self._steps == 1

    def lengths(self, survival: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """[rows] draft tokens of each row that are worth verifying, at least 1.

        Steps are taken for the batch, so a row that lost its way is drafted on with the others;
        its tail would cost verification and yield nothing.

        Args:
            survival: [rows, nodes] of all drafted tokens, in any order; negative where a row has
                fewer. It does not rise along a path, so the best ones are closed under parents.
        """
        worth = (np.asarray(survival, np.float64) >= self._token_price).sum(axis=1)
        rounds = self.costs.rounds
        share = _EXPLORED[rounds] if rounds < len(_EXPLORED) else 1.0
        return np.maximum(np.ceil(worth * share).astype(np.int64), 1)

    def observe_round(self, done: Round) -> None:
        """Learns costs and throughput from a finished round. One without rows teaches nothing."""
        if done.rows > 0:
            self.costs.observe(done)


class FullGrowth(DepthController):
    """Every level and every node of it, as far as the limits allow: nothing is pruned.

    It learns as its base does; what it learns decides only which nodes a tree keeps.
    """

    def pays(self, rows: int, reading: Reading | None = None) -> bool:
        return True

    def expands(
        self, survival: npt.ArrayLike, displaced: npt.ArrayLike = 0.0
    ) -> npt.NDArray[np.bool_]:
        return np.asarray(survival, np.float64) > 0

    def keep_drafting(self, survival: npt.ArrayLike, displaced: npt.ArrayLike = 0.0) -> bool:
        going = self._steps < self.max_steps and bool((np.asarray(survival) > 0).any())
        self._steps += going
        return going

    def lengths(self, survival: npt.ArrayLike) -> npt.NDArray[np.int64]:
        return (np.asarray(survival, np.float64) >= 0).sum(axis=1)
