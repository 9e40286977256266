# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from tests.unit.rounds import even_round
from vllm_subspec.core.cost import (
    AcceptanceModel,
    CostLine,
    DepthController,
    FixedSequence,
    FullGrowth,
    Reading,
    Round,
)

MAX_STEPS = 48


def test_prior_is_the_published_table_and_monotone() -> None:
    model = AcceptanceModel()
    assert model.estimate([0.9, 0.5, 0.3]) == pytest.approx([0.996, 0.789, 0.62])
    assert (np.diff(model.estimate(np.linspace(0, 1, 101))) >= 0).all()


def test_acceptance_follows_observations_in_their_bucket_only() -> None:
    rng = np.random.default_rng(0)
    model = AcceptanceModel()
    for _ in range(400):
        model.observe(np.full(8, 0.7), rng.random(8) < 0.3)
    assert model.estimate(0.7) == pytest.approx(0.3, abs=0.06)
    assert model.estimate(0.2) == pytest.approx(0.49)
    assert model.estimate(0.9) == pytest.approx(0.996)
    assert model.next_token == pytest.approx(0.3, abs=0.06)
    for _ in range(400):  # and forgets
        model.observe(np.full(8, 0.7), rng.random(8) < 0.9)
    assert model.estimate(0.7) == pytest.approx(0.9, abs=0.05)


def test_children_exclude_each_other_and_stand_in_their_order() -> None:
    model = AcceptanceModel()
    chances = model.children([[0.5, 0.9, 0.3], [0.1, 1.0, 1.0], [1.0, 1.0, 1.0]])
    refused = 1 - 0.789
    assert chances[0] == pytest.approx([0.789, refused * 0.996, refused * 0.004 * 0.62])
    assert chances[1] == pytest.approx(
        [0.21, 0.21, 0.79 * 0.0005 * 0.9995]
    )  # never above the first
    assert (chances.sum(axis=1) <= 1).all()


def test_next_token_counts_nodes_and_not_their_children() -> None:
    model = AcceptanceModel()
    for _ in range(400):  # of two nodes, one holds the token in its second child, one in none
        model.observe([0.5, 0.9, 0.5, 0.9], [False, True, False, False], [True, False, True, False])
    assert model.next_token == pytest.approx(0.5, abs=0.05)
    assert model.estimate([0.5, 0.9]) == pytest.approx([0.0, 0.5], abs=0.05)


def test_nodes_that_do_not_pay_are_not_expanded() -> None:
    controller = DepthController(8)
    for width in [1, 2, 3] * 20:  # a node costs 10 ms, a pass 50 ms and nothing for a token
        done = even_round(1, 2, 2 * width + 1, 2, 2 * 0.01 * width, 0.05, width)
        controller.observe_round(done)
    controller.begin_round(1)
    assert controller.expands([1.0, 0.0]).tolist() == [True, False]  # the first step is taken
    assert controller.keep_drafting([1.0])
    worth = 0.01 * controller.rate(1) / controller.acceptance.next_token
    survival = np.array([1.2, 1.1, 0.9, 0.5]) * worth
    assert controller.expands(survival).tolist() == [True, True, False, False]
    displaced = np.array([0.3, 0.0, 0.0, 0.0]) * worth
    assert controller.expands(survival, displaced).tolist() == [False, True, False, False]
    assert controller.keep_drafting(survival * controller.expands(survival))
    assert not controller.keep_drafting([0.9 * worth])


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


def rounds(
    controller: DepthController, count: int, slow: float, plain: float, pure: bool = True
) -> list[bool]:
    """Whether each of the next ``count`` rounds drafts, which then emits 2 tokens in ``slow``
    seconds; one without drafts takes ``plain``."""
    drafted = []
    for _ in range(count):
        drafted.append(controller.pays(1))
        if drafted[-1]:
            controller.begin_round(1)
            assert controller.keep_drafting([1.0])
            controller.observe_round(even_round(1, 1, 2, 2, slow / 2, slow / 2))
        else:
            controller.observe_plain(1, plain, pure)
    return drafted


def test_drafting_rests_where_plain_rounds_are_faster_and_is_tried_ever_more_seldom() -> None:
    controller = DepthController(3)
    drafted = np.array(rounds(controller, 1500, slow=3.0, plain=1.0))
    assert drafted[:6].all() and not drafted[6] and drafted[6:26].sum() == 18  # two looks
    rested = ~drafted[26:]
    assert rested.mean() > 0.94
    # Lengths of the rests, but for the one that the end has cut.
    rests = np.diff(np.flatnonzero(np.diff(np.r_[0, rested, 0])))[::2][:-1]
    assert rests.size >= 4 and (np.diff(rests) >= 0).all()
    # It pays again, and the next trial finds out.
    assert all(rounds(controller, 900, slow=1.0, plain=1.0)[800:])


def test_where_drafting_pays_a_plain_round_is_looked_at_now_and_then() -> None:
    assert sum(rounds(DepthController(3), 1000, slow=0.5, plain=1.0)) == 999  # once
    close = rounds(DepthController(3), 1000, slow=1.8, plain=1.0)
    assert 930 < sum(close) < 970


def test_where_every_round_reads_prompts_drafting_goes_on() -> None:
    """No plain round of such says what one costs, and each look is the last for a while."""
    assert sum(rounds(DepthController(3), 1000, slow=3.0, plain=1.0, pure=False)) > 930
    resting = DepthController(3)
    rounds(resting, 100, slow=3.0, plain=1.0)
    assert sum(rounds(resting, 1000, slow=3.0, plain=1.0, pure=False)) >= 4  # rests end


def test_while_prompts_are_read_drafting_goes_on_only_where_it_costs_little() -> None:
    """Rounds draft 8 tokens of a row in 0.1 s and emit 5, at 10 tokens/s."""
    controller = DepthController(8)
    computing = Reading(seconds=2.0, waited=0.0, tokens=1000)
    assert not controller.pays(1, computing)  # nothing is known
    controller.observe_plain(1, 1.0)
    for _ in range(30):
        assert controller.pays(1)
        controller.begin_round(1)
        controller.observe_round(even_round(1, 8, 9, 5, 0.1, 0.4))
    # A pass that computes all the time takes 0.116 s longer and yields 4 tokens: 34 tokens/s.
    assert controller.pays(1, computing)
    # Where a token takes 40 ms it takes 0.42 s longer: 9.5 tokens/s.
    assert not controller.pays(1, Reading(seconds=2.0, waited=0.0, tokens=50))
    # If it waited for its weights as long, nothing is lost.
    assert controller.pays(1, Reading(seconds=2.5, waited=0.5, tokens=50))


def test_what_prunes_nothing_never_rests() -> None:
    assert all(rounds(FullGrowth(3), 200, slow=3.0, plain=1.0))
    assert all(rounds(FixedSequence(3, 1), 200, slow=3.0, plain=1.0))


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
    expected = max(controller.rate(regime.rows), controller.plain_rate(regime.rows))
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
        assert controller.rate(rows) == pytest.approx(exact, rel=0.1)
