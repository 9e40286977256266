# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Does a PromQL expression name metrics and labels that exist, and do its operands match?

Prometheus takes an unknown name for a metric without samples: an alert on it never fires.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import promql_parser as promql

# Given to every target of a monitor by the Prometheus operator.
TARGET = frozenset({"job", "instance", "namespace", "service", "pod", "container", "endpoint"})

Labels = frozenset[str]
Samples = Mapping[str, Labels]


@dataclass
class Checked:
    """What is wrong with an expression, and the labels that its result can have."""

    labels: Labels | None = None  # None: a scalar
    problems: list[str] = field(default_factory=list)


def check(text: str, samples: Samples) -> Checked:
    try:
        expression = promql.parse(text)
    except ValueError as error:
        return Checked(problems=[f"no PromQL: {' '.join(str(error).split())}"])
    found = Checked()
    found.labels = _Reader(samples, found.problems).labels(expression)
    return found


@dataclass
class _Reader:
    samples: Samples
    problems: list[str]

    def labels(self, part: object) -> Labels | None:
        """Labels of the value of ``part``; None for a number or a string."""
        match part:
            case promql.VectorSelector():
                return self._selected(part)
            case promql.MatrixSelector():
                return self._selected(part.vector_selector)
            case promql.SubqueryExpr() | promql.ParenExpr() | promql.UnaryExpr():
                return self.labels(part.expr)
            case promql.Call():
                return self._called(part)
            case promql.AggregateExpr():
                return self._aggregated(part)
            case promql.BinaryExpr():
                return self._combined(part)
        return None

    def _selected(self, selector: promql.VectorSelector) -> Labels:
        name, matchers = selector.name, selector.matchers
        if name is None or name not in self.samples:
            self.problems.append(f"nothing emits {name or selector}")
            return TARGET
        known = self.samples[name]
        groups = [matchers.matchers, *matchers.or_matchers]
        self._demand({one.name for group in groups for one in group}, known, f"{name} has")
        return known

    def _called(self, call: promql.Call) -> Labels | None:
        parts = [labels for labels in map(self.labels, call.args) if labels is not None]
        if call.func.return_type == promql.ValueType.Scalar or not parts:
            return None
        found = frozenset().union(*parts)
        match call.func.name:
            case "histogram_quantile":
                self._demand({"le"}, found, "the histogram has")
                found -= {"le"}
            case "label_replace" | "label_join":
                found |= {call.args[1].val}
        return found

    def _aggregated(self, aggregate: promql.AggregateExpr) -> Labels | None:
        known = self.labels(aggregate.expr) or frozenset()
        if aggregate.modifier is None:
            return known if str(aggregate.op) in {"topk", "bottomk"} else frozenset()
        named = frozenset(aggregate.modifier.labels)
        self._demand(named, known, f"the operand of {aggregate.op} has")
        if aggregate.modifier.type == promql.AggModifierType.Without:
            return known - named
        return known if str(aggregate.op) in {"topk", "bottomk"} else named

    def _combined(self, binary: promql.BinaryExpr) -> Labels | None:
        left, right = self.labels(binary.lhs), self.labels(binary.rhs)
        if left is None or right is None:
            return right if left is None else left
        operator = str(binary.op)
        if operator == "or":
            return left | right
        modifier = binary.modifier  # None without "bool", "on" and the like
        if not modifier or not (matching := modifier.matching):
            if left != right:
                sides = f"{sorted(left)} with {sorted(right)}"
                self.problems.append(f"{operator} never matches {sides}")
            return left
        named = frozenset(matching.labels)
        included = matching.type == promql.LabelModifierType.Include
        self._demand(named, left & right if included else left | right, f"{operator} matches by")
        group = frozenset(modifier.group_labels or ())
        if modifier.card == promql.VectorMatchCardinality.OneToMany:
            return right | group
        if modifier.card == promql.VectorMatchCardinality.OneToOne:
            return named if included else left - named
        return left | group

    def _demand(self, named: set[str] | Labels, known: Labels, what: str) -> None:
        for name in sorted(named - known):
            self.problems.append(f"{what} no label {name}")
