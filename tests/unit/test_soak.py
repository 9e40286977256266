# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""What the soak calls a difference, a leak and a run that says nothing."""

from pathlib import Path
from typing import Any

import pytest

from tests import ties
from tests.leaks import Leaks, Sample
from tests.soak import REQUESTS_PER_TIE, Apart, Asked, Got, Pairs, Soak, differs

# Differences

ASKED = Asked([5, 6], {"temperature": 0.0, "max_tokens": 9}, steps=None)


@pytest.mark.parametrize(
    ("plain", "drafted", "apart"),
    [
        (((1, 2, 3), True), ((1, 2, 3), True), False),
        (((1, 2, 3), True), ((1, 2, 4), True), True),
        (((1, 2, 3), True), ((1, 2), True), True),
        (((1, 2), True), ((1, 2, 3), True), True),
        (((), True), ((1,), True), True),
        # The drafted one was aborted.
        (((1, 2, 3), True), ((1, 2), False), False),
        (((1, 2, 3), True), ((), False), False),
        (((1, 2, 3), True), ((1, 9), False), True),
        (((1, 2), True), ((1, 2, 3), False), True),  # beyond the end
        # The plain one was.
        (((1, 2), False), ((1, 2, 3), True), False),
        (((1, 9), False), ((1, 2, 3), True), True),
        # Both were.
        (((1, 2), False), ((1, 2, 3), False), False),
        (((1, 2, 3), False), ((1, 2), False), False),
        (((1, 2, 3), False), ((1, 9), False), True),
        (((), False), ((1,), False), False),
    ],
)
def test_what_contradicts(plain: Got, drafted: Got, apart: bool) -> None:
    assert differs(plain, drafted) is apart
    soak = Soak()
    soak.compare(ASKED, plain, drafted, "chains")
    assert (soak.compared, soak.emitted) == (1, len(drafted[0]))
    assert soak.apart == ([Apart(ASKED, plain, drafted, "chains")] if apart else [])


def test_an_answer_that_only_ends_early_is_no_near_tie() -> None:
    nobody: Any = None  # no engine need be asked
    assert ties.gap(nobody, ASKED.prompt, ASKED.params, (1, 2, 3), (1, 2)) == float("inf")


def test_more_near_ties_than_happen() -> None:
    soak = Soak()
    one = Apart(ASKED, ((1,), True), ((2,), True), "")
    for compared, apart, many in (
        (1, 1, False),
        (100, 2, True),
        (REQUESTS_PER_TIE, 2, False),
        (REQUESTS_PER_TIE, 3, True),
    ):
        soak.compared, soak.apart = compared, [one] * apart
        assert soak.too_many_apart is many


# Runs


class Scripted(Soak):
    """Engines that compare and draft so much."""

    def __init__(self, compared: int, tau: float) -> None:
        super().__init__()
        self.given = compared, tau

    def _plain(self, ends: float) -> Pairs:
        return []

    def _drafted(self, pairs: Pairs, ends: float, folder: Path) -> str | None:
        self.compared, self.tau = self.given
        return None


@pytest.mark.parametrize(
    ("compared", "tau", "wrong"),
    [
        (9000, 2.5, None),
        (9000, 1.21, None),
        (0, 0.0, "not a single request was compared: give it more minutes"),
        (9000, 1.0, "hardly anything was drafted: tau is 1.00, not 1.2"),
        (9000, 1.19, "hardly anything was drafted: tau is 1.19, not 1.2"),
    ],
)
def test_a_run_that_tests_nothing_is_wrong(compared: int, tau: float, wrong: str | None) -> None:
    assert Scripted(compared, tau).run() == wrong


def test_what_grew_is_said_in_the_end() -> None:
    soak = Scripted(9000, 2.5)
    soak.leaks = sampled(files=lambda minute: 40 + int(minute > 15))
    assert soak.run() == "41 open files, 40 after the warm-up"


# Leaks

MINUTES = 20


def sampled(
    resident_mb: Any = lambda minute: 800.0,
    files: Any = lambda minute: 40,
    threads: Any = lambda minute: 12,
    minutes: float = MINUTES,
) -> Leaks:
    """Ten samples a minute; the first 0.4 of them are the warm-up."""
    leaks = Leaks()
    times = [number / 10 for number in range(int(10 * minutes) + 1)]
    leaks.samples = [Sample(t, [resident_mb(t)], files(t), threads(t)) for t in times]
    return leaks


def noisy(minute: float) -> float:
    """Memory that breathes by 5 MB."""
    return 800 + 5 * (round(10 * minute) % 7 - 3)


@pytest.mark.parametrize(
    "leaks",
    [
        sampled(),
        sampled(noisy),
        sampled(lambda minute: 800 + 0.5 * minute),  # settles slowly
        sampled(lambda minute: 800 - 5 * minute),
        sampled(lambda minute: 800 + 500 * (minute > 7)),  # inside the warm-up
        sampled(files=lambda minute: 40 + 3 * (minute > 7)),
        sampled(threads=lambda minute: 12 + 3 * (minute > 7)),
        sampled(files=lambda minute: 40 - 3 * (minute > 15)),
        sampled(lambda minute: 800 + 20 * minute, minutes=1),  # less than the least that says
        sampled(threads=lambda minute: 12 + int(minute > 0.8), minutes=1),
        sampled(minutes=0),
        Leaks(),
    ],
)
def test_what_is_no_leak(leaks: Leaks) -> None:
    assert leaks.found() == []
    assert str(leaks)


@pytest.mark.parametrize(
    ("leaks", "sentence"),
    [
        (
            sampled(lambda minute: 800 + 2 * minute),
            "the resident memory grew by 2.00 MB/min over 12.0 minutes",
        ),
        (
            sampled(lambda minute: noisy(minute) + 2 * minute),
            "the resident memory grew by ",
        ),
        (
            sampled(lambda minute: 800 + 20 * minute, minutes=4),
            "the resident memory grew by 20.00 MB/min over 2.4 minutes",
        ),
        (sampled(files=lambda minute: 40 + int(minute > 15)), "41 open files, 40 after"),
        (sampled(threads=lambda minute: 12 + int(minute > 15)), "13 threads, 12 after"),
        (sampled(files=lambda minute: 40 + int(minute > 0.8), minutes=1), "41 open files, 40"),
    ],
)
def test_what_is_a_leak(leaks: Leaks, sentence: str) -> None:
    (found,) = leaks.found()
    assert found.startswith(sentence)


def test_the_growth_of_all_processes_counts() -> None:
    leaks = Leaks()
    leaks.samples = [
        Sample(minute, [800 + 0.8 * minute, 300 + 0.9 * minute], 40, 12) for minute in range(21)
    ]
    assert leaks.mb_per_minute == pytest.approx(1.7)
    (found,) = leaks.found()
    assert "grew by 1.70 MB/min" in found


def test_this_process_is_sampled() -> None:
    leaks = Leaks()
    leaks.sample()
    leaks.sample()
    first, second = leaks.samples
    assert first.minutes <= second.minutes
    assert first.resident_mb[0] > 1 and first.files > 0 and first.threads > 0
