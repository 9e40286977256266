# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""A symbol of vLLM that has moved is one clear error at start."""

from typing import Any

import pytest
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.worker.block_table import BlockTable

from vllm_subspec import plugin
from vllm_subspec.engine import seams


def test_the_installed_vllm_has_every_seam() -> None:
    assert [report for report in seams.check_seams() if not report.ok] == []
    seams.require()


def test_a_missing_symbol_is_named_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(KVCacheManager, "evict_blocks")
    with pytest.raises(RuntimeError) as caught:
        seams.require()
    message = str(caught.value)
    assert "vllm.v1.core.kv_cache_manager:KVCacheManager.evict_blocks" in message
    assert "install a supported vLLM version" in message
    assert "\n" not in message
    assert message.count("vllm.v1.") == 1, "only what has moved is named"


def test_a_renamed_parameter_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def update_from_output(self: Any, scheduler_output: Any, runner_output: Any) -> None: ...

    monkeypatch.setattr(Scheduler, "update_from_output", update_from_output)
    with pytest.raises(RuntimeError, match="Scheduler.update_from_output.*model_runner_output"):
        seams.require()


def test_a_missing_module_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(seams.SEAMS, "vllm.no_such_module:Thing", None)
    with pytest.raises(RuntimeError, match="vllm.no_such_module"):
        seams.require()


def test_every_seam_that_moved_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(KVCacheManager, "evict_blocks")
    monkeypatch.delattr(BlockTable, "get_device_tensor")
    with pytest.raises(RuntimeError, match="get_device_tensor.*evict_blocks"):
        seams.require()


def test_the_plugin_does_not_load_on_a_moved_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(KVCacheManager, "evict_blocks")
    with pytest.raises(RuntimeError, match="evict_blocks"):
        plugin.register()
