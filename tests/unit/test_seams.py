# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""A symbol of vLLM that has moved is one clear error for who asks for our methods, and for nobody
else; what other plugins wrap around it has not moved."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models import utils as models_utils
from vllm.platforms import current_platform
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.worker.block_table import BlockTable
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_subspec import plugin
from vllm_subspec.config import METHODS
from vllm_subspec.engine import compat, in_use, seams

MODEL = Path(__file__).parents[2] / "models" / "pystd-6m"
PLATFORM = current_platform.device_type
GENERAL = "vllm.v1.core.kv_cache_manager:KVCacheManager.evict_blocks"
STREAMING = "vllm.model_executor.models.utils:make_layers"


@pytest.fixture(autouse=True)
def vllm_s_own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is changed on top of a test's patches goes before they do."""
    compat.undo()
    yield
    compat.undo()


@pytest.mark.parametrize("method", METHODS)
def test_the_installed_vllm_has_every_seam(method: str) -> None:
    assert [report for report in seams.check_seams(method, PLATFORM) if not report.ok] == []
    seams.require(method, PLATFORM)


def test_a_missing_symbol_is_named_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(KVCacheManager, "evict_blocks")
    with pytest.raises(RuntimeError) as caught:
        seams.require("subspec", PLATFORM)
    message = str(caught.value)
    assert "vllm.v1.core.kv_cache_manager:KVCacheManager.evict_blocks" in message
    assert "install a supported vLLM version" in message
    assert "\n" not in message
    assert message.count("vllm.v1.") == 1, "only what has moved is named"


def test_a_renamed_parameter_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def update_from_output(self: Any, scheduler_output: Any, runner_output: Any) -> None: ...

    monkeypatch.setattr(Scheduler, "update_from_output", update_from_output)
    with pytest.raises(RuntimeError, match="Scheduler.update_from_output.*model_runner_output"):
        seams.require("subspec", PLATFORM)


def test_a_missing_module_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(seams.SEAMS, "vllm.no_such_module:Thing", None)
    with pytest.raises(RuntimeError, match="vllm.no_such_module"):
        seams.require("subspec", PLATFORM)


def test_every_seam_that_moved_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(KVCacheManager, "evict_blocks")
    monkeypatch.delattr(BlockTable, "get_device_tensor")
    with pytest.raises(RuntimeError, match="get_device_tensor.*evict_blocks"):
        seams.require("subspec", PLATFORM)


def configured(**speculative: Any) -> Any:
    args = EngineArgs(model=str(MODEL), max_model_len=128, speculative_config=speculative or None)
    return args.create_engine_config()


def test_a_moved_seam_stops_only_who_asks_for_our_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(KVCacheManager, "evict_blocks")
    plugin.register()
    assert configured().speculative_config is None
    lookups = configured(method="ngram", num_speculative_tokens=2, prompt_lookup_max=2)
    assert lookups.speculative_config.method == "ngram"
    with pytest.raises(RuntimeError, match='method "subspec" does not fit this vLLM.*evict_blocks'):
        configured(method="subspec")


def test_only_the_seams_of_the_method_in_use_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(models_utils, "make_layers")
    seams.require("hierspec", PLATFORM)
    with pytest.raises(RuntimeError, match=STREAMING):
        seams.require("subspec", PLATFORM)


@pytest.mark.parametrize("platform", seams.PLATFORMS)
@pytest.mark.parametrize("method", METHODS)
def test_no_seam_is_another_platform_s(method: str, platform: str) -> None:
    ours = {seam for table in seams._tables(method, platform) for seam in table}
    others = {"cpu": ("flash_attn",), "cuda": ("cpu",)}[platform]
    assert not [seam for seam in ours if any(other in seam for other in others)]
    assert GENERAL in ours


def test_an_unknown_platform_is_refused() -> None:
    with pytest.raises(ValueError) as refused:
        seams.require("subspec", "tpu")
    assert str(refused.value) == 'method "subspec" runs on CPU and CUDA, not on tpu'


def told(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    return wrapper


def hidden(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: original(*args, **kwargs)


@pytest.mark.parametrize("wrap", [told, hidden])
def test_a_wrapped_symbol_has_not_moved(
    monkeypatch: pytest.MonkeyPatch, wrap: Callable[..., Any]
) -> None:
    for owner, name in (
        (GPUModelRunner, "propose_draft_token_ids"),
        (Scheduler, "update_from_output"),
        (EngineArgs, "create_speculative_config"),
    ):
        monkeypatch.setattr(owner, name, wrap(getattr(owner, name)))
    plugin.register()
    assert configured(method="subspec").additional_config[in_use.KEY]["method"] == "subspec"


def test_a_wrapper_does_not_hide_what_has_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    def update_from_output(self: Any, scheduler_output: Any, runner_output: Any) -> None: ...

    monkeypatch.setattr(Scheduler, "update_from_output", told(update_from_output))
    with pytest.raises(RuntimeError, match="Scheduler.update_from_output.*model_runner_output"):
        seams.require("subspec", PLATFORM)
