# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
from functools import partial
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from vllm_subspec.core.metrics import METRICS, PREFIX, SAMPLES
from vllm_subspec.engine.metrics import Families, Observer


def statistics(rounds: int, accepted: list[int], seconds: list[float]) -> dict[str, object]:
    """Of a worker whose every round drafted 2 tokens for one request."""
    return {
        "rank": 1,
        "rounds": rounds,
        "counters": {
            "rounds": rounds,
            "rested_rounds": 3 * rounds,
            "draft_tokens": 2 * rounds,
            "emitted_tokens": sum(n * count for n, count in enumerate(accepted)) + rounds,
            "streamed_bytes": 100 * rounds,
            "passes": rounds,
            "ring_blocks": 4 * rounds,
            "ring_misses": rounds,
            "stream_stall_seconds": 0.25 * rounds,
            "read_seconds": 0.5 * rounds,
            "read_failures": 0,
        },
        "by_depth": {"tested_tokens": [0, rounds, rounds], "accepted_tokens": [0, *accepted[1:]]},
        "distributions": {
            "accepted_depth": accepted,
            "draft_nodes": [0, 0, rounds],
            "draft_depth": [0, 0, rounds],
        },
        "seconds": dict.fromkeys(("draft_seconds", "verify_seconds", "stall_seconds"), seconds),
        "gauges": {"speculating": 1, "planned_memory_bytes": 7, "peak_memory_bytes": 8},
        "store": {"source": "disk", "reused": "true"},
    }


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def families(registry: CollectorRegistry) -> Families:
    return Families(*(partial(kind, registry=registry) for kind in (Counter, Gauge, Histogram)))


def value(registry: CollectorRegistry, sample: str, **labels: str) -> float | None:
    return registry.get_sample_value(PREFIX + sample, {"model_name": "m", "rank": "1", **labels})


def test_totals_are_counted_once(registry: CollectorRegistry):
    observer = Observer(families(registry), "m")
    assert observer.rounds == 0
    observer.update(statistics(2, [1, 0, 1], [0.25, 0.5]))
    assert observer.rounds == 2
    observer.update(statistics(3, [1, 1, 1], [4.0]))
    assert observer.rounds == 3
    assert value(registry, "rounds_total") == 3
    assert value(registry, "rested_rounds_total") == 9
    assert value(registry, "emitted_tokens_total") == 6
    assert value(registry, "read_seconds_total") == 1.5
    assert value(registry, "tested_tokens_total", depth="2") == 3
    assert value(registry, "accepted_tokens_total", depth="1") == 1
    assert value(registry, "accepted_depth_count") == 3
    assert value(registry, "accepted_depth_sum") == 3
    assert value(registry, "accepted_depth_bucket", le="1.0") == 2
    assert value(registry, "draft_nodes_sum") == 6
    assert value(registry, "verify_seconds_sum") == 4.75
    assert value(registry, "verify_seconds_bucket", le="0.5") == 2
    assert value(registry, "speculating") == 1
    assert value(registry, "store_info", source="disk", reused="true") == 1


def test_the_same_again_adds_nothing(registry: CollectorRegistry):
    observer = Observer(families(registry), "m")
    observer.update(statistics(2, [1, 0, 1], [0.25, 0.5]))
    observer.update(statistics(2, [1, 0, 1], []))
    assert value(registry, "rounds_total") == 2
    assert value(registry, "accepted_depth_count") == 2
    assert value(registry, "draft_seconds_count") == 2


def test_every_sample_is_known_and_every_known_one_is_there(registry: CollectorRegistry):
    Observer(families(registry), "m").update(statistics(2, [1, 0, 1], [0.25, 0.5]))
    seen = {
        sample.name: set(sample.labels)
        for family in registry.collect()
        for sample in family.samples
        if not sample.name.endswith("_created")
    }
    assert seen == {name: set(labels) for name, labels in SAMPLES.items()}


def test_the_page_lists_them_all():
    page = (Path(__file__).parents[2] / "docs" / "monitoring.md").read_text()
    table = page.split("|---|---|---|\n")[1].split("\n\n")[0]
    rows = [line.split("`")[1] for line in table.splitlines()]
    assert rows == [metric.name for metric in METRICS]
