# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""The server's ``/metrics`` also show what every worker knows of its rounds and its ring.

The workers are asked whenever the server logs its statistics, every `VLLM_LOG_STATS_INTERVAL`
seconds. They answer with totals, and what is new since the last answer is counted.
"""

import contextlib
import functools
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from vllm_subspec.core.metrics import COMMON, METRICS, PREFIX
from vllm_subspec.engine.method import options_of

_MARK = "_vllm_subspec_metrics"


class Families:
    """The metrics of this process."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._families: dict[str, Any] = {}
        for metric in METRICS:
            name, labels = PREFIX + metric.name, COMMON + metric.labels
            told = (name, metric.meaning, labels)
            if metric.kind == "counter":
                self._families[metric.name] = Counter(*told, registry=registry)
            elif metric.kind == "histogram":
                self._families[metric.name] = Histogram(
                    *told, registry=registry, buckets=metric.buckets
                )
            else:
                # Of several front ends only one asks: its word is the newest.
                self._families[metric.name] = Gauge(
                    *told, registry=registry, multiprocess_mode="mostrecent"
                )

    def __getitem__(self, name: str) -> Any:
        return self._families[name]


@functools.cache
def _families() -> Families:
    return Families()


class Observer:
    """Counts what one worker's statistics say that they did not say before."""

    def __init__(self, families: Families, model_name: str) -> None:
        self._families = families
        self._model_name = model_name
        self._last: Mapping[str, Any] = {}

    @property
    def rounds(self) -> int:
        """That have been counted."""
        return int(self._last.get("rounds", 0))

    def update(self, statistics: Mapping[str, Any]) -> None:
        """Takes in what `control.DraftingControl.statistics` returned to ``seen=self.rounds``."""
        last, self._last = self._last, statistics
        common = (self._model_name, str(statistics["rank"]))
        known = last.get("counters", {})
        for name, total in statistics["counters"].items():
            self._families[name].labels(*common).inc(total - known.get(name, 0))
        for kind, name, index, count in _growth(statistics, last):
            if kind == "by_depth":
                self._families[name].labels(*common, str(index)).inc(count)
                continue
            for _ in range(count):
                self._families[name].labels(*common).observe(index)
        for name, values in statistics["seconds"].items():
            for value in values:
                self._families[name].labels(*common).observe(value)
        for name, value in statistics["gauges"].items():
            self._families[name].labels(*common).set(value)
        if store := statistics.get("store"):
            self._families["store_info"].labels(*common, store["source"], store["reused"]).set(1)


def _growth(now: Mapping[str, Any], last: Mapping[str, Any]) -> list[tuple[str, str, int, int]]:
    """(kind, name, index, count) of all counts by index that have grown."""
    return [
        (kind, name, index, count - before)
        for kind in ("by_depth", "distributions")
        for name, counts in now[kind].items()
        for index, (count, before) in enumerate(
            zip(counts, last[kind][name] if last else [0] * len(counts), strict=True)
        )
        if count > before
    ]


class ServerMetrics:
    """Of one engine."""

    def __init__(self) -> None:
        self._observers: list[Observer] = []

    async def update(self, engine: AsyncLLM) -> None:
        """Ask every worker what is new, and count it."""
        seen = self._observers[0].rounds if self._observers else 0
        answers = await engine.collective_rpc("statistics", args=(seen,))
        if not self._observers:
            name = engine.model_config.served_model_name
            self._observers = [Observer(_families(), name) for _ in answers]
        for observer, statistics in zip(self._observers, answers, strict=True):
            observer.update(statistics)


def install() -> None:
    """Wrap `AsyncLLM.do_log_stats`, which servers call at intervals, once."""
    original = AsyncLLM.do_log_stats
    if getattr(original, _MARK, False):
        return
    engines: WeakKeyDictionary[AsyncLLM, ServerMetrics] = WeakKeyDictionary()

    @functools.wraps(original)
    async def do_log_stats(self: AsyncLLM) -> None:
        await original(self)
        # Front ends that share an engine share their metrics, too: the first one asks for all.
        first = self.engine_core.client_index == 0
        if self.logger_manager is None or not first or options_of(self.vllm_config) is None:
            return
        with contextlib.suppress(EngineDeadError):  # whoever waits for a request hears of it
            await engines.setdefault(self, ServerMetrics()).update(self)

    setattr(do_log_stats, _MARK, True)
    AsyncLLM.do_log_stats = do_log_stats
