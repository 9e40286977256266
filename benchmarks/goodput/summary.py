# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""What runs come to: a row for each, and both ways beside each other."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

TOTALS = ("duration", "completed", "failed", "request_throughput", "output_throughput")
TIMES = tuple(
    f"{statistic}_{time}_ms" for time in ("ttft", "tpot", "e2el") for statistic in ("median", "p99")
)
COMPARED = (
    "output_throughput",
    "request_goodput",
    *(f"median_{time}_ms" for time in ("ttft", "tpot", "e2el")),
)
"""Of each, the value with speculation is divided by that without."""


def row(result: Row, speculation: bool, repeat: int, texts: Sequence[str]) -> dict[str, Any]:
    """A run's row.

    Args:
        result: as `vllm bench serve` saves it in detail.
        texts: the answers of the load's first run without speculation.

    Raises:
        ValueError: the run drafted, though speculation was off. Where it is on, drafting may rest.
    """
    drafts = result.get("spec_decode_num_drafts", 0)
    if drafts and not speculation:
        raise ValueError("a run with drafts was not asked for")
    times = zip(result["ttfts"], result["latencies"], result["output_lens"], strict=True)
    answered = [(first, total, tokens) for first, total, tokens in times if tokens]
    return {
        "speculation": speculation,
        "repeat": repeat,
        **{name: result[name] for name in TOTALS},
        "request_goodput": result["request_goodput"],
        **{name: result[name] for name in TIMES},
        "drafts": drafts,
        "tokens_per_round": result.get("spec_decode_acceptance_length", 1.0),
        "answers_that_differ": sum(
            mine != theirs for mine, theirs in zip(result["generated_texts"], texts, strict=True)
        ),
        "each_ttft_ms": [round(1000 * first) for first, _, _ in answered],
        "each_tpot_ms": [
            round(1000 * (total - first) / max(1, tokens - 1), 1)
            for first, total, tokens in answered
        ],
    }


def ratio(rows: Sequence[Row], name: str) -> float | None:
    """Median, over the repeats, of ``name`` with speculation by that without.

    Returns:
        None where nothing is to be divided by, in any repeat.
    """
    ways: list[dict[int, float]] = [
        {run["repeat"]: run[name] for run in rows if run["speculation"] == speculation}
        for speculation in (False, True)
    ]
    plain, drafted = ways
    ratios = [drafted[repeat] / plain[repeat] for repeat in drafted if plain.get(repeat)]
    return statistics.median(ratios) if ratios else None


def ratios(rows: Sequence[Row]) -> dict[str, float | None]:
    return {name: ratio(rows, name) for name in COMPARED}


def smallest(loads: Sequence[Row], name: str) -> dict[str, Any] | None:
    """The load of which the ratio of ``name`` is smallest; None if no load has one."""
    known = [load for load in loads if load["ratios"][name] is not None]
    if not known:
        return None
    worst = min(known, key=lambda load: load["ratios"][name])
    return {"load": worst["load"], "ratio": worst["ratios"][name]}


def stops_paying(loads: Sequence[Row]) -> int | None:
    """The least concurrency at which speculation yields fewer tokens/s; None if none does."""
    found = [(load["concurrency"], load["ratios"]["output_throughput"]) for load in loads]
    return min((at for at, speed in found if speed is not None and speed < 1), default=None)
