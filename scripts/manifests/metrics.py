# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Do alerts and dashboards ask for metrics that the server has?"""

import ast
import functools
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

from scripts.manifests import dashboards, promql
from scripts.manifests.schemas import Document

SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
SEVERITIES = {"critical", "warning", "info"}


def problems(documents: list[Document]) -> Iterator[str]:
    """Of everything that would be applied together, each valid for itself."""
    jobs = {one["metadata"]["name"] for one in documents if one["kind"] == "Service"}
    for document in documents:
        where = f"{document['kind']} {document['metadata']['name']}"
        found: Iterator[str] = iter(())
        if document["kind"] == "PrometheusRule":
            found = _rule_problems(document, known_samples(), jobs)
        elif document["kind"] == "ConfigMap" and dashboards.is_dashboard(document):
            found = dashboards.problems(document, known_samples())
        for problem in found:
            yield f"{where}: {problem}"


@functools.cache
def known_samples() -> promql.Samples:
    """Names in Prometheus with their labels: the plugin's, vLLM's, and whether a target answers."""
    from vllm_subspec.core.metrics import SAMPLES

    ours = {name: frozenset(labels) for name, labels in SAMPLES.items()}
    samples = {**vllm_samples(_loggers().read_text()), **ours, "up": frozenset()}
    return {name: labels | promql.TARGET for name, labels in samples.items()}


def _loggers() -> Path:
    """vLLM's source file, found without importing vLLM."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("vLLM, whose metrics the manifests name, is not installed")
    return Path(spec.submodule_search_locations[0]) / "v1/metrics/loggers.py"


def vllm_samples(source: str) -> dict[str, promql.Labels]:
    """Of every metric that is made in ``source`` like
    ``self._gauge_cls(name="vllm:...", labelnames=labelnames + ["reason"])``."""
    tree = ast.parse(source)
    common: promql.Labels = frozenset()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "labelnames":
            common = frozenset(_strings(node.value))
    found: dict[str, promql.Labels] = {}
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        made = re.fullmatch(r"_(counter|gauge|histogram)_cls", node.func.attr)
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        name = next(_strings(given["name"]), "") if "name" in given else ""
        if not (made and name.startswith("vllm:")):
            continue
        labels = frozenset(_strings(given["labelnames"]))
        if any(isinstance(part, ast.Name) for part in ast.walk(given["labelnames"])):
            labels |= common
        for suffix in SUFFIXES[made[1]]:
            base = name.removesuffix("_total") if suffix == "_total" else name
            found[f"{base}{suffix}"] = labels | ({"le"} if suffix == "_bucket" else frozenset())
    return found


def _strings(node: ast.expr) -> Iterator[str]:
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield part.value


def _rule_problems(document: Document, samples: promql.Samples, jobs: set[str]) -> Iterator[str]:
    names: set[str] = set()
    for group in document["spec"].get("groups", []):
        for rule in group.get("rules", []):
            name = rule.get("alert", rule.get("record"))
            if name in names:
                yield f"{name} is there twice"
            names.add(name)
            for problem in _alert_problems(rule, samples):
                yield f"{name}: {problem}"
            # A ServiceMonitor's job is the service.
            for job in re.findall(r'\bjob="([^"]*)"', str(rule["expr"])):
                if job not in jobs:
                    yield f"{name}: job {job} is no service"


def _alert_problems(rule: Document, samples: promql.Samples) -> Iterator[str]:
    if "alert" not in rule:
        yield "is no alert: what it records would be a metric unknown here"
        return
    checked = promql.check(str(rule["expr"]), samples)
    yield from checked.problems
    if "for" not in rule:
        yield "says not for how long"
    if rule.get("labels", {}).get("severity") not in SEVERITIES:
        yield f"has no severity of {sorted(SEVERITIES)}"
    annotations = rule.get("annotations", {})
    for key in ("summary", "description"):
        if not annotations.get(key):
            yield f"has no {key}"
    for text in annotations.values():
        yield from _template_problems(text, checked.labels or frozenset())


def _template_problems(text: str, labels: promql.Labels) -> Iterator[str]:
    """Of ``{{ $labels.pod }}``: an unknown label would be written as nothing."""
    for name in re.findall(r"\$labels\.(\w+)", text):
        if name not in labels:
            yield f"writes label {name}, which its result has not"
    if text.count("{{") != text.count("}}"):
        yield f"has an open template: {text}"
    for name in re.findall(r"\$(\w+)", text):
        if name not in {"labels", "value"}:
            yield f"writes ${name}, which templates do not know"
