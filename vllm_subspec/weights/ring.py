# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""The ring: a few device buffers through which all streamed layers pass.

Block ``i`` (the weights of the i-th streamed layer) always lives in slot ``i % slots``, so its
tensors are views at fixed addresses: compiled code and captured graphs never see them move.
Each pass uses blocks 0, 1, .. n-1 in order. As soon as a block is released, its slot is refilled
with the block that will use it next, which near the end of a pass is one of the *next* pass: while
the draft runs, the first ``slots`` blocks of the next verification load (the head start).

    release(i)  ->  slot i % slots is free  ->  load block i + slots, or i % slots after the wrap
"""

import contextlib
import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from vllm_subspec.weights.page_lock import page_unlock
from vllm_subspec.weights.store import StoreReadError

PATIENCE = 150.0
"""Seconds that a block may take, unless told otherwise."""


class BlockSource(Protocol):
    """Full-precision blocks at rest."""

    def read(self, index: int, out: torch.Tensor, cancel: threading.Event | None = None) -> None:
        """Fill ``out`` (uint8 ``[nbytes of block index]``); StoreReadError when it cannot."""

    def close(self) -> None: ...


class HostSource:
    """Blocks kept in host memory, one uint8 tensor each; page-locked when a GPU copies them."""

    def __init__(self, blocks: Sequence[torch.Tensor]) -> None:
        self._blocks = list(blocks)

    def block(self, index: int) -> torch.Tensor:
        return self._blocks[index]

    def read(self, index: int, out: torch.Tensor, cancel: threading.Event | None = None) -> None:
        out.copy_(self._blocks[index])

    def close(self) -> None:
        for block in self._blocks:
            page_unlock(block)
        self._blocks.clear()


@dataclass(frozen=True, slots=True)
class Interval:
    """What took time for a block; times are of ``time.perf_counter``."""

    block: int
    began: float
    ended: float


_KEPT = 8192  # of the newest intervals of a kind
_NOTEWORTHY = 1e-4  # seconds of waiting


class Transfer(Protocol):
    """How a block gets from its source into a slot, and how its arrival is awaited.

    The three calls are fences: `start` may be called only on a slot whose last use was announced
    by `release`; after `wait` the slot holds the block for everything that is issued later on the
    compute thread or stream.
    """

    @property
    def loads(self) -> list[Interval]:
        """The newest reads by a background thread."""

    @property
    def read_seconds(self) -> float:
        """Seconds of all reads by a background thread; 0 where the device copies by itself."""

    def start(self, block: int, slot: int) -> None: ...

    def wait(self, slot: int) -> None:
        """Raises StoreReadError when the block could not be read."""

    def ready(self, slot: int) -> bool: ...

    def release(self, slot: int) -> None: ...

    def quiet(self) -> AbstractContextManager[None]:
        """Meanwhile a read has ended when its `start` returns: no other thread does anything."""

    def close(self) -> None: ...


@dataclass
class RingStats:
    """Counters since the ring was made; bytes, seconds, passes."""

    passes: int = 0
    bytes_streamed: int = 0
    stall_seconds: float = 0.0
    head_start_ready: int = 0
    """Blocks of a head start that were already in their slot when their pass began."""
    head_start_total: int = 0
    failures: int = 0
    blocks: int = 0
    """That passes asked for."""
    misses: int = 0
    """Of them, those that the pass stood still for."""


class MissedWaitError(Exception):
    """A pass that did not wait for a block may have computed with the weights of another."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what}: its code was made for another memory plan; remove vLLM's compile cache "
            "(VLLM_CACHE_ROOT) and restart"
        )


@dataclass
class Ring:
    """Orders loads into slots. Called by one thread only: the one that runs the model."""

    transfer: Transfer
    block_nbytes: Sequence[int]
    slots: int
    stats: RingStats = field(default_factory=RingStats)

    def __post_init__(self) -> None:
        if not 1 <= self.slots <= len(self.block_nbytes):
            raise ValueError(
                f"a ring of {self.slots} slots cannot serve {len(self.block_nbytes)} blocks"
            )
        self._loading: list[int] = [-1] * self.slots  # the block each slot holds or awaits
        self._failure: StoreReadError | MissedWaitError | None = None
        self._due = 0  # the block that the pass is to wait for next
        self.waits: deque[Interval] = deque(maxlen=_KEPT)
        """The newest times that the compute thread stood still for a block."""
        for block in range(self.slots):
            self._load(block)

    @property
    def blocks(self) -> int:
        return len(self.block_nbytes)

    def _load(self, block: int) -> None:
        slot = block % self.slots
        self._loading[slot] = block
        self.transfer.start(block, slot)

    def wait(self, block: int) -> None:
        """Return when ``block`` is in its slot.

        A block that cannot be read does not raise here: the pass runs to its end on whatever the
        slot holds, so that all ranks of a tensor-parallel group stay in step, and whoever started
        the pass asks `take_failure` before it believes a result.
        """
        slot = block % self.slots
        if block == 0:
            self._begin_pass()
        if block != self._due or block >= self.blocks:
            missed = MissedWaitError(f"a pass waited for block {block} where {self._due} was due")
            self._failure = self._failure or missed
        if block >= self.blocks:
            return
        self._due = block + 1
        if self._loading[slot] != block:
            # The last pass did not reach its end, or a pass began in the middle.
            self._drain(slot)
            self._load(block)
        begin = time.perf_counter()
        try:
            self.transfer.wait(slot)
            self.stats.bytes_streamed += self.block_nbytes[block]
        except StoreReadError as error:
            self.stats.failures += 1
            self._failure = self._failure or error
            self._loading[slot] = -1
        end = time.perf_counter()
        self.stats.blocks += 1
        self.stats.stall_seconds += end - begin
        if end - begin > _NOTEWORTHY:
            self.stats.misses += 1
            self.waits.append(Interval(block, begin, end))

    def release(self, block: int) -> None:
        """``block`` has been used by everything issued so far; refill its slot."""
        if block >= self.blocks:
            return
        slot = block % self.slots
        self.transfer.release(slot)
        follower = block + self.slots
        self._load(follower if follower < self.blocks else slot)

    def take_failure(self, ran: bool = False) -> StoreReadError | MissedWaitError | None:
        """The first read error, or missed wait, since the last call, if any.

        Args:
            ran: whether a pass has been run since then, which the ring does not see if it waited
                for nothing at all.
        """
        if self._due != self.blocks and (ran or self._due):
            missed = f"a pass waited for {self._due} of its {self.blocks} blocks"
            self._failure = self._failure or MissedWaitError(missed)
        self._due = 0
        failure, self._failure = self._failure, None
        return failure

    def close(self) -> None:
        self.transfer.close()

    def _begin_pass(self) -> None:
        self._due = 0
        self.stats.passes += 1
        if self.stats.passes > 1:
            self.stats.head_start_total += self.slots
            self.stats.head_start_ready += sum(
                self._loading[slot] == slot and self.transfer.ready(slot)
                for slot in range(self.slots)
            )

    def _drain(self, slot: int) -> None:
        if self._loading[slot] < 0:
            return
        # A failed block is not wanted any more; a new read of it will speak for itself.
        with contextlib.suppress(StoreReadError):
            self.transfer.wait(slot)
        self.transfer.release(slot)


class ReaderStalledError(Exception):
    """A read neither ended nor failed. It may still write into its slot, so nothing can go on."""


class BackgroundReads:
    """One thread that reads, in the order asked, at most one block for each slot.

    Args:
        patience: seconds after which a read that is waited for is given up.
        prepare: called in the thread before anything else.
    """

    def __init__(
        self, slots: int, patience: float, prepare: Callable[[], None] | None = None
    ) -> None:
        self.cancel = threading.Event()
        self.intervals: deque[Interval] = deque(maxlen=_KEPT)
        """The newest reads; the thread appends to it."""
        self.seconds = 0.0
        """Of all reads; only the thread adds to it."""
        self._patience = patience
        self._stalled = False
        self._pending: list[Future[None] | None] = [None] * slots
        self._thread = ThreadPoolExecutor(1, "subspec-ring", prepare)
        self._at_once = False

    def start(self, slot: int, block: int, read: Callable[..., None], *args: Any) -> None:
        """Reads ``block`` by ``read(*args)``."""
        self._pending[slot] = self._thread.submit(self._timed, block, read, *args)
        if self._at_once:
            self._end_all()

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """See `Transfer.quiet`."""
        self._end_all()
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def _end_all(self) -> None:
        """Whoever waits for a read hears if it failed or has not ended."""
        wait([pending for pending in self._pending if pending is not None], self._patience)

    def _timed(self, block: int, read: Callable[..., None], *args: Any) -> None:
        began = time.perf_counter()
        read(*args)
        ended = time.perf_counter()
        self.seconds += ended - began
        self.intervals.append(Interval(block, began, ended))

    def wait(self, slot: int) -> None:
        """Returns when the slot's read has ended.

        Raises:
            StoreReadError: it failed.
            ReaderStalledError: the disk hangs, or the thread is gone.
        """
        pending = self._pending[slot]
        assert pending is not None, "waited for a slot that nothing was loaded into"
        if not wait([pending], self._patience).done:
            self._stalled = True
            raise ReaderStalledError(
                f"a streamed weight has not arrived in {self._patience:g} s: the disk hangs, or "
                "its reader has died; check the disk and restart "
                "(VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS is twice this limit)"
            )
        pending.result()

    def ready(self, slot: int) -> bool:
        pending = self._pending[slot]
        return pending is not None and pending.done() and pending.exception() is None

    def close(self) -> bool:
        """Cancels what is under way; whether nothing reads any more."""
        self.cancel.set()
        self._thread.shutdown(wait=not self._stalled, cancel_futures=True)
        return not self._stalled


class ThreadTransfer:
    """Reads blocks into slots in host memory on one background thread, in the order asked.

    Args:
        source: where blocks come from.
        slots: uint8 buffers, one per slot; a block fills the front of its slot.
        block_nbytes: bytes of each block.
        patience: seconds that a block may take.
    """

    def __init__(
        self,
        source: BlockSource,
        slots: Sequence[torch.Tensor],
        block_nbytes: Sequence[int],
        patience: float = PATIENCE,
    ) -> None:
        self._source = source
        self._slots = list(slots)
        self._block_nbytes = list(block_nbytes)
        self._reads = BackgroundReads(len(self._slots), patience)

    @property
    def loads(self) -> list[Interval]:
        return list(self._reads.intervals)

    @property
    def read_seconds(self) -> float:
        return self._reads.seconds

    def start(self, block: int, slot: int) -> None:
        out = self._slots[slot][: self._block_nbytes[block]]
        self._reads.start(slot, block, self._source.read, block, out, self._reads.cancel)

    def wait(self, slot: int) -> None:
        self._reads.wait(slot)

    def ready(self, slot: int) -> bool:
        return self._reads.ready(slot)

    def release(self, slot: int) -> None:
        """Nothing to fence: on the host the compute that read the slot has returned."""

    def quiet(self) -> AbstractContextManager[None]:
        return self._reads.quiet()

    def close(self) -> None:
        if self._reads.close():
            self._source.close()


class CudaTransfer:
    """Copies blocks into slots in device memory on a copy stream.

    A `HostSource` (page-locked) is copied from directly; any other source is first read by a
    background thread into ``staging``, page-locked buffers used in turn. Events fence both
    directions: the copy stream waits until the compute stream has finished with a slot, the
    compute stream waits until the copy has arrived.
    """

    def __init__(
        self,
        source: BlockSource,
        slots: Sequence[torch.Tensor],
        block_nbytes: Sequence[int],
        staging: Sequence[torch.Tensor] = (),
        patience: float = PATIENCE,
    ) -> None:
        self._source = source
        self._slots = list(slots)
        self._block_nbytes = list(block_nbytes)
        device = self._slots[0].device
        self._stream = torch.cuda.Stream(device=device)
        # What the slots' memory was used for before may not have been computed yet.
        self._stream.wait_stream(torch.cuda.current_stream(device))
        self._arrived = [torch.cuda.Event() for _ in self._slots]
        self._used = [torch.cuda.Event() for _ in self._slots]
        self._staging = list(staging)
        self._staging_copied = [torch.cuda.Event() for _ in self._staging]
        self._issued = 0
        self._reads: BackgroundReads | None = None
        if not isinstance(source, HostSource):
            # A new thread's device is the first of the machine.
            prepare = functools.partial(torch.cuda.set_device, device)
            self._reads = BackgroundReads(len(self._slots), patience, prepare)

    @property
    def loads(self) -> list[Interval]:
        return [] if self._reads is None else list(self._reads.intervals)

    @property
    def read_seconds(self) -> float:
        return 0.0 if self._reads is None else self._reads.seconds

    def start(self, block: int, slot: int) -> None:
        if isinstance(self._source, HostSource):
            self._copy(self._source.block(block), slot)
        else:
            assert self._reads is not None
            self._reads.start(slot, block, self._read_and_copy, block, slot, self._reads.cancel)

    def _copy(self, host: torch.Tensor, slot: int) -> None:
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._used[slot])
            self._slots[slot][: host.numel()].copy_(host, non_blocking=True)
            self._arrived[slot].record(self._stream)

    def _read_and_copy(self, block: int, slot: int, cancel: threading.Event) -> None:
        staging = self._issued % len(self._staging)
        self._issued += 1
        self._staging_copied[staging].synchronize()
        host = self._staging[staging][: self._block_nbytes[block]]
        self._source.read(block, host, cancel)
        self._copy(host, slot)
        self._staging_copied[staging].record(self._stream)

    def wait(self, slot: int) -> None:
        if self._reads is not None:
            self._reads.wait(slot)
        torch.cuda.current_stream().wait_event(self._arrived[slot])

    def ready(self, slot: int) -> bool:
        return (self._reads is None or self._reads.ready(slot)) and self._arrived[slot].query()

    def release(self, slot: int) -> None:
        self._used[slot].record(torch.cuda.current_stream())

    def quiet(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext() if self._reads is None else self._reads.quiet()

    def close(self) -> None:
        if self._reads is None or self._reads.close():
            self._stream.synchronize()
            for buffer in self._staging:
                page_unlock(buffer)
            self._source.close()
