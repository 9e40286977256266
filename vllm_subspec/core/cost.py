# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""What do rounds cost and yield? Measured, and fitted to predict rounds of another size.

Everything is a pure function of the numbers passed in: no clock is read. All sums are in float64.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

_FORGET = 0.05  # weight of the newest round in the cost of verifying and in the throughput
_FORGET_STEP = 0.002  # weight of the newest step in the cost of steps; a round has tens of them
_MARGIN = 4.0  # a time this many mean deviations too long is an outlier


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

    def expect(self, points: Mapping[int, float]) -> None:
        """Begin with seconds by x that were not observed; the next observations count for more.

        Args:
            points: at least one.
        """
        x, y = np.array(list(points), np.float64), np.array(list(points.values()), np.float64)
        self._weight, self._x, self._y = 1.0, float(x.mean()), float(y.mean())
        self._xx = float(((x - self._x) ** 2).mean())
        self._xy = float(((x - self._x) * (y - self._y)).mean())
        # Whatever is observed first is believed, several times as long or not.
        self._deviation = self._y

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
class ExpectedCosts:
    """Seconds that rounds are expected to cost before any was observed."""

    step: Mapping[int, float]
    """Of a draft step, by nodes."""
    verify: Mapping[int, float]
    """Of a pass of the target, by tokens; one token is among them."""


class RowMeans(NamedTuple):
    """Of a row in a round that drafted, on average over the recent ones."""

    emitted: float  # tokens
    steps: float
    verified: float  # tokens
    nodes: float  # of all steps


class RoundCosts:
    """Seconds and tokens of the rounds so far.

    Attributes:
        step: seconds of a draft step, by nodes.
        verify: seconds of the rest of a round, by verified tokens.
        plain: seconds of a round without drafts, by rows.
        rounds: with drafts, so far.
    """

    def __init__(self) -> None:
        self.step = CostLine(_FORGET_STEP)
        self.verify = CostLine()
        self.plain = CostLine()
        self.rounds = 0
        self._means = np.zeros(len(RowMeans._fields))
        self._weight = 0.0

    def expect(self, costs: ExpectedCosts) -> None:
        """Begin with these, before the first round."""
        self.step.expect(costs.step)
        self.verify.expect(costs.verify)
        self.plain.expect({1: costs.verify[1]})

    @property
    def means(self) -> RowMeans:
        """All 0 before the first round."""
        return RowMeans(*self._means.tolist())

    def drafting(self, rows: int) -> float:
        """Seconds that a round's draft takes."""
        _, steps, _, nodes = self.means
        return self.step.predict(rows * nodes / steps) * steps if steps > 0 else 0.0

    def rate(self, rows: int) -> float:
        """Tokens/s of rounds like the recent ones with ``rows`` rows; 0 before the first round.

        The quotient of means, not the mean of quotients, and by the fitted costs, so that it holds
        at once when the number of rows changes.
        """
        emitted, _, verified, _ = self.means
        seconds = self.verify.predict(rows * verified) + self.drafting(rows)
        return rows * emitted / seconds if seconds > 0 else 0.0

    def plain_rate(self, rows: int) -> float:
        """Tokens/s of rounds without drafts; 0 before there was one."""
        seconds = self.plain.predict(rows)
        return rows / seconds if seconds > 0 else 0.0

    def best_rate(self, rows: int) -> float:
        """The better one of the two: what anything that takes time must beat."""
        return max(self.rate(rows), self.plain_rate(rows))

    def observe(self, done: Round) -> None:
        """A round with drafts, of at least one row."""
        self.rounds += 1
        for nodes, seconds in zip(done.step_nodes, done.step_seconds, strict=True):
            self.step.observe(nodes, seconds)
        self.verify.observe(done.verified_tokens, done.verify_seconds)
        of_all = (done.emitted_tokens, done.steps * done.rows, done.verified_tokens)
        per_row = np.array([*of_all, sum(done.step_nodes)]) / done.rows
        self._weight = self._weight * (1 - _FORGET) + 1
        self._means += (per_row - self._means) / self._weight

    def doubt(self) -> None:
        """What is known of drafting is old."""
        self.step.doubt()
        self.verify.doubt()
        self._weight = min(self._weight, 1.0)
