# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""What `vllm-subspec bench` makes of its arguments; nothing is measured."""

from pathlib import Path
from typing import Any

import pytest

from vllm_subspec.bench import measure as measuring
from vllm_subspec.bench import report
from vllm_subspec.bench.scenario import Scenario
from vllm_subspec.cli.main import main

MODEL = str(Path(__file__).resolve().parents[2] / "models" / "pystd-6m")
HIERSPEC = '{"method": "hierspec", "drafter": {"method": "ngram"}}'


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Scenario]:
    """What was to be measured."""
    scenarios: list[Scenario] = []

    def measure(scenario: Scenario, progress: Any) -> dict[str, Any]:
        scenarios.append(scenario)
        return {"cells": []}

    monkeypatch.setattr(measuring, "measure", measure)
    monkeypatch.setattr(report, "render", lambda result: "a page")
    return scenarios


def test_the_page_is_written_where_it_is_asked_for(asked: list[Scenario], tmp_path: Path) -> None:
    out, page = tmp_path / "bench.json", tmp_path / "pages" / "other.html"
    page.parent.mkdir()
    assert main(["bench", MODEL, "--out", str(out), "--html", str(page)]) == 0
    assert len(asked) == 1
    assert page.read_text() == "a page"
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["bench.json", "other.html"]


def test_else_it_is_written_beside_the_json(asked: list[Scenario], tmp_path: Path) -> None:
    assert main(["bench", MODEL, "--out", str(tmp_path / "mine.json")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.html", "mine.json"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--html", "/proc/nowhere/page.html"], "/proc/nowhere/page.html cannot be written"),
        (["--trace", "/proc/nowhere/trace"], "/proc/nowhere/trace cannot be written"),
        *(
            (
                ["--speculative-config", HIERSPEC, *given],
                '--bits and --depth are for method "subspec", not for "hierspec"',
            )
            for given in (["--bits", "4"], ["--depth", "8"], ["--bits", "4", "--depth", "8"])
        ),
    ],
)
def test_what_is_refused(
    asked: list[Scenario],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
) -> None:
    assert main(["bench", MODEL, "--out", str(tmp_path / "bench.json"), *arguments]) == 2
    assert capsys.readouterr().err == f"vllm-subspec bench: {sentence}\n"
    assert not asked and not [*tmp_path.iterdir()]


@pytest.mark.parametrize("method", ["subspec", "hierspec"])
def test_the_ways_of_the_method_are_measured(
    asked: list[Scenario], tmp_path: Path, method: str
) -> None:
    config = HIERSPEC if method == "hierspec" else "{}"
    given = [] if method == "hierspec" else ["--bits", "4", "8", "--depth", "8"]
    out = str(tmp_path / "bench.json")
    assert main(["bench", MODEL, "--out", out, "--speculative-config", config, *given]) == 0
    (scenario,) = asked
    assert scenario.options["method"] == method
    if method == "hierspec":
        assert (scenario.ways, scenario.bits, scenario.depths) == (
            ("off", "hierspec"),
            (None,),
            (None,),
        )
    else:
        assert (scenario.bits, scenario.depths) == ((4, 8), (8,))
