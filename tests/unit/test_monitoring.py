# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Alerts and the dashboard ask for what there is, and the check finds what is not there."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("kubernetes_validate", reason="the test extra is not installed")
pytest.importorskip("promql_parser", reason="the test extra is not installed")

from scripts.manifests import dashboards, promql  # noqa: E402
from scripts.manifests.__main__ import ROOT, check  # noqa: E402
from scripts.manifests.metrics import known_samples, vllm_samples  # noqa: E402
from vllm_subspec.core.metrics import SAMPLES  # noqa: E402

RULES = "base/alerts.yaml"
DASHBOARD = "base/vllm-subspec-dashboard.json"
BASE = "base/kustomization.yaml"


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((ROOT / RULES).read_text())["spec"]["groups"]
    return [rule for group in groups for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / DASHBOARD).read_text())
    return found


def expressions() -> Iterator[str]:
    yield from (rule["expr"] for rule in rules())
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", []):
            yield re.sub(r"\$__\w+", "5m", target["expr"])


EXPRESSIONS = list(expressions())


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_every_name_in_an_expression_counts(expression: str) -> None:
    """Each metric, each label and each bracket, one at a time."""
    samples = known_samples()
    assert promql.check(expression, samples).problems == []
    names = r"vllm(?:_subspec)?:\w+|\bup\b|\b(?:namespace|pod|model_name|rank|le|depth|job)\b"
    for found in [*re.finditer(names, expression), *re.finditer(r"[(){}\[\]]", expression)]:
        changed = expression[: found.end() - 1] + expression[found.end() :]
        if '"' + found[0] not in expression and "$" + found[0] not in expression:
            assert promql.check(changed, samples).problems, changed


WRONG: dict[str, tuple[str, str, str, str]] = {
    "metric in a rule": (RULES, "emitted_tokens_total", "emitted_token_total", "nothing emits"),
    "vLLM's metric in a rule": (RULES, "kv_cache_usage_perc", "kv_cache_usage", "nothing emits"),
    "metric without its suffix": (RULES, "read_failures_total", "read_failures", "nothing emits"),
    "expression of a rule": (RULES, "< 1.2", "< < 1.2", "no PromQL"),
    "function": (RULES, "max_over_time", "max_in_time", "no PromQL"),
    "range of a rule": (RULES, "[3h]", "", "no PromQL"),
    "label of an expression": (RULES, "by (namespace, pod,", "by (namespace, pot,", "label pot"),
    "label of a selector": (RULES, "up{job=", "up{jop=", "up has no label jop"),
    "key of a rule": (RULES, "          for: 15m", "          four: 15m", "four"),
    "duration": (RULES, "for: 15m", "for: 15 min", "does not match"),
    "key of a group": (RULES, "      rules:", "      ruels:", "ruels"),
    "no duration": (RULES, "          for: 1h\n", "", "for how long"),
    "severity": (RULES, "severity: info", "severity: grave", "no severity"),
    "no summary": (
        RULES,
        "            summary: Requests",
        "            sumary: Requests",
        "summary",
    ),
    "no description": (RULES, "            description: >-", "            text: >-", "description"),
    "label of a text": (RULES, "Rank {{ $labels.rank }}", "Rank {{ $labels.rang }}", "label rang"),
    "label that was summed away": (RULES, "reads failed", "{{ $labels.rank }}", "label rank"),
    "value of a text": (RULES, "{{ $value }} are", "{{ $number }} are", "$number"),
    "open text": (RULES, "{{ $value }} are", "{{ $value } are", "open template"),
    "alert twice": (RULES, "alert: SubspecServerMissing", "alert: SubspecServerDown", "twice"),
    "recording rule": (RULES, "alert: SubspecKvCacheFull", "record: kv:full", "is no alert"),
    "job": (RULES, 'job="vllm-subspec"', 'job="vllm"', "is no service"),
    "metric of a panel": (DASHBOARD, ":draft_nodes_sum", ":draft_node_sum", "nothing emits"),
    "expression of a panel": (DASHBOARD, "histogram_quantile(0.5,", "quantile(0.5", "no PromQL"),
    "buckets": (DASHBOARD, "sum by (le) (rate(", "sum by (engine) (rate(", "no label le"),
    "sides": (DASHBOARD, "/ sum by (depth)", "/ sum by (rank)", "never matches"),
    "label of a panel": (DASHBOARD, "sum by (depth)", "sum by (deepness)", "label deepness"),
    "legend": (DASHBOARD, "rank {{rank}}: plan", "rank {{rang}}: plan", "label rang"),
    "variable": (DASHBOARD, "$__rate_interval", "$__rat_interval", "no variable __rat_interval"),
    "namespace's variable": (DASHBOARD, '=~\\"$namespace', '=~\\"$namespaces', "no variable"),
    "metric of a variable": (DASHBOARD, "num_requests_running, ", "requests, ", "nothing emits"),
    "label of a variable": (DASHBOARD, "running, namespace)", "running, nmespace)", "nmespace"),
    "query of a variable": (DASHBOARD, "label_values(", "label_valeus(", "is no label_values"),
    "key of the dashboard": (DASHBOARD, '"templating"', '"templatin"', "templatin"),
    "key of a panel": (DASHBOARD, '"fieldConfig"', '"fieldconfig"', "fieldconfig"),
    "key of a query": (DASHBOARD, '"legendFormat"', '"legendformat"', "legendformat"),
    "kind of a panel": (DASHBOARD, '"heatmap",\n      "title"', '"heat",\n      "title"', "'heat'"),
    "unit": (DASHBOARD, '"Bps"', '"bps"', "'bps'"),
    "data source": (DASHBOARD, '"${datasource}"', '"prometheus"', "datasource"),
    "old schema": (DASHBOARD, '"schemaVersion": 42', '"schemaVersion": 16', "42"),
    "no JSON": (DASHBOARD, '"editable": true,', '"editable": true', "no JSON"),
    "panels over each other": (DASHBOARD, '"x": 8,', '"x": 7,', "lies over"),
    "a wide panel": (DASHBOARD, '"x": 16,', '"x": 18,', "wider than the page"),
    "number of a panel": (DASHBOARD, '"id": 3,', '"id": 2,', "2 panels have the number 2"),
    "refId": (DASHBOARD, '"refId": "B"', '"refId": "A"', "one refId"),
    "generator's file": (BASE, "- vllm-subspec-dashboard.json", "- dashboard.json", "No such file"),
    "forgotten dashboard": (BASE, "- vllm-subspec-dashboard.json", "- alerts.yaml", "names this"),
    "generator's key": (BASE, "disableNameSuffixHash", "disableSuffixHash", "disableSuffixHash"),
    "generator's label": (BASE, 'grafana_dashboard: "1"', "grafana_dashboard: 1", "not of type"),
}


@pytest.fixture
def manifests(tmp_path: Path) -> Path:
    """One overlay of the base is enough."""
    skipped = shutil.ignore_patterns("ray", "gpu-24gb")
    return Path(shutil.copytree(ROOT, tmp_path / "kustomize", ignore=skipped))


def test_all_is_well(manifests: Path) -> None:
    assert check(manifests, rendering=False) == []


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_found(manifests: Path, what: str) -> None:
    name, old, new, says = WRONG[what]
    text = (manifests / name).read_text()
    assert old in text
    (manifests / name).write_text(text.replace(old, new))
    found = check(manifests, rendering=False)
    assert any(says in problem for problem in found), found


def test_every_metric_of_ours_is_shown() -> None:
    """Of a histogram one of its samples is enough."""
    shown = " ".join(EXPRESSIONS)
    for sample in SAMPLES:
        family = re.sub(r"_(bucket|sum|count)$", "_", sample)
        assert family in shown, sample


def test_the_dashboard_is_found_by_grafana() -> None:
    labels = yaml.safe_load((ROOT / BASE).read_text())["configMapGenerator"][0]["options"]["labels"]
    assert labels[dashboards.LABEL] == "1"


def test_vllms_metrics_are_read_from_its_source() -> None:
    found = vllm_samples(
        'labelnames = ["model_name", "engine"]\n'
        'a = self._gauge_cls(name="vllm:a", labelnames=labelnames + ["reason"])\n'
        'b = self._counter_cls(name="vllm:b", labelnames=["model_name"])\n'
        'c = self._histogram_cls(name="vllm:c", labelnames=labelnames)\n'
        'd = self._gauge_cls(name="other", labelnames=labelnames)\n'
    )
    common = {"model_name", "engine"}
    assert found == {
        "vllm:a": common | {"reason"},
        "vllm:b_total": {"model_name"},
        "vllm:c_bucket": common | {"le"},
        "vllm:c_sum": common,
        "vllm:c_count": common,
    }


LABELS = {
    "a_total": (["x", "y"], []),
    "sum by (x) (rate(a_total[5m]))": (["x"], []),
    "sum without (x) (a_total)": (["y"], []),
    "sum(a_total)": ([], []),
    "topk(3, a_total)": (["x", "y"], []),
    "topk by (x) (3, a_total)": (["x", "y"], []),
    'label_replace(a_total, "z", "$1", "x", "(.*)")': (["x", "y", "z"], []),
    "histogram_quantile(0.9, h_bucket)": (["x"], []),
    "histogram_quantile(0.9, a_total)": (["x", "y"], ["the histogram has no label le"]),
    "a_total / on (x) group_left (y) h_bucket": (["x", "y"], []),
    "sum by (x) (a_total) / on (x) group_right () h_bucket": (["le", "x"], []),
    "a_total * on (y) h_bucket": (["y"], ["* matches by no label y"]),
    "a_total - ignoring (x, y) a_total": ([], []),
    "a_total or h_bucket": (["le", "x", "y"], []),
    "2 * a_total > bool 1": (["x", "y"], []),
    "max_over_time(rate(a_total[5m])[1h:5m])": (["x", "y"], []),
    "-(a_total)": (["x", "y"], []),
    "rate(a_total)": (None, ["no PromQL"]),
    '{x="1"}': (sorted(promql.TARGET), ["nothing emits {"]),
    "time()": (None, []),
    "scalar(a_total)": (None, []),
}


@pytest.mark.parametrize("expression", LABELS)
def test_labels_of_results(expression: str) -> None:
    samples = {"a_total": frozenset({"x", "y"}), "h_bucket": frozenset({"x", "le"})}
    labels, problems = LABELS[expression]
    found = promql.check(expression, samples)
    assert found.labels == (None if labels is None else set(labels))
    assert len(found.problems) == len(problems)
    for problem, start in zip(found.problems, problems, strict=True):
        assert problem.startswith(start)
