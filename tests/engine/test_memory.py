# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Memory: what is planned is what an engine keeps, and what it keeps is gone when it has ended."""

from pathlib import Path
from typing import Any

import pytest
from vllm import LLM
from vllm.utils import cpu_resource_utils

from tests.engine.held import held_bytes
from tests.engine.helpers import (
    LAYERS,
    ROUGH,
    Answer,
    Engines,
    generate,
    greedy,
    memory_plan,
    resident_gib,
    source_prompts,
    worker_of,
)
from tests.engine.hierarchies import WAYS
from vllm_subspec.core.plan import GATHERED, MemoryPlan
from vllm_subspec.engine import residency
from vllm_subspec.weights.host_memory import host_memory

PROMPTS = source_prompts(4, 20, 80)
PARAMS = [greedy(24)] * 4
TABLES = 5 << 18
"""Rotary tables and whatever else is small and in no plan."""

KEPT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "all streamed": (ROUGH, {}),
    "half resident": ({**ROUGH, "resident_weights_gib": resident_gib(3)}, {}),
    "8 bits": ({**ROUGH, "bits": 8}, {}),
    "bfloat16": (ROUGH, {"dtype": "bfloat16"}),
    "a draft model": (WAYS["substitute-draft_model"], {}),
    "EAGLE": (WAYS["substitute-eagle"], {}),
    "EAGLE-3": (WAYS["substitute-eagle3"], {}),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_is_kept_was_planned(engines: Engines, tmp_path: Path, name: str) -> None:
    options, settings = KEPT[name]
    engines.close()
    before = held_bytes()
    llm = engines.get({**options, "store_dir": str(tmp_path)}, **settings)
    plan, kv = memory_plan(llm), kv_bytes(llm)
    assert kv == pytest.approx(plan.kv_bytes, rel=0.05)
    rest = plan.total - plan.workspace_bytes - plan.kv_bytes
    kept = held_bytes() - before - kv
    assert 0.95 * rest <= kept <= 1.05 * rest + TABLES, (kept, rest)
    del llm
    engines.close()
    assert held_bytes() - before < TABLES


def plan_of(llm: LLM) -> MemoryPlan:
    plan = memory_plan(llm)
    assert plan.total <= plan.device_bytes
    return plan


def kv_bytes(llm: LLM) -> int:
    storages = [cache.untyped_storage() for cache in worker_of(llm).model_runner.kv_caches]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.fixture(scope="module")
def expected(engines: Engines) -> list[Answer]:
    return engines.reference(PROMPTS, PARAMS)


@pytest.fixture
def planned(engines: Engines, tmp_path: Path) -> MemoryPlan:
    """Of all layers streamed: the least that this model needs."""
    return memory_plan(engines.get(ROUGH | {"store_dir": str(tmp_path)}))


def start(engines: Engines, folder: Path, monkeypatch: Any, device: int, **settings: Any) -> LLM:
    """An engine that decides by itself what is streamed.

    Args:
        device: bytes that it may use.
    """
    engines.close()
    monkeypatch.setattr(residency, "_device_bytes", lambda *_: device)
    # What this process has taken differs from test to test.
    monkeypatch.setattr(residency, "_process_bytes", lambda: 0)
    options = {**ROUGH, "resident_weights_gib": "auto", "store_dir": str(folder)}
    return engines.get(options, **settings)


@pytest.fixture
def least(planned: MemoryPlan) -> int:
    """Bytes but for the process's own and for further slots of the ring."""
    slot = planned.ring_bytes // planned.ring_layers
    others = planned.total - planned.workspace_bytes - (planned.ring_layers - 2) * slot
    return others + GATHERED


def test_memory_decides_what_is_streamed(
    engines: Engines,
    expected: list[Answer],
    planned: MemoryPlan,
    least: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = planned.store_bytes // LAYERS
    activations = residency._activations(worker_of(engines.get(ROUGH)).vllm_config)
    room = least + activations
    llm = start(engines, tmp_path, monkeypatch, room + 3 * layer)
    assert 0 < len(plan_of(llm).streamed) < LAYERS
    assert generate(llm, PROMPTS, PARAMS) == expected
    llm = start(engines, tmp_path, monkeypatch, room + 2 * LAYERS * layer)
    assert plan_of(llm).streamed == () and plan_of(llm).substituted
    assert generate(llm, PROMPTS, PARAMS) == expected
    with pytest.raises(ValueError, match="short by"):
        start(engines, tmp_path, monkeypatch, room - layer)


def test_kv_leaves_room_for_full_batches(
    engines: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nobody says how large it is, vLLM would give it all that is not yet in use."""
    device = 2 << 30
    # A share that is free beside whatever else runs, and yet more than the device's bytes.
    settings = {"kv_cache_memory_bytes": None, "max_num_seqs": 8, "gpu_memory_utilization": 0.3}
    llm = start(engines, tmp_path, monkeypatch, device, **settings)
    plan = plan_of(llm)
    assert kv_bytes(llm) == pytest.approx(device - (plan.total - plan.kv_bytes), rel=0.01)


def test_a_container_s_page_cache_gives_way(
    engines: Engines, expected: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading a checkpoint has filled a container up to its limit."""
    engines.close()
    limit = host_memory().total - 1
    for name in ("get_cgroup_memory_limit", "get_cgroup_memory_usage"):
        monkeypatch.setattr(cpu_resource_utils, name, lambda: limit)
    assert generate(engines.get(ROUGH), PROMPTS, PARAMS) == expected
