# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors

import numpy as np

from tests.unit.rounds import even_round
from vllm_subspec.core.depth import DepthController, FullGrowth
from vllm_subspec.core.resting import Reading
from vllm_subspec.core.sequence import FixedSequence


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


def test_drafting_that_seems_to_take_no_time_pays() -> None:
    """Costs that were learnt from large batches alone may come out as nothing for a single row."""
    controller = DepthController(3)
    for rows in [40, 60] * 60:
        controller.begin_round(rows)
        controller.observe_round(even_round(rows, 1, 2, 2, rows - 35.0, rows - 35.0))
    controller.observe_plain(1, 1.0, True)
    assert controller.costs.rate(1) == 0
    assert [controller.pays(1) for _ in range(9)].count(True) > 6
