# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Runs a scenario: all ways of a cell take turns, batch by batch, on one engine."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_subspec.bench.engine_process import EngineProcess
from vllm_subspec.bench.scenario import OFF, WAYS, Cell, Scenario, Way

if TYPE_CHECKING:
    from vllm_subspec.bench.session import Session

_WARM_UP = 48  # tokens of the first answer of a way, which is not counted
_TIMELINE = 6  # rounds that are kept one by one, of each way


def measure(scenario: Scenario, progress: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """The result, without its environment.

    Args:
        progress: called with a line before every batch of answers, `steps` times in all.

    Raises:
        EngineError: an engine cannot be started, or failed.
    """
    engines: list[dict[str, Any]] = []
    cells: list[dict[str, Any]] = []
    for bits in scenario.bits:
        progress(f"{_width(bits)}starting the engine")
        options, began = scenario.options_for(bits), time.perf_counter()
        with EngineProcess(scenario.model, options, **scenario.engine) as engine:
            ready = time.perf_counter() - began
            warm: set[tuple[Any, ...]] = set()
            for cell in scenario.cells(bits):
                cells.append(_cell(engine, scenario, cell, warm, progress))
            told = {**engine.call(_engine), "kernels": engine.call(_kernels)}
            engines.append({"bits": bits, "ready_seconds": ready, **told})
    stream_seconds = {engine["bits"]: engine["stream_seconds"] for engine in engines}
    for measured in cells:
        _add_bounds(measured, stream_seconds[measured["bits"]])
    return {"scenario": _described(scenario), "engines": engines, "cells": cells}


def steps(scenario: Scenario) -> int:
    """How many batches of answers a scenario has, and starts of engines."""
    return sum(
        1
        + sum(len(scenario.batches_of(cell)) * len(scenario.ways) for cell in scenario.cells(bits))
        for bits in scenario.bits
    )


def _cell(
    engine: EngineProcess,
    scenario: Scenario,
    cell: Cell,
    warm: set[tuple[Any, ...]],
    progress: Callable[[str], None],
) -> dict[str, Any]:
    ways = {name: WAYS[scenario.method][name] for name in scenario.ways}
    batches = [[prompt.text for prompt in batch] for batch in scenario.batches_of(cell)]
    for name, way in ways.items():
        key = (name, cell.depth, cell.temperature)
        if key not in warm and way.speculate:
            engine.call(answer, way, cell, batches[0][:1], min(_WARM_UP, scenario.tokens))
        warm.add(key)
    done: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    for number, batch in enumerate(batches, 1):
        for name, way in ways.items():
            progress(f"{_width(cell.bits)}{_title(cell)}, {name}, {number} of {len(batches)}")
            tokens = scenario.tokens if way.speculate else scenario.plain_tokens
            done[name].append(engine.call(answer, way, cell, batch, tokens))
    return {**asdict(cell), "ways": _summaries(done)}


def answer(
    session: "Session", way: Way, cell: Cell, prompts: list[str], tokens: int
) -> dict[str, Any]:
    """One batch of answers, and what the rounds were like; runs where the engine is."""
    if way.speculate:
        depth = {} if cell.depth is None else {"depth": cell.depth}
        session.llm.collective_rpc("set_drafting", kwargs={**way.drafting, **depth})
    before, began = session.call("round_log", float("inf")), time.perf_counter()
    margins = {} if way.speculate else {"logprobs": 2}  # they cost time, for every node
    given = session.generate(
        prompts, tokens, way.speculate, temperature=cell.temperature, seed=0, **margins
    )
    after = session.call("round_log", began)
    return {
        "requests": [
            {
                "prompt": one.prompt,
                "tokens": one.tokens,
                "steps": one.steps,
                "margins": one.margins,
                "prefill_seconds": one.prefill_seconds,
                "decode_seconds": one.decode_seconds,
            }
            for one in given
        ],
        "log": _difference(after, before) | {"records": after["records"]},
        "intervals": session.call("block_intervals", began) if _streams(session) else {},
    }


def _streams(session: "Session") -> bool:
    return session.method == "subspec"


def _difference(after: Any, before: Any) -> Any:
    """What was added to nested counts; "records" are left out."""
    if isinstance(after, Mapping):
        return {k: _difference(after[k], before[k]) for k in after if k != "records"}
    if isinstance(after, list):
        return [_difference(a, b) for a, b in zip(after, before, strict=True)]
    return after - before


def _sum(parts: list[Any]) -> Any:
    first = parts[0]
    if isinstance(first, Mapping):
        return {k: _sum([part[k] for part in parts]) for k in first if k != "records"}
    if isinstance(first, list):
        return [_sum(list(column)) for column in zip(*parts, strict=True)]
    return sum(parts)


def _summaries(done: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    found = {name: _summary(batches) for name, batches in done.items()}
    if OFF in done:
        plain = found[OFF]["requests"]
        for name, way in found.items():
            if name != OFF:
                way["speedup"] = way["tokens_per_second"] / found[OFF]["tokens_per_second"]
                way["differences"] = _differences(plain, way["requests"])
    for way in found.values():
        for request in way["requests"]:
            del request["margins"]
    return found


def _summary(batches: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the answers of one way, after each batch's first step."""
    requests = [
        {"batch": number, **request}
        for number, batch in enumerate(batches)
        for request in batch["requests"]
    ]
    decoded = sum(len(r["tokens"]) - r["steps"][0] for r in requests)
    seconds = sum(max(r["decode_seconds"] for r in batch["requests"]) for batch in batches)
    log = _sum([batch["log"] for batch in batches])
    totals = log["totals"]
    rounds, asked = max(1, totals["rounds"]), max(1, totals["request_rounds"])
    return {
        "tokens_per_second": decoded / seconds,
        "tau": totals["emitted_tokens"] / asked if totals["rounds"] else 1.0,
        "requests_per_round": totals["request_rounds"] / rounds,
        "draft_seconds_per_round": totals["draft_seconds"] / rounds,
        "verify_seconds_per_round": totals["verify_seconds"] / rounds,
        "stall_seconds_per_round": totals["stall_seconds"] / rounds,
        "requests": requests,
        "log": log,
        "timeline": _timeline(batches[-1]),
    }


def _timeline(batch: dict[str, Any]) -> dict[str, Any]:
    """The last rounds of a batch one by one, and what the ring did meanwhile; seconds since the
    first of them began."""
    records = batch["log"]["records"][-_TIMELINE:]
    if not records:
        return {"records": [], "loads": [], "waits": []}
    zero, end = records[0]["draft_began"], records[-1]["verify_ended"]
    moments = ("draft_began", "draft_ended", "verify_began", "verify_ended")
    shifted = [{**r, **{name: r[name] - zero for name in moments}} for r in records]
    within = {
        kind: [
            {**one, "began": one["began"] - zero, "ended": one["ended"] - zero}
            for one in intervals
            if one["ended"] > zero and one["began"] < end
        ]
        for kind, intervals in batch["intervals"].items()
    }
    return {"records": shifted, "loads": [], "waits": [], **within}


def _differences(
    plain: Iterable[dict[str, Any]], drafted: Iterable[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Where answers part, and by how much the better of the two best tokens leads there."""
    found = []
    for number, (a, b) in enumerate(zip(plain, drafted, strict=True)):
        pairs = enumerate(zip(a["tokens"], b["tokens"], strict=False))
        at = next((i for i, (x, y) in pairs if x != y), None)
        if at is not None:
            found.append({"request": number, "token": at, "margin": a["margins"][at]})
    return found


def _engine(session: "Session") -> dict[str, Any]:
    """Memory as planned and as it was, and how fast streamed weights can come."""
    from vllm_subspec.bench.bandwidth import host_copy_rate, store_read_rate

    peak = session.call("peak_memory")  # before probes take memory themselves
    if not _streams(session):
        return {"plan": None, "peak_bytes": peak, "stream_seconds": 0.0}
    plan = session.call("memory_plan")
    if not plan["store_bytes"]:
        return {"plan": plan, "peak_bytes": peak, "stream_seconds": 0.0}
    stored = plan["store"]
    rate = store_read_rate(Path(stored)) if stored else host_copy_rate()
    return {
        "plan": plan | {"store": None},
        "peak_bytes": peak,
        "link_bytes_per_second": rate,
        "stream_seconds": plan["store_bytes"] / rate,
    }


def _kernels(session: "Session") -> dict[str, Any]:
    """Rates of a CPU's kernels in the engine's own process, by what is computed and by tokens."""
    from vllm.platforms import current_platform

    from vllm_subspec.bench import kernel_rates

    return kernel_rates.describe() if current_platform.is_cpu() else {}


def _add_bounds(cell: dict[str, Any], stream_seconds: float) -> None:
    from vllm_subspec.core.plan import overlapped_bound, serial_bound

    for name, way in cell["ways"].items():
        if name != OFF and stream_seconds:
            tokens = way["tau"] * way["requests_per_round"]
            draft = way["draft_seconds_per_round"]
            way["serial_bound"] = serial_bound(tokens, stream_seconds, draft)
            way["overlapped_bound"] = overlapped_bound(tokens, stream_seconds, draft)


def _described(scenario: Scenario) -> dict[str, Any]:
    told = asdict(scenario)
    told["prompts"] = len(scenario.prompts)
    return told


def _width(bits: int | None) -> str:
    return "" if bits is None else f"{bits} bits: "


def _title(cell: Cell) -> str:
    depth = "" if cell.depth is None else f", depth {cell.depth}"
    return f"batch {cell.batch}, temperature {cell.temperature:g}{depth}"
