# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Are dashboards within ConfigMaps what Grafana understands, and do they show what there is?"""

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator

from scripts.manifests import promql, schemas
from scripts.manifests.schemas import Document

LABEL = "grafana_dashboard"  # by which Grafana's sidecar finds dashboards
COLUMNS = 24
# Grafana's own variables. Parsers know only what it puts in their place.
BUILT_IN = {"__rate_interval", "__interval", "__range"}
ALL = "__all"  # the choice of a variable that stands for every value


def is_dashboard(document: Document) -> bool:
    return LABEL in document["metadata"].get("labels", {})


def problems(config_map: Document, samples: promql.Samples) -> Iterator[str]:
    for name, text in config_map.get("data", {}).items():
        try:
            dashboard = json.loads(text)
        except ValueError as error:
            yield f"{name}: no JSON: {error}"
            continue
        wrong = list(schemas.dashboard_errors(dashboard))
        yield from (f"{name}: {error}" for error in wrong)
        if not wrong:
            yield from (f"{name}: {problem}" for problem in _content_problems(dashboard, samples))


def _content_problems(dashboard: Document, samples: promql.Samples) -> Iterator[str]:
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    variables |= {*BUILT_IN, ALL}
    for name in sorted(set(re.findall(r"\$\{?(\w+)", json.dumps(dashboard))) - variables):
        yield f"no variable {name}"
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            for problem in _variable_problems(variable, samples):
                yield f"variable {variable['name']}: {problem}"
    panels = dashboard["panels"]
    for number, times in Counter(panel["id"] for panel in panels).items():
        if times > 1:
            yield f"{times} panels have the number {number}"
    yield from _overlaps(panels)
    for panel in panels:
        for problem in _panel_problems(panel, samples):
            yield f"panel {panel['title']!r}: {problem}"


def _variable_problems(variable: Document, samples: promql.Samples) -> Iterator[str]:
    query = variable["query"]["query"]
    parts = re.fullmatch(r"label_values\((.+), (\w+)\)", query)
    if parts is None:
        yield f"{query} is no label_values(metric, label)"
        return
    checked = _checked(parts[1], samples)
    yield from checked.problems
    if parts[2] not in (checked.labels or ()):
        yield f"{parts[1]} has no label {parts[2]}"


def _panel_problems(panel: Document, samples: promql.Samples) -> Iterator[str]:
    targets = panel.get("targets", [])
    if not targets and panel["type"] != "row":
        yield "shows nothing"
    if len({target["refId"] for target in targets}) < len(targets):
        yield "two queries have one refId"
    for target in targets:
        checked = _checked(target["expr"], samples)
        yield from (f"{target['refId']}: {problem}" for problem in checked.problems)
        for label in re.findall(r"\{\{\s*(\w+)\s*\}\}", target.get("legendFormat", "")):
            if label not in (checked.labels or ()):
                yield f"{target['refId']}: the legend has label {label}, its result has not"


def _overlaps(panels: list[Document]) -> Iterator[str]:
    taken: dict[tuple[int, int], str] = {}
    for panel in panels:
        place, title = panel["gridPos"], panel["title"]
        if place["x"] + place["w"] > COLUMNS:
            yield f"panel {title!r} is wider than the page"
        columns = range(place["x"], place["x"] + place["w"])
        lines = range(place["y"], place["y"] + place["h"])
        cells = list(itertools.product(columns, lines))
        for other in sorted({taken[cell] for cell in cells if cell in taken}):
            yield f"panel {title!r} lies over {other!r}"
        for cell in cells:
            taken[cell] = title


def _checked(expression: str, samples: promql.Samples) -> promql.Checked:
    for name in BUILT_IN:
        expression = re.sub(rf"\$(?:{name}\b|\{{{name}\}})", "5m", expression)
    return promql.check(expression, samples)
