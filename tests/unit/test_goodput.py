# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Goodput under load: how many requests a load is given, what is asked, what runs come to."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.benchmarks.serve import add_cli_args, check_goodput_args
from vllm.utils.argparse_utils import FlexibleArgumentParser

from benchmarks.goodput.__main__ import Measurement, options
from benchmarks.goodput.loads import Client, Closed, Open
from benchmarks.goodput.summary import ratio, row, smallest, stops_paying

TEXTS = ["a", "b", "c"]


def detailed(**changed: Any) -> dict[str, Any]:
    """Three answers as `vllm bench serve` saves them; the last one failed."""
    times = {f"{s}_{t}_ms": 1.0 for s in ("median", "p99") for t in ("ttft", "tpot", "e2el")}
    return {
        "duration": 4.0,
        "completed": 2,
        "failed": 1,
        "request_throughput": 0.5,
        "output_throughput": 5.0,
        "request_goodput": 0.25,
        "ttfts": [0.5, 1.0, 0.0],
        "latencies": [2.0, 4.0, 0.1],
        "output_lens": [4, 11, 0],
        "generated_texts": TEXTS,
        **times,
        **changed,
    }


def run(speculation: bool, repeat: int, value: float) -> dict[str, Any]:
    return {"speculation": speculation, "repeat": repeat, "speed": value}


def measured(concurrency: int, throughput: float | None) -> dict[str, Any]:
    ratios = {"output_throughput": throughput}
    return {"load": str(Closed(concurrency)), "concurrency": concurrency, "ratios": ratios}


@pytest.mark.parametrize(
    ("concurrency", "answer_seconds", "requests"), [(1, 13.0, 4), (8, 13.0, 32), (32, 80.0, 32)]
)
def test_a_closed_load_runs_all_its_requests_at_once_several_times(
    concurrency: int, answer_seconds: float, requests: int
) -> None:
    assert Closed(concurrency).requests(60, answer_seconds) == requests


@pytest.mark.parametrize(
    ("rate", "capacity", "requests"), [(0.5, 2.0, 30), (4.0, 2.0, 120), (0.001, 2.0, 1)]
)
def test_an_open_load_is_as_long_as_asked_also_beyond_the_capacity(
    rate: float, capacity: float, requests: int
) -> None:
    assert Open(rate).requests(60, capacity) == requests


@pytest.mark.parametrize(
    ("load", "rate", "at_once"), [(Closed(4), float("inf"), 4), (Open(1.5), 1.5, None)]
)
def test_vllm_understands_what_it_is_asked(
    tmp_path: Path, load: Closed | Open, rate: float, at_once: int | None
) -> None:
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    client = Client(SimpleNamespace(port=80), tmp_path / "model", TEXTS, 32, tmp_path)  # type: ignore[arg-type]
    command = client.command(load, 7, 1, {"ttft": 1500.0, "tpot": 2.5})
    told = parser.parse_args(command[command.index("serve") + 1 :])
    assert (told.request_rate, told.max_concurrency) == (rate, at_once)
    assert (told.num_prompts, told.output_len, told.seed) == (7, 32, 1)
    assert told.base_url == "http://127.0.0.1:80"
    assert check_goodput_args(told) == {"ttft": 1500.0, "tpot": 2.5}


def test_a_row_counts_the_answers_that_differ_and_leaves_failed_ones_out_of_the_times() -> None:
    plain = row(detailed(), False, 0, TEXTS)
    assert (plain["answers_that_differ"], plain["failed"]) == (0, 1)
    assert plain["each_ttft_ms"] == [500, 1000]
    assert plain["each_tpot_ms"] == [500.0, 300.0]
    drafts = {"spec_decode_num_drafts": 9, "spec_decode_acceptance_length": 3.5}
    subspec = row(detailed(**drafts, generated_texts=["a", "x", "c"]), True, 0, TEXTS)
    assert (subspec["answers_that_differ"], subspec["tokens_per_round"]) == (1, 3.5)


def test_a_run_that_drafted_though_speculation_was_off_is_no_measurement() -> None:
    with pytest.raises(ValueError, match="was not asked for"):
        row(detailed(spec_decode_num_drafts=5), False, 0, TEXTS)


def test_a_run_may_rest_from_drafting() -> None:
    assert row(detailed(spec_decode_num_drafts=0), True, 0, TEXTS)["drafts"] == 0


def test_a_ratio_is_the_median_of_the_repeats() -> None:
    plain = [run(False, repeat, value) for repeat, value in enumerate((1.0, 2.0, 4.0))]
    drafted = [run(True, repeat, value) for repeat, value in enumerate((3.0, 4.0, 20.0))]
    assert ratio([*plain, *drafted], "speed") == 3.0  # of 3, 2 and 5


def test_nothing_is_divided_by_nothing() -> None:
    assert ratio([run(False, 0, 0.0), run(True, 0, 3.0)], "speed") is None
    assert ratio([run(False, 0, 2.0), run(True, 0, 0.0)], "speed") == 0


def test_the_smallest_ratio_and_where_speculation_stops_paying() -> None:
    loads = [measured(1, 6.0), measured(2, None), measured(4, 0.9), measured(8, 0.7)]
    assert smallest(loads, "output_throughput") == {"load": "concurrency 8", "ratio": 0.7}
    assert stops_paying(loads) == 4
    assert stops_paying(loads[:2]) is None
    assert smallest(loads[1:2], "output_throughput") is None


class FakeServer:
    """Switches, and answers thrice as fast with speculation."""

    def __init__(self) -> None:
        self.speculation = True
        self.asked: list[tuple[bool, str, int, int]] = []

    def set_speculation(self, enabled: bool) -> None:
        self.speculation = enabled

    def run(self, load: Closed | Open, requests: int, seed: int, targets: Any) -> dict[str, Any]:
        self.asked.append((self.speculation, str(load), requests, seed))
        changed = {
            "output_throughput": 6.0 if self.speculation else 2.0,
            "spec_decode_num_drafts": int(self.speculation),
            "median_e2el_ms": 5000.0,
            "median_tpot_ms": 123.0,
            "request_goodput": 0.1 if targets else None,
        }
        return detailed(**changed)

    @property
    def server(self) -> "FakeServer":
        return self


def test_both_ways_take_turns_under_every_load(tmp_path: Path) -> None:
    out = tmp_path / "goodput.json"
    told = options(["--concurrency", "2", "1", "--seconds", "20", "--out", str(out)])
    fake = FakeServer()
    measurement = Measurement(fake, told, {"model": "some"})  # type: ignore[arg-type]
    measurement.prepare()
    warm_up = len(fake.asked)
    measurement.measure()
    turns = [(speculation, repeat) for repeat in (0, 1) for speculation in (False, True)]
    # The fake's plain runs answer a request in 5 s and 0.5 requests/s, which decides the rest.
    counts = {"concurrency 1": 4, "concurrency 2": 8}
    counts |= {f"{rate:g} requests/s": n for rate, n in [(0.12, 2), (0.25, 5), (0.5, 10), (1, 10)]}
    assert fake.asked[warm_up:] == [
        (speculation, load, requests, repeat)
        for load, requests in counts.items()
        for speculation, repeat in turns
    ]
    written = json.loads(out.read_text())
    assert written["model"] == "some"
    assert written["targets_ms"] == {"ttft": 980.0, "tpot": 250.0}
    assert [load["ratios"]["output_throughput"] for load in written["closed_loop"]] == [3.0, 3.0]
    assert [load["rate"] for load in written["open_loop"]] == [0.12, 0.25, 0.5, 1.0]
    assert written["speculation_stops_paying_at_concurrency"] is None
    assert len(written["open_loop"][0]["runs"]) == 4


def test_results_name_no_folder_of_the_machine_that_measured() -> None:
    results = list((Path(__file__).parents[2] / "benchmarks" / "results").glob("*.json"))
    assert len(results) > 4
    for result in results:
        assert not re.search(r"""["' =](/[\w.-]+){2}""", result.read_text()), result.name
