# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
import numpy as np
import pytest

from vllm_subspec.core.cost import CostLine


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
