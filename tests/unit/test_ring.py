# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""The ring gives every block, whole, to the pass that waits for it."""

import random
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_subspec.weights.ring import (
    HostSource,
    MissedWaitError,
    ReaderStalledError,
    Ring,
    ThreadTransfer,
)
from vllm_subspec.weights.store import StoreReadError

NBYTES = 64


class SlowSource:
    """Writes a block byte by byte with pauses, as a disk would; can be told to fail."""

    def __init__(self, seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.failing: set[int] = set()
        self.reads: list[int] = []

    def read(self, index: int, out: torch.Tensor, cancel: threading.Event | None = None) -> None:
        self.reads.append(index)
        out.fill_(255)
        time.sleep(self.random.random() * 0.002)
        if index in self.failing:
            raise StoreReadError(f"block {index} is unreadable")
        out.fill_(index)

    def close(self) -> None:
        pass


def make_ring(blocks: int, slots: int, source: SlowSource) -> tuple[Ring, list[torch.Tensor]]:
    buffers = [torch.zeros(NBYTES, dtype=torch.uint8) for _ in range(slots)]
    sizes = [NBYTES] * blocks
    return Ring(ThreadTransfer(source, buffers, sizes), sizes, slots), buffers


def run_pass(ring: Ring, buffers: list[torch.Tensor], upto: int) -> list[bool]:
    """One pass over the first ``upto`` blocks; whether each was whole from wait to release."""
    whole = []
    for block in range(upto):
        ring.wait(block)
        slot = buffers[block % ring.slots]
        good = bool((slot == block).all())
        time.sleep(0.0005)  # a loader that overwrote the slot in use would do so here
        whole.append(good and bool((slot == block).all()))
        ring.release(block)
    return whole


@settings(max_examples=25)
@given(
    blocks=st.integers(1, 9),
    slots=st.integers(1, 9),
    passes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    seed=st.integers(0, 99),
)
def test_every_block_is_whole_in_every_pass(
    blocks: int, slots: int, passes: list[int], seed: int
) -> None:
    """Also when passes stop early, whatever the numbers of blocks and slots."""
    source = SlowSource(seed)
    ring, buffers = make_ring(blocks, min(slots, blocks), source)
    for upto in passes:
        assert all(run_pass(ring, buffers, min(upto, blocks)))
    assert all(run_pass(ring, buffers, blocks))
    assert ring.take_failure() is None
    ring.close()


def test_full_passes_read_each_block_once() -> None:
    source = SlowSource()
    ring, buffers = make_ring(7, 3, source)
    for _ in range(4):
        assert all(run_pass(ring, buffers, 7))
    ring.close()
    # Four passes, and the head start of a fifth that may or may not have begun.
    assert 4 * 7 <= len(source.reads) <= 4 * 7 + 3
    assert sorted(source.reads[:7]) == list(range(7))
    assert ring.stats.bytes_streamed == 4 * 7 * NBYTES


def test_nothing_is_read_in_the_background_of_a_quiet_time() -> None:
    ring, buffers = make_ring(6, 3, source := SlowSource())
    with ring.transfer.quiet():
        for block in range(6):
            begun = len(source.reads)
            assert all(ring.transfer.ready(slot) for slot in range(3))
            ring.wait(block)
            time.sleep(0.003)
            assert len(source.reads) == begun
            assert (buffers[block % 3] == block).all()
            ring.release(block)
    assert all(run_pass(ring, buffers, 6))
    ring.close()


def test_the_head_start_loads_between_passes() -> None:
    ring, buffers = make_ring(6, 3, SlowSource())
    run_pass(ring, buffers, 6)
    deadline = time.monotonic() + 60
    while not all(ring.transfer.ready(slot) for slot in range(3)):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    run_pass(ring, buffers, 6)
    assert (ring.stats.head_start_ready, ring.stats.head_start_total) == (3, 3)
    ring.close()


@pytest.mark.parametrize("failing", [0, 2, 5])
def test_an_unreadable_block_fails_its_pass_only(failing: int) -> None:
    source = SlowSource()
    ring, buffers = make_ring(6, 2, source)
    assert all(run_pass(ring, buffers, 6))
    source.failing = {failing}
    # The head start may have been read before the fault, so it shows in this pass or the next.
    outcomes = []
    for _ in range(2):
        whole = run_pass(ring, buffers, 6)
        failure = ring.take_failure()
        assert (failure is None) == all(whole)
        outcomes.append(failure)
    assert isinstance(outcomes[-1], StoreReadError)
    source.failing = set()
    run_pass(ring, buffers, 6)
    ring.take_failure()  # the head start of this pass may still have been read under the fault
    assert all(run_pass(ring, buffers, 6))
    assert ring.take_failure() is None
    ring.close()


def test_a_read_that_never_ends_is_given_up() -> None:
    """It may still write into its slot: that is no failure of one pass, and nothing waits for it
    any more."""

    class Stuck(SlowSource):
        ended = threading.Event()

        def read(
            self, index: int, out: torch.Tensor, cancel: threading.Event | None = None
        ) -> None:
            if index == 3:
                self.ended.wait()
            super().read(index, out)

        def close(self) -> None:
            raise AssertionError("closed under its reader")

    buffers = [torch.zeros(NBYTES, dtype=torch.uint8) for _ in range(2)]
    sizes = [NBYTES] * 5
    ring = Ring(ThreadTransfer(Stuck(), buffers, sizes, patience=0.2), sizes, 2)
    try:
        assert all(run_pass(ring, buffers, 3))
        begin = time.monotonic()
        with pytest.raises(ReaderStalledError, match="not arrived in 0.2 s.* restart"):
            ring.wait(3)
        ring.close()
        assert time.monotonic() - begin < 5
    finally:
        Stuck.ended.set()


@pytest.mark.parametrize("missed", range(6))
def test_a_pass_that_misses_a_wait_is_a_failure(missed: int) -> None:
    ring, buffers = make_ring(6, 2, SlowSource())
    assert all(run_pass(ring, buffers, 6))
    assert ring.take_failure(ran=True) is None
    for block in range(6):
        if block != missed:
            ring.wait(block)
        ring.release(block)
    failure = ring.take_failure(ran=True)
    assert isinstance(failure, MissedWaitError)
    assert "another memory plan" in str(failure) and "\n" not in str(failure)
    assert all(run_pass(ring, buffers, 6))
    assert ring.take_failure(ran=True) is None
    ring.close()


def test_code_for_another_number_of_layers_is_a_failure() -> None:
    ring, buffers = make_ring(6, 2, SlowSource())
    ring_of_more = "waited for block 6 where 6 was due"
    assert all(run_pass(ring, buffers, 6))
    ring.wait(6)
    ring.release(6)
    assert ring_of_more in str(ring.take_failure(ran=True))
    run_pass(ring, buffers, 4)
    assert "waited for 4 of its 6 blocks" in str(ring.take_failure(ran=True))
    assert "waited for 0 of its 6 blocks" in str(ring.take_failure(ran=True))
    assert ring.take_failure() is None, "no pass, no failure"
    ring.close()


def test_host_source_serves_its_blocks() -> None:
    blocks = [torch.full((NBYTES,), index, dtype=torch.uint8) for index in range(4)]
    buffers = [torch.zeros(NBYTES, dtype=torch.uint8) for _ in range(2)]
    ring = Ring(ThreadTransfer(HostSource(blocks), buffers, [NBYTES] * 4), [NBYTES] * 4, 2)
    assert all(run_pass(ring, buffers, 4))
    ring.close()


def test_more_slots_than_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="3 slots cannot serve 2 blocks"):
        make_ring(2, 3, SlowSource())
