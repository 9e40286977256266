# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from tests.unit.rounds import even_round
from vllm_subspec.core.cost import Round
from vllm_subspec.core.depth import DepthController

MAX_STEPS = 48


def test_nodes_that_do_not_pay_are_not_expanded() -> None:
    controller = DepthController(8)
    for width in [1, 2, 3] * 20:  # a node costs 10 ms, a pass 50 ms and nothing for a token
        done = even_round(1, 2, 2 * width + 1, 2, 2 * 0.01 * width, 0.05, width)
        controller.observe_round(done)
    controller.begin_round(1)
    assert controller.expands([1.0, 0.0]).tolist() == [True, False]  # the first step is taken
    assert controller.keep_drafting([1.0])
    worth = 0.01 * controller.costs.rate(1) / controller.acceptance.next_token
    survival = np.array([1.2, 1.1, 0.9, 0.5]) * worth
    assert controller.expands(survival).tolist() == [True, True, False, False]
    displaced = np.array([0.3, 0.0, 0.0, 0.0]) * worth
    assert controller.expands(survival, displaced).tolist() == [False, True, False, False]
    assert controller.keep_drafting(survival * controller.expands(survival))
    assert not controller.keep_drafting([0.9 * worth])


def test_first_token_is_always_drafted_and_the_limit_holds() -> None:
    controller = DepthController(3)
    for _ in range(50):  # a step costs ten passes: drafting never pays
        controller.begin_round(1)
        assert controller.keep_drafting([1.0])
        controller.observe_round(even_round(1, 1, 2, 1, 10.0, 1.0))
    assert not controller.keep_drafting([1.0])

    controller = DepthController(3)
    controller.begin_round(2)
    taken = 0
    while controller.keep_drafting([1.0, 1.0]):
        taken += 1
    assert taken == 3
    controller.begin_round(2)
    assert not controller.keep_drafting([0.0, 0.0])  # no row may draft
    with pytest.raises(ValueError, match="max_steps"):
        DepthController(0)


def test_survival_is_a_product_of_estimates() -> None:
    controller = DepthController(8)
    first = controller.survival([1.0, 0.5, 0.0], [0.9, 0.5, 1.0])
    assert first == pytest.approx([0.996, 0.5 * 0.789, 0.0])


def test_lengths_cut_rows_that_lost_their_way_only_where_verifying_costs() -> None:
    survival = np.array([[0.99, 0.98, 0.97], [0.3, 0.02, 0.001], [0.01, 0.01, 0.01]])

    def trained(token_seconds: float) -> DepthController:
        controller = DepthController(8)
        for steps in [2, 4, 6] * 20:
            tokens = 3 * (steps + 1)
            done = even_round(3, steps, tokens, 6, 0.01 * steps, 0.05 + token_seconds * tokens)
            controller.observe_round(done)
        controller.begin_round(3)
        return controller

    assert trained(0.0).lengths(survival).tolist() == [3, 3, 3]
    assert trained(0.01).lengths(survival).tolist() == [3, 1, 1]


def test_same_numbers_same_decisions() -> None:
    def depths() -> list[int]:
        simulation = Simulation(REGIMES["batch"], seed=3)
        controller = DepthController(MAX_STEPS)
        return [simulation.adaptive(controller).steps for _ in range(100)]

    assert depths() == depths()


# --- a known process, with a clock that is computed ---------------------------------------------


@dataclass(frozen=True)
class Regime:
    rows: int
    top1: tuple[float, ...]  # levels of the draft's confidence, equally likely
    acceptance: tuple[float, ...]  # true acceptance at each level; not the prior
    step_seconds: Callable[[int], float]  # rows
    verify_seconds: Callable[[int, float], float]  # tokens, seconds drafted


CONFIDENT = ((1.0, 1.0, 1.0, 1.0, 0.95, 0.6), (0.999, 0.999, 0.999, 0.999, 0.98, 0.7))
REGIMES = {
    "stream": Regime(1, *CONFIDENT, lambda rows: 0.012, lambda n, d: 0.6 + 0.0005 * n),
    "stream, uninformative": Regime(
        1, (0.8,), (0.93,), lambda rows: 0.012, lambda n, d: 0.6 + 0.0005 * n
    ),
    "stream, slow draft": Regime(1, *CONFIDENT, lambda rows: 0.05, lambda n, d: 0.6 + 0.0005 * n),
    "compute": Regime(1, *CONFIDENT, lambda rows: 0.010, lambda n, d: 0.03 + 0.008 * n),
    "batch": Regime(8, *CONFIDENT, lambda rows: 0.01 + 0.001 * rows, lambda n, d: 0.2 + 0.006 * n),
    "poor draft": Regime(1, (0.5, 0.3), (0.3, 0.1), lambda rows: 0.01, lambda n, d: 0.6),
    "poor draft, compute": Regime(
        4, (0.9, 0.5), (0.6, 0.2), lambda rows: 0.01, lambda n, d: 0.02 + 0.004 * n
    ),
    "hopeless": Regime(64, *CONFIDENT, lambda rows: 0.01 * rows, lambda n, d: 0.2 + 0.02 * n),
    "hopeless, stream": Regime(1, (0.5,), (0.02,), lambda rows: 0.2, lambda n, d: 0.6),
    "overlapped": Regime(
        1, *CONFIDENT, lambda rows: 0.012, lambda n, d: max(0.6 - d, 0.0) + 0.1 + 0.0005 * n
    ),
}


class Simulation:
    def __init__(self, regime: Regime, seed: int) -> None:
        self.regime = regime
        self.rng = np.random.default_rng(seed)

    def draw(self) -> tuple[np.ndarray, np.ndarray]:
        """Confidences and acceptances of [rows, MAX_STEPS] tokens: one seed, one text, whatever
        depth is drafted of it."""
        level = self.rng.integers(len(self.regime.top1), size=(self.regime.rows, MAX_STEPS))
        accepted = self.rng.random(level.shape) < np.array(self.regime.acceptance)[level]
        return np.array(self.regime.top1)[level], accepted

    def finish(self, steps: int, lengths: np.ndarray, accepted: np.ndarray) -> Round:
        counts = np.minimum(np.cumprod(accepted, axis=1).sum(axis=1), lengths)
        tokens = int(lengths.sum()) + self.regime.rows
        draft = steps * self.regime.step_seconds(self.regime.rows)
        verify = self.regime.verify_seconds(tokens, draft) * self.rng.normal(1, 0.03)
        emitted = int(counts.sum()) + self.regime.rows
        return even_round(self.regime.rows, steps, tokens, emitted, draft, verify)

    def plain(self) -> Round:
        return self.finish(0, np.zeros(self.regime.rows, np.int64), self.draw()[1])

    def fixed(self, depth: int) -> Round:
        _, accepted = self.draw()
        return self.finish(depth, np.full(self.regime.rows, depth), accepted)

    def adaptive(self, controller: DepthController) -> Round:
        if not controller.pays(self.regime.rows):
            done = self.plain()
            controller.observe_plain(done.rows, done.verify_seconds)
            return done
        top1, accepted = self.draw()
        controller.begin_round(self.regime.rows)
        survival = np.ones(self.regime.rows)
        drafted: list[np.ndarray] = []
        while controller.keep_drafting(survival):
            survival = controller.survival(survival, top1[:, len(drafted)])
            drafted.append(survival)
        lengths = controller.lengths(np.stack(drafted, axis=1))
        done = self.finish(len(drafted), lengths, accepted)
        alive = np.cumprod(np.hstack([np.ones((self.regime.rows, 1)), accepted]), axis=1)[:, :-1]
        tested = (alive > 0) & (np.arange(MAX_STEPS) < lengths[:, None])
        controller.acceptance.observe(top1[tested], accepted[tested])
        controller.observe_round(done)
        return done


def throughput(rounds: list[Round]) -> float:
    seconds = sum(r.draft_seconds + r.verify_seconds for r in rounds)
    return sum(r.emitted_tokens for r in rounds) / seconds


def best_fixed(regime: Regime, seed: int, warm: int, rounds: int) -> float:
    """Throughput of the best depth of a grid, on the text that ``seed`` gives."""

    def at(depth: int) -> float:
        simulation = Simulation(regime, seed)
        return throughput([simulation.fixed(depth) for _ in range(warm + rounds)][warm:])

    simulation = Simulation(regime, seed)
    plain = throughput([simulation.plain() for _ in range(warm + rounds)][warm:])
    return max(plain, *(at(depth) for depth in (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48)))


@pytest.mark.parametrize("name", REGIMES)
def test_converges_to_the_best_fixed_depth_or_better(name: str) -> None:
    regime = REGIMES[name]
    controller = DepthController(MAX_STEPS)
    simulation = Simulation(regime, seed=8)
    for _ in range(60):
        simulation.adaptive(controller)
    reached = throughput([simulation.adaptive(controller) for _ in range(600)])
    assert reached >= 0.95 * best_fixed(regime, 8, 60, 600)
    expected = max(controller.costs.rate(regime.rows), controller.costs.plain_rate(regime.rows))
    assert expected == pytest.approx(reached, rel=0.3)


def test_change_of_regime_is_followed() -> None:
    """From streaming to a resident model, and back: the depth follows within tens of rounds."""
    controller = DepthController(MAX_STEPS)
    for name in ("stream", "compute", "hopeless", "stream"):
        simulation = Simulation(REGIMES[name], seed=9)
        for _ in range(100):
            simulation.adaptive(controller)
        reached = throughput([simulation.adaptive(controller) for _ in range(400)])
        assert reached >= 0.95 * best_fixed(REGIMES[name], 9, 100, 400)


def test_price_follows_the_batch_at_once() -> None:
    """Costs are fitted over rows and tokens: a batch larger than any before is priced for what
    its own rounds will yield, not for the throughput of the smaller ones."""

    def play(rows: int) -> Round:
        draft, verify = 4 * (0.01 + 0.001 * rows), 0.2 + 0.006 * 5 * rows
        return even_round(rows, 4, 5 * rows, 3 * rows, draft, verify)

    controller = DepthController(MAX_STEPS)
    for rows in (1, 2, 3, 4) * 20:
        controller.observe_round(play(rows))
    for rows in (1, 4, 8):
        exact = throughput([play(rows)])
        assert controller.costs.rate(rows) == pytest.approx(exact, rel=0.1)
