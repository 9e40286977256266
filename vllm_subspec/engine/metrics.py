# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""The server's ``/metrics`` also show what every worker knows of its rounds and its ring.

The workers are asked every `VLLM_LOG_STATS_INTERVAL` seconds while their engine serves. They answer
with totals, and what is new since the last answer is counted, by the means of the engine's own
Prometheus logger: under Ray Serve that is Ray's.
"""

import asyncio
import functools
from collections.abc import Callable, Mapping
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

from prometheus_client import Counter, Gauge, Histogram
from vllm import envs
from vllm.logger import init_logger
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.loggers import PrometheusStatLogger

from vllm_subspec.core.metrics import COMMON, METRICS, PREFIX
from vllm_subspec.engine.method import options_of

logger = init_logger(__name__)

_MARK = "_vllm_subspec_metrics"


class Families:
    """The metrics of this process.

    Args:
        counter, gauge, histogram: what makes them, called as `prometheus_client`'s.
    """

    def __init__(
        self,
        counter: Callable[..., Any] = Counter,
        gauge: Callable[..., Any] = Gauge,
        histogram: Callable[..., Any] = Histogram,
    ) -> None:
        self._families: dict[str, Any] = {}
        for metric in METRICS:
            told = (PREFIX + metric.name, metric.meaning, COMMON + metric.labels)
            if metric.kind == "counter":
                made = counter(*told)
            elif metric.kind == "histogram":
                made = histogram(*told, buckets=metric.buckets)
            else:
                # Of several front ends only one asks: its word is the newest.
                made = gauge(*told, multiprocess_mode="mostrecent")
            self._families[metric.name] = made

    def __getitem__(self, name: str) -> Any:
        return self._families[name]


@functools.cache
def _families(kind: type[PrometheusStatLogger]) -> Families:
    return Families(kind._counter_cls, kind._gauge_cls, kind._histogram_cls)


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
    """Of one engine.

    Args:
        families: in which its workers' statistics are counted.
    """

    def __init__(self, families: Families) -> None:
        self._families = families
        self._observers: list[Observer] = []

    async def update(self, engine: AsyncLLM) -> None:
        """Ask every worker what is new, and count it."""
        seen = self._observers[0].rounds if self._observers else 0
        answers = await engine.collective_rpc("statistics", args=(seen,))
        if not self._observers:
            name = engine.model_config.served_model_name
            self._observers = [Observer(self._families, name) for _ in answers]
        for observer, statistics in zip(self._observers, answers, strict=True):
            observer.update(statistics)


async def _ask_at_intervals(asked: ReferenceType[AsyncLLM], metrics: ServerMetrics) -> None:
    """Until the engine has ended or is gone; it is not kept for this."""
    while True:
        engine = asked()
        if engine is None or not engine.is_running:
            return
        try:
            await metrics.update(engine)
        except EngineDeadError:
            return  # whoever waits for a request hears of it
        except Exception:
            if engine.is_running:
                logger.exception("What the workers did since the last time is not in /metrics yet.")
        del engine
        await asyncio.sleep(envs.VLLM_LOG_STATS_INTERVAL)


def install() -> None:
    """Wrap `AsyncLLM._run_output_handler`, once: with it an engine begins to serve in an event
    loop, whoever serves it."""
    original = AsyncLLM._run_output_handler
    if getattr(original, _MARK, False):
        return
    asking: WeakKeyDictionary[AsyncLLM, asyncio.Task[None]] = WeakKeyDictionary()

    @functools.wraps(original)
    def run_output_handler(self: AsyncLLM) -> None:
        begins = self.output_handler is None  # called again with every request
        original(self)
        # Front ends that share an engine share their metrics, too: the first one asks for all.
        first = self.engine_core.client_index == 0
        if not begins or not first or self.logger_manager is None:
            return
        if options_of(self.vllm_config) is None:
            return
        kind: Any = next(
            type(stat_logger)
            for stat_logger in self.logger_manager.stat_loggers
            if isinstance(stat_logger, PrometheusStatLogger)
        )
        metrics = ServerMetrics(_families(kind))
        asking[self] = asyncio.create_task(_ask_at_intervals(ref(self), metrics))

    setattr(run_output_handler, _MARK, True)
    AsyncLLM._run_output_handler = run_output_handler
