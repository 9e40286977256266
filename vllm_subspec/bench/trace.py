# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Rounds as a trace for chrome://tracing and ui.perfetto.dev (the Trace Event Format)."""

from collections.abc import Iterator
from typing import Any

_LANES = ("draft", "verify", "wait for weights", "read weights")


def trace(result: dict[str, Any]) -> dict[str, Any]:
    """The kept rounds of every way of every cell, one process of the trace each.

    Args:
        result: of `measure`.
    """
    events: list[dict[str, Any]] = []
    number = 0
    for cell in result["cells"]:
        for name, way in cell["ways"].items():
            if not way["timeline"]["records"]:
                continue
            number += 1
            events += _named(number, f"{name}, {_setting(cell)}")
            events += _events(number, way["timeline"])
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _named(process: int, title: str) -> Iterator[dict[str, Any]]:
    yield {"ph": "M", "pid": process, "name": "process_name", "args": {"name": title}}
    for lane, name in enumerate(_LANES):
        yield {
            "ph": "M",
            "pid": process,
            "tid": lane,
            "name": "thread_name",
            "args": {"name": name},
        }


def _events(process: int, timeline: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for record in timeline["records"]:
        args = {k: record[k] for k in ("requests", "steps", "nodes", "emitted", "streamed_bytes")}
        for lane, kind in enumerate(("draft", "verify")):
            yield _slice(
                process, lane, kind, record[f"{kind}_began"], record[f"{kind}_ended"], args
            )
    for lane, kind in ((2, "waits"), (3, "loads")):
        for one in timeline[kind]:
            block = {"block": one["block"]}
            yield _slice(process, lane, f"block {one['block']}", one["began"], one["ended"], block)


def _slice(
    process: int, lane: int, name: str, began: float, ended: float, args: dict[str, Any]
) -> dict[str, Any]:
    """A complete event; the format counts in microseconds."""
    return {
        "ph": "X",
        "pid": process,
        "tid": lane,
        "name": name,
        "ts": began * 1e6,
        "dur": (ended - began) * 1e6,
        "args": args,
    }


def _setting(cell: dict[str, Any]) -> str:
    told = {k: cell[k] for k in ("bits", "batch", "temperature", "depth") if cell[k] is not None}
    return ", ".join(f"{key} {value:g}" for key, value in told.items())
