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
random, so that ranks given the same numbers decide alike. All sums are in float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

# Acceptance by the draft's top-1 probability at draft temperature 0.2, read from published SubSpec
# traces (Qwen and Llama 7B to 8B, chains, 4-bit substitutes). Above 0.9 a finer grid, since a deep
# chain lives on the difference between 0.99 and 0.999; 0 is extrapolated.
_PRIOR_PROBABILITY = np.array([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99, 1.0])
_PRIOR_ACCEPTANCE = np.array(
    [0.10, 0.21, 0.49, 0.62, 0.71, 0.789, 0.906, 0.958, 0.981, 0.996, 0.999, 0.9995]
)
_PRIOR_NEXT = 0.9  # acceptance of a token about which nothing is known yet
_PRIOR_COUNT = 20.0  # observations that the prior is worth
_WINDOW = 512.0  # observations, of one bucket, that an estimate remembers
_FORGET = 0.05  # weight of the newest round in the cost of verifying and in the throughput
_FORGET_STEP = 0.002  # weight of the newest step in the cost of steps; a round has tens of them
# What nodes cost to verify is seen only if their number varies. So the first rounds verify these
# shares of what they would.
_EXPLORED = (0.25, 1.0, 0.5, 0.25, 1.0, 0.5)
_MARGIN = 4.0  # a time this many mean deviations too long is an outlier
_TRIAL = 4  # rounds with drafts, after a rest: do they pay now?
_REST = 4.0  # a rest is so many times as long as a trial; doubled as long as trials fail
_LONGEST_REST = 64.0
_SETTLED = 24  # rounds with drafts, before which none is judged: the first are too deep
_LOOK = 16  # rounds with drafts between two looks at one without
_WORTH_RESTING = 1.03  # plain rounds must be so much faster
_WORTH_WAITING = 2.0  # times the going rate must drafts yield that others' first tokens wait for
_WORTH_TRYING = 0.7  # where they are expected to be at least so fast, one is tried


class AcceptanceModel:
    """Online probability that a draft token is accepted, by the draft's confidence in it.

    The confidence of a node's best child is its sharpened probability; that of each further child
    is its share of the probability that the children before it leave over. So defined it is the
    chance of a token *given that the better ones are refused*, and one table serves every rank:
    on a language model with 4-, 3- and 2-bit drafts, second to fourth children of one confidence
    were accepted as often as first ones, within what their counts can tell apart.

    Each bucket is a pair of counts, begun with pseudo-counts of the published table and slowly
    forgotten, so that the estimate follows the texts being written.

    Args:
        share: of the published acceptance that is expected at first.
        count: observations that this expectation is worth.
    """

    def __init__(self, share: float = 1.0, count: float = _PRIOR_COUNT) -> None:
        self._trials = np.full(_PRIOR_PROBABILITY.size + 1, count)
        prior = share * np.append(_PRIOR_ACCEPTANCE, _PRIOR_NEXT)  # last: any token
        self._accepted = self._trials * prior
        self._edges = (_PRIOR_PROBABILITY[1:] + _PRIOR_PROBABILITY[:-1]) / 2

    def estimate(self, top1: npt.ArrayLike) -> Floats:
        """Acceptance of tokens with top-1 probabilities ``top1``, interpolated; the same shape."""
        rates = (self._accepted / self._trials)[:-1]
        return np.interp(np.asarray(top1, np.float64), _PRIOR_PROBABILITY, rates)

    def children(self, confidence: npt.ArrayLike) -> Floats:
        """[m, b] probability that the token after each of m nodes is its r-th best child.

        The children exclude each other, so a row's sum is at most 1. A child never counts more
        than a better sibling: what is kept of a node's children is then always the best of them.

        Args:
            confidence: [m, b] confidences of the children, best child first.
        """
        given = self.estimate(confidence)
        refused = np.cumprod(1 - given, axis=1)
        given[:, 1:] *= refused[:, :-1]
        return np.minimum.accumulate(given, axis=1)

    @property
    def next_token(self) -> float:
        """Probability that a node's drafted children will hold the token after it."""
        return float(self._accepted[-1] / self._trials[-1])

    def observe(
        self, top1: npt.ArrayLike, accepted: npt.ArrayLike, first: npt.ArrayLike = True
    ) -> None:
        """Tokens that were put to the test: below the root and every accepted token, its children
        in order up to the one accepted. Of a chain: all accepted ones and the first refused.

        Args:
            top1: [m] their confidences; of a chain, top-1 probabilities.
            accepted: [m] whether each was accepted.
            first: [m] whether each is the best of its siblings; a chain has no others.
        """
        bucket = np.searchsorted(self._edges, np.asarray(top1, np.float64))
        size = _PRIOR_PROBABILITY.size
        trials = np.bincount(bucket, minlength=size).astype(np.float64)
        wins = np.bincount(bucket, np.asarray(accepted, np.float64), minlength=size)
        parents = np.broadcast_to(np.asarray(first, np.float64), bucket.shape).sum()
        trials, wins = np.append(trials, parents), np.append(wins, wins.sum())
        keep = (1 - 1 / _WINDOW) ** trials
        self._trials = self._trials * keep + trials
        self._accepted = self._accepted * keep + wins


class CostLine:
    """Online fit of seconds = a + b * x, robust to stalls.

    Weighted least squares that forgets. The spread of x is forgotten only as far as the new x
    renews it (directional forgetting), so a slope once learned survives any number of rounds of
    one depth. The slope is drawn towards 0 by one pseudo-observation a quarter of the mean x away.
    A time far above the fit counts as ``_MARGIN`` mean deviations above it (stalls only ever
    lengthen a time); a lasting change widens the deviation and is followed in tens of rounds.

    Args:
        forget: weight of the newest observation among many.
    """

    def __init__(self, forget: float = _FORGET) -> None:
        self._forget = forget
        self._weight = 0.0
        self._x = 0.0  # means
        self._y = 0.0
        self._xx = 0.0  # centred sums
        self._xy = 0.0
        self._deviation = 0.0

    @property
    def observed(self) -> bool:
        return self._weight > 0

    @property
    def slope(self) -> float:
        """Seconds for each further x."""
        ridge = (0.25 * self._x) ** 2
        return self._xy / (self._xx + ridge) if self._xx > 0 else 0.0

    def predict(self, x: float) -> float:
        """Seconds at ``x``: never below 0."""
        return max(0.0, self._y + self.slope * (x - self._x))

    def doubt(self) -> None:
        """What was observed so far is old: the next observations count for more than it."""
        self._weight = min(self._weight, 1.0)

    def observe(self, x: float, seconds: float) -> None:
        if self.observed:
            predicted = self.predict(x)
            margin = _MARGIN * max(self._deviation, 0.05 * predicted)
            seconds = min(seconds, predicted + margin)
            self._deviation += 0.1 * (abs(seconds - predicted) - self._deviation)
        dx, dy = x - self._x, seconds - self._y
        renewed = min(1.0, dx * dx * self._weight / self._xx) if self._xx > 0 else 0.0
        self._weight = self._weight * (1 - self._forget) + 1
        self._x += dx / self._weight
        self._y += dy / self._weight
        keep, share = 1 - self._forget * renewed, 1 - 1 / self._weight
        self._xx = self._xx * keep + share * dx * dx
        self._xy = self._xy * keep + share * dx * dy


@dataclass(frozen=True)
class Round:
    """What one round did. Rounds whose pass also carried prompt chunks are not recorded: their
    time says nothing about draft tokens."""

    rows: int  # requests that drafted
    step_nodes: Sequence[int]  # nodes that each draft step expanded, over all rows
    step_seconds: Sequence[float]  # of each draft step
    verified_tokens: int  # tokens of the verifying pass: draft tokens and one root for each row
    emitted_tokens: int
    verify_seconds: float  # the rest of the round, so that all together are its wall time

    @property
    def steps(self) -> int:
        return len(self.step_nodes)

    @property
    def draft_seconds(self) -> float:
        return sum(self.step_seconds)


@dataclass(frozen=True)
class Reading:
    """A pass that read parts of prompts, and did not come to the end of all of them."""

    seconds: float
    waited: float  # of them, for streamed weights
    tokens: int  # that it computed


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
        self._step = CostLine(_FORGET_STEP)  # seconds of a draft step, by nodes
        self._verify = CostLine()  # seconds of the rest of a round, by verified tokens
        self._plain = CostLine()  # seconds of a round without drafts, by rows
        self._rest = _REST
        self._rest_left = 0.0  # seconds
        self._trial_left = 0  # rounds
        self._since_look = _LOOK  # rounds with drafts since the last look at one without
        # Emitted tokens, steps, verified tokens and nodes of all steps, of a row in a round.
        self._means = np.zeros(4)
        self._weight = 0.0
        self._rounds = 0  # so far
        self._steps = 0  # of the round that is drafted now
        self._rate = 0.0  # tokens that must be expected from a second to pay for it
        self._saved = 0.0  # seconds by which a step shortens the verification
        self._token_price = 0.0  # probability above which verifying a token pays

    def rate(self, rows: int) -> float:
        """Tokens/s of rounds like the recent ones with ``rows`` rows; 0 before the first round.

        The quotient of means, not the mean of quotients, and by the fitted costs, so that it holds
        at once when the number of rows changes.
        """
        emitted, steps, verified, nodes = self._means
        seconds = self._verify.predict(rows * verified)
        if steps > 0:
            seconds += self._step.predict(rows * nodes / steps) * steps
        return float(rows * emitted / seconds) if seconds > 0 else 0.0

    def plain_rate(self, rows: int) -> float:
        """Tokens/s of rounds without drafts; 0 before there was one."""
        seconds = self._plain.predict(rows)
        return rows / seconds if seconds > 0 else 0.0

    def pays(self, rows: int, reading: Reading | None = None) -> bool:
        """Whether the next round, of ``rows`` rows, is to draft. Asked once for a round.

        Args:
            reading: the last pass, if it read a part of a prompt and the next one will read on.
        """
        if reading is not None:
            return self._pays_beside(rows, reading)
        if self._rounds < len(_EXPLORED):
            return True
        drafting, plain = self.rate(rows), self.plain_rate(rows)
        if plain <= _WORTH_RESTING * drafting or self._rounds < _SETTLED:
            self._rest, self._rest_left, self._trial_left = _REST, 0.0, 0
            close = plain > _WORTH_TRYING * drafting or not self._plain.observed
            return not (close and self._looks())
        if self._trial_left == 0 and self._rest_left == 0:
            self._begin_rest(rows)
        if self._rest_left > 0:
            return False
        if self._trial_left == _TRIAL:
            self._doubt()
        self._trial_left -= 1
        if self._trial_left == 0:
            self._rest = min(2 * self._rest, _LONGEST_REST)
        return True

    def _pays_beside(self, rows: int, reading: Reading) -> bool:
        """Whether drafts pay that lengthen a pass over parts of prompts, whose requests wait for
        their first tokens; those that draft have plain tokens from it in any case."""
        emitted, steps, verified, nodes = self._means
        drafting = self._step.predict(rows * nodes / steps) * steps if steps > 0 else 0.0
        # While a pass waits for its weights, drafting and verifying cost nothing.
        token = (reading.seconds - reading.waited) / reading.tokens
        longer = drafting + rows * (verified - 1) * token - reading.waited
        price = _WORTH_WAITING * max(self.rate(rows), self.plain_rate(rows))
        return bool(rows * (emitted - 1) > price * max(0.0, longer))

    def _looks(self) -> bool:
        """Whether it is time for a look at a round without drafts."""
        self._since_look += 1
        if self._since_look <= _LOOK:
            return False
        self._since_look = 0
        return True

    def _begin_rest(self, rows: int) -> None:
        """The next trial will take as long as rounds like the recent ones do."""
        self._trial_left = _TRIAL
        self._rest_left = self._rest * _TRIAL * rows * self._means[0] / self.rate(rows)

    def _doubt(self) -> None:
        """What is known of drafting is from before the rest."""
        self._step.doubt()
        self._verify.doubt()
        self._weight = min(self._weight, 1.0)

    def observe_plain(self, rows: int, seconds: float, pure: bool = True) -> None:
        """A round without drafts took ``seconds``.

        Args:
            pure: it computed one token of each row; else also parts of prompts, and says nothing
                about such rounds.
        """
        if pure:
            self._plain.observe(rows, seconds)
            if self._rest_left == 0:  # among rounds with drafts: it verified the roots alone
                self._verify.observe(rows, seconds)
        self._rest_left = max(0.0, self._rest_left - seconds)

    def begin_round(self, rows: int) -> None:
        """Fixes the prices of a step and of a verified token for a round of ``rows`` rows."""
        self._steps = 0
        # The best rate that is known is what a step must beat.
        self._rate = max(self.rate(rows), self.plain_rate(rows))
        if self._rate == 0:
            self._saved, self._token_price = 0.0, 0.5
            return
        token_seconds = self._verify.slope
        # Where streaming goes on while drafting, verification is shorter after a longer draft and
        # the slope negative: the saving belongs to the step, which hides that much streaming.
        _, steps, verified, _ = self._means
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
        return gains > max(0.0, self._step.slope) * self._rate

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
        price = max(0.0, self._step.predict(nodes) - self._saved) * self._rate
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
        share = _EXPLORED[self._rounds] if self._rounds < len(_EXPLORED) else 1.0
        return np.maximum(np.ceil(worth * share).astype(np.int64), 1)

    def observe_round(self, done: Round) -> None:
        """Learns costs and throughput from a finished round. One without rows teaches nothing."""
        if done.rows == 0:
            return
        self._rounds += 1
        for nodes, seconds in zip(done.step_nodes, done.step_seconds, strict=True):
            self._step.observe(nodes, seconds)
        self._verify.observe(done.verified_tokens, done.verify_seconds)
        emitted, verified = done.emitted_tokens / done.rows, done.verified_tokens / done.rows
        per_row = np.array([emitted, done.steps, verified, sum(done.step_nodes) / done.rows])
        self._weight = self._weight * (1 - _FORGET) + 1
        self._means += (per_row - self._means) / self._weight


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
        _, steps, verified, _ = self._means
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
