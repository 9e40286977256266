# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
import numpy as np
import pytest

from vllm_subspec.core.cost import CostLine, ExpectedCosts, Round, RoundCosts
from vllm_subspec.core.depth import DepthController


def test_cost_line_recovers_the_line_under_noise_and_stalls() -> None:
    rng = np.random.default_rng(1)
    line = CostLine()
    for _ in range(300):
        x = int(rng.integers(2, 49))
        seconds = (0.5 + 0.02 * x) * rng.normal(1, 0.05)
        line.observe(x, seconds + (20.0 if rng.random() < 0.03 else 0.0))
    for x in (5, 20, 45):
        assert line.predict(x) == pytest.approx(0.5 + 0.02 * x, rel=0.15)


def test_slope_survives_rounds_of_one_depth() -> None:
    line = CostLine()
    for x in [4, 12, 20, 28] * 20:
        line.observe(x, 1 + 0.05 * x)
    learned = line.slope
    for _ in range(500):
        line.observe(16, 1 + 0.05 * 16)
    assert learned == pytest.approx(0.05, rel=0.15)
    assert line.slope == pytest.approx(learned, rel=0.1)


def test_lasting_slow_down_is_followed() -> None:
    line = CostLine()
    for _ in range(100):
        line.observe(10, 1.0)
    line.observe(10, 30.0)
    assert line.predict(10) < 1.05
    for _ in range(60):
        line.observe(10, 3.0)
    assert line.predict(10) == pytest.approx(3.0, rel=0.1)


def test_what_was_expected_is_a_line_and_the_first_observations_move_it() -> None:
    line = CostLine()
    line.expect({1: 0.010, 32: 0.041})
    assert line.observed
    # The slope is drawn towards 0 by a pseudo-observation, as always.
    assert line.predict(1) == pytest.approx(0.0105, rel=0.1)
    assert line.predict(32) == pytest.approx(0.0405, rel=0.1)
    for _ in range(3):  # all costs four times as much, and are no outliers
        for x in (1, 32):
            line.observe(x, 4 * (0.009 + 0.001 * x))
    assert line.predict(32) == pytest.approx(0.164, rel=0.35)


def test_rounds_begin_with_what_is_expected() -> None:
    costs = RoundCosts()
    costs.expect(ExpectedCosts({1: 0.010, 32: 0.020}, {1: 0.5, 32: 0.5}))
    assert costs.rounds == 0
    assert costs.rate(1) == 0  # of rounds with drafts nothing is known
    assert costs.best_rate(1) == pytest.approx(2.0)
    assert costs.verify.predict(16) == pytest.approx(0.5)
    costs.observe(Round(1, [1] * 8, [0.012] * 8, 9, 6, 0.6))
    assert costs.rate(1) == pytest.approx(6 / (0.55 + 8 * 0.011), rel=0.1)


def test_the_first_round_drafts_as_far_as_expected_costs_let_it() -> None:
    """A pass that streams for long makes dear what a fast one does not."""

    def drafted(verify: float) -> int:
        controller = DepthController(48)
        controller.costs.expect(ExpectedCosts({1: 0.01, 32: 0.01}, {1: verify, 32: verify}))
        controller.begin_round(1)
        survival, steps = 1.0, 0
        while controller.keep_drafting([survival]):
            survival *= 0.9
            steps += 1
        return steps

    assert drafted(1.0) > drafted(0.1) > drafted(0.02)
    assert drafted(0.001) == 1
