# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
import json
from pathlib import Path
from typing import Any

import pytest

from vllm_subspec.bench import bandwidth, environment, report
from vllm_subspec.bench.prompts import BUNDLED, Prompt, load
from vllm_subspec.bench.scenario import Cell, Scenario
from vllm_subspec.bench.trace import trace
from vllm_subspec.cli.main import main
from vllm_subspec.core.round_log import CONFIDENCE_EDGES

MODEL = Path(__file__).resolve().parents[2] / "models" / "pystd-6m"


def scenario(**changed: Any) -> Scenario:
    standard: dict[str, Any] = {
        "model": "models/some-model",
        "options": {"method": "subspec", "resident_weights_gib": 0},
        "engine": {},
        "prompts": tuple(Prompt(text) for text in "abc"),
        "requests": 2,
        "tokens": 16,
        "plain_tokens": 4,
        "ways": ("off", "tree"),
    }
    return Scenario(**{**standard, **changed})


def test_workloads_cross_and_settings_vary_at_the_standard_workload() -> None:
    asked = scenario(batches=(1, 4), temperatures=(0.0, 0.6), depths=(48, 8), bits=(4, 8))
    assert list(asked.cells(4)) == [
        Cell(4, 1, 0.0, 48),
        Cell(4, 1, 0.6, 48),
        Cell(4, 4, 0.0, 48),
        Cell(4, 4, 0.6, 48),
        Cell(4, 1, 0.0, 8),
    ]
    assert list(asked.cells(8)) == [Cell(8, 1, 0.0, 48)]


def test_the_engine_is_started_for_the_deepest_drafts() -> None:
    asked = scenario(depths=(8, 64), bits=(4, 8))
    assert asked.options_for(8) == {**asked.options, "bits": 8, "depth": 64}
    assert scenario().options_for(None) == scenario().options


@pytest.mark.parametrize(("batch", "sizes"), [(1, [1, 1]), (2, [2]), (4, [4])])
def test_a_cell_has_whole_batches(batch: int, sizes: list[int]) -> None:
    batches = scenario().batches_of(Cell(4, batch, 0.0, 48))
    assert [len(b) for b in batches] == sizes
    assert [p.text for p in batches[0]] == list("abca"[:batch])  # begins again when they run out


def test_bundled_prompts_are_distinct() -> None:
    for name in BUNDLED:
        texts = [prompt.text for prompt in load(name)]
        assert len(set(texts)) == len(texts) >= 16
    assert len({prompt.category for prompt in load("chat")}) == 8


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "has no prompt"),
        ("{", "line 1: not JSON"),
        ('{"prompt": "a"}\n[1]', 'line 2: an object with a text "prompt"'),
        ('{"prompt": 3}', 'line 1: an object with a text "prompt"'),
    ],
)
def test_a_file_without_prompts_is_refused(tmp_path: Path, content: str, told: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=told):
        load(str(path))


def test_commands_name_no_folder_of_the_machine() -> None:
    top = Path(environment.__file__).resolve().parents[2]
    script = [
        "/usr/bin/python3",
        f"{top}/.venv/bin/vllm-subspec",
        "bench",
        f"{top}/models/m",
        "a b",
    ]
    assert environment.command(script) == "vllm-subspec bench models/m 'a b'"
    module = ["/usr/bin/python3", "-m", "benchmarks.hierarchy", "--tokens", "8"]
    assert environment.command(module) == "python -m benchmarks.hierarchy --tokens 8"


def test_written_results_are_read_back(tmp_path: Path) -> None:
    result = {"a": [1, -2.5, 3e-7], "b": [{"c": [1, 2]}, []], "d": "[1,\n 2]", "e": None}
    path = tmp_path / "made" / "result.json"
    environment.write(path, result)
    assert json.loads(path.read_text()) == result
    assert '"a": [1, -2.5, 3e-07]' in path.read_text()


def way(emitted: int) -> dict[str, Any]:
    """Two rounds of one request, as `measure` tells them."""
    record = {"requests": 1, "steps": 4, "nodes": 6, "emitted": emitted, "streamed_bytes": 100}
    moments = ("draft_began", "draft_ended", "verify_began", "verify_ended")
    classes = CONFIDENCE_EDGES.size - 1
    return {
        "tokens_per_second": 9.0,
        "speedup": 9.0,
        "tau": float(emitted),
        "draft_seconds_per_round": 0.2,
        "verify_seconds_per_round": 0.3,
        "stall_seconds_per_round": 0.1,
        "serial_bound": 8.0,
        "overlapped_bound": 12.0,
        "differences": [],
        "log": {
            "totals": {"rounds": 2},
            "emitted": [0] * emitted + [2],
            "by_depth": {"tested": [0, 9, 8], "accepted": [0, 8, 2]},
            "by_confidence": {"tested": [9] * classes, "accepted": [5] * classes},
        },
        "timeline": {
            "records": [
                {**record, **dict(zip(moments, (t, t + 0.2, t + 0.25, t + 0.5), strict=True))}
                for t in (0.0, 0.5)
            ],
            "loads": [{"block": 3, "began": 0.1, "ended": 0.3}],
            "waits": [{"block": 3, "began": 0.26, "ended": 0.3}],
        },
    }


def result() -> dict[str, Any]:
    nothing = {"rounds": 0}
    plain = way(1) | {"log": {"totals": nothing}, "timeline": {"records": []}}
    for key in ("speedup", "differences", "serial_bound", "overlapped_bound"):
        del plain[key]
    cells = [
        {
            "bits": 4,
            "batch": batch,
            "temperature": 0.0,
            "depth": 8,
            "ways": {"off": plain, "tree": way(5)},
        }
        for batch in (1, 4)
    ]
    parts = ("resident", "substitute", "ring", "other", "kv", "workspace", "drafter")
    plan = {f"{part}_bytes": 1 << 30 for part in parts} | {"total": 7 << 30}
    engine = {"bits": 4, "ready_seconds": 20.0, "plan": plan, "peak_bytes": 7 << 30}
    told = {"model": "models/<b>m", "tokens": 16, "plain_tokens": 4}
    return {
        "environment": {"command": "vllm-subspec bench 'models/<b>m'", "cpu": "some CPU"},
        "scenario": told,
        "engines": [engine],
        "cells": cells,
    }


def test_a_page_needs_nothing_else() -> None:
    page = report.render(result())
    assert page.count("<svg") == 7  # speeds, three of rounds, a timeline, by batch, memory
    assert "<b>" not in page  # text is escaped
    for fetched in ("<script", "<link", "src=", "@import", "url(http"):
        assert fetched not in page
    assert "9.0x" in page and "100.0% of the plan" in page


def test_a_trace_has_every_kept_round_in_microseconds() -> None:
    events = trace(result())["traceEvents"]
    named = {e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert named == {
        "tree, bits 4, batch 1, temperature 0, depth 8",
        "tree, bits 4, batch 4, temperature 0, depth 8",
    }
    slices = [e for e in events if e["ph"] == "X" and e["pid"] == 1]
    assert [e["name"] for e in slices] == ["draft", "verify"] * 2 + ["block 3"] * 2
    assert slices[1]["ts"] == pytest.approx(250_000) and slices[1]["dur"] == pytest.approx(250_000)
    assert slices[1]["args"]["emitted"] == 5
    json.dumps(events)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([str(MODEL / "missing")], "has no configuration"),
        (
            [str(MODEL), "--prompts", "nowhere.jsonl"],
            '--prompts nowhere.jsonl is neither "chat" or',
        ),
        ([str(MODEL), "--ways", "bush"], "--ways bush; allowed with method subspec: off, chain,"),
        ([str(MODEL), "--bits", "5"], "--bits; allowed: 2, 3, 4, 8"),
        ([str(MODEL), "--batch", "0"], "--batch must be at least 1"),
        ([str(MODEL), "--tokens", "1"], "--tokens and --plain-tokens must be at least 2"),
        ([str(MODEL), "--temperature", "-1"], "--temperature must be from 0 to 100"),
        ([str(MODEL), "--out", "/proc/nowhere/bench.json"], "cannot be written"),
        ([str(MODEL), "--depth", "1000"], '"depth" is 1000; allowed: an integer from 1 to 512'),
        (
            [str(MODEL), "--speculative-config", '{"method": "medusa"}'],
            "method is 'medusa'; allowed: subspec, hierspec",
        ),
        ([str(MODEL), "--speculative-config", '{"method": []}'], "method is []; allowed: subspec"),
        (
            [str(MODEL), "--speculative-config", '{"brnching": 2}'],
            'has no key "brnching" for subspec; did you mean "branching"',
        ),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert told in err and err.startswith("vllm-subspec bench: ") and err.count("\n") == 1


def test_options_that_are_no_json_end_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", str(MODEL), "--engine", "{"])
    assert ended.value.code == 2
    assert "argument --engine: not JSON" in capsys.readouterr().err


def test_weights_in_host_memory_have_a_rate() -> None:
    """Also where no GPU is."""
    assert bandwidth.host_copy_rate() > 1e8
