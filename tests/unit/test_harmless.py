# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Installed and not asked for, the plugin changes nothing; asked for, it fits what is there."""

import functools
import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_subspec import config, plugin
from vllm_subspec.engine import beside, compat, in_use
from vllm_subspec.engine.method import WORKERS, options_of

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "pystd-6m"
HOOK = "vllm.engine.arg_utils.EngineArgs.create_speculative_config"
METRICS = "vllm.v1.engine.async_llm.AsyncLLM._run_output_handler"
MOST_SECONDS = 0.05
"""That `register` may add to a start."""

on_cpu = pytest.mark.skipif(not current_platform.is_cpu(), reason="joins vLLM's worker on a CPU")


@functools.cache
def unused(platform: str, what: str) -> Any:
    """What `tests.unit.unused` tells."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.unused", platform, what],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


# In a process that does not ask for our methods


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_registering_changes_one_function_of_vllm(platform: str) -> None:
    assert unused(platform, "footprint")["changed"] == [HOOK]


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_what_is_changed_in_use_is_seen_and_is_undone(platform: str) -> None:
    """Torch is not among it, whatever our worker imports."""
    seen = unused(platform, "footprint")
    assert seen["used"] == sorted([HOOK, METRICS, *seen["replaced"]])
    assert len(seen["replaced"]) >= 8
    assert seen["over"] == [HOOK, METRICS]


def test_our_worker_on_cuda_imports_nothing_of_the_cpu() -> None:
    imported = unused("cuda", "footprint")["imported"]
    assert "vllm_subspec.engine.worker_cuda" in imported
    theirs = [name for name in imported if name.startswith("vllm.")]
    assert not [name for name in theirs if "cpu" in name.split(".")[-1].split("_")]


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_registering_imports_nothing_of_vllm(platform: str) -> None:
    imported = unused(platform, "start")["imported"]
    assert [name for name in imported if not name.startswith("vllm_subspec")] == []
    assert len(imported) <= 5


def test_registering_is_quick() -> None:
    for _ in range(4):  # another process may have had the processor
        if unused("cpu", "start")["seconds"] < MOST_SECONDS:
            return
        unused.cache_clear()
    pytest.fail("slower each time")


def test_the_methods_are_known_by_their_names() -> None:
    assert tuple(config.METHODS) == in_use.NAMES


# How a process learns of it


@pytest.fixture
def vllm_s_own() -> Iterator[None]:
    plugin.register()
    compat.undo()
    yield
    compat.undo()


def configured(method: str | None = "subspec", **arguments: Any) -> VllmConfig:
    speculative = None if method is None else {"method": method}
    return EngineArgs(
        model=str(MODEL), max_model_len=128, speculative_config=speculative, **arguments
    ).create_engine_config()


def method_of(config: VllmConfig) -> str | None:
    options = options_of(config)
    return None if options is None else options.METHOD


@pytest.mark.usefixtures("vllm_s_own")
def test_a_process_that_gets_a_configuration_learns_of_our_method() -> None:
    others = pickle.dumps(configured(None))
    assert not compat._replaced
    sent = pickle.dumps(configured())
    assert compat._replaced
    compat.undo()
    assert method_of(pickle.loads(others)) is None
    assert not compat._replaced
    arrived = pickle.loads(sent)
    assert method_of(arrived) == "subspec"
    assert compat._replaced
    assert arrived.compute_hash() == pickle.loads(sent).compute_hash()


@pytest.mark.usefixtures("vllm_s_own")
def test_what_arrives_before_the_plugin_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = pickle.dumps(configured())
    compat.undo()
    monkeypatch.setattr(in_use, "_registered", False)
    pickle.loads(sent)
    assert not compat._replaced
    in_use.register()
    assert compat._replaced
    assert not in_use._arrived


@pytest.mark.usefixtures("vllm_s_own")
def test_arguments_that_another_process_has_rewritten() -> None:
    args = EngineArgs(model=str(MODEL), max_model_len=128, speculative_config={"method": "subspec"})
    args.create_engine_config()
    sent = pickle.dumps(args)
    compat.undo()
    again = pickle.loads(sent)
    compat.undo()
    assert method_of(again.create_engine_config()) == "subspec"
    assert compat._replaced


@pytest.mark.usefixtures("vllm_s_own")
def test_the_last_worker_takes_the_changes_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for worker in range(2):
        in_use.worker_begins("subspec")
        assert compat._replaced, worker
    in_use.worker_ends()
    assert compat._replaced
    in_use.worker_ends()
    assert not compat._replaced
    monkeypatch.setenv(in_use.REPAIR, "1")
    in_use.worker_begins("subspec")
    in_use.worker_ends()
    assert compat._replaced


@pytest.mark.usefixtures("vllm_s_own")
@pytest.mark.parametrize(("value", "shared"), [("1", True), ("0", False), ("", False)])
def test_repairs_are_shared_on_demand(
    monkeypatch: pytest.MonkeyPatch, value: str, shared: bool
) -> None:
    monkeypatch.setenv(in_use.REPAIR, value)
    plugin.register()
    assert bool(compat._replaced) is shared


# Beside other plugins

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


def hidden(original: Callable[..., Any]) -> Callable[..., Any]:
    """As most plugins wrap: nothing tells what is beneath."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    return wrapper


def puts_its_worker_in(original: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(self: Any, target_model_config: Any, target_parallel_config: Any) -> Any:
        target_parallel_config.worker_cls = WORKER
        return original(self, target_model_config, target_parallel_config)

    return wrapper


def theirs(patch: pytest.MonkeyPatch, wrap: Wrap) -> None:
    name = "create_speculative_config"
    patch.setattr(EngineArgs, name, wrap(getattr(EngineArgs, name)))
    name = "propose_draft_token_ids"
    patch.setattr(GPUModelRunner, name, hidden(getattr(GPUModelRunner, name)))


@pytest.fixture(params=["theirs first", "ours first"])
def beside_theirs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Registers ours and a plugin that wraps by the function given."""
    plugin.register()
    stock = EngineArgs.create_speculative_config.__wrapped__

    def register(wrap: Wrap) -> None:
        monkeypatch.setattr(EngineArgs, "create_speculative_config", stock)
        monkeypatch.setattr(in_use, "_hooked", False)
        if request.param == "theirs first":
            theirs(monkeypatch, wrap)
        plugin.register()
        if request.param == "ours first":
            theirs(monkeypatch, wrap)

    yield register
    compat.undo()


def test_a_plugin_that_wraps_what_we_do(beside_theirs: Any) -> None:
    beside_theirs(hidden)
    assert configured(None).speculative_config is None
    ours = configured()
    assert method_of(ours) == "subspec"
    assert ours.parallel_config.worker_cls in WORKERS.values()
    assert beside.KEY not in ours.additional_config


WORKER = "tests.unit.test_harmless.TheirWorker"
NO_WORKER = "tests.unit.test_harmless.NoWorker"


class NoWorker:
    pass


def __getattr__(name: str) -> Any:
    if name != "TheirWorker":
        raise AttributeError(name)
    from vllm.v1.worker.cpu_worker import CPUWorker

    class TheirWorker(CPUWorker):
        def load_model(self, **kwargs: Any) -> None:
            super().load_model(**kwargs)

        def colours(self) -> str:
            return "blue"

    globals()[name] = TheirWorker
    return TheirWorker


def made_worker(config: VllmConfig) -> Any:
    """A worker of the class that vLLM would make, without its `__init__`."""
    from vllm.utils.import_utils import resolve_obj_by_qualname

    ours = resolve_obj_by_qualname(config.parallel_config.worker_cls)
    return ours.__new__(ours, vllm_config=config)


@on_cpu
def test_a_plugin_that_puts_its_worker_in(beside_theirs: Any) -> None:
    beside_theirs(puts_its_worker_in)
    config = configured()
    worker = made_worker(config)
    ours, theirs = type(worker).__bases__
    assert ours.__name__ == "SubspecCPUWorker"
    assert f"{theirs.__module__}.{theirs.__name__}" == WORKER
    assert worker.colours() == "blue"


@on_cpu
def test_a_worker_by_its_option() -> None:
    plugin.register()
    assert made_worker(configured(worker_cls=WORKER)).colours() == "blue"
    plain = configured(worker_cls="vllm.v1.worker.cpu_worker.CPUWorker")
    assert type(made_worker(plain)).__name__ == "SubspecCPUWorker"


@on_cpu
@pytest.mark.parametrize(
    ("worker", "reason"),
    [
        (NO_WORKER, f"can be joined with subclasses of {beside.STOCK['cpu']} only"),
        ("nowhere.Worker", "cannot read the one that"),
        ("Worker", "cannot read the one that"),
    ],
)
def test_a_worker_that_ours_cannot_join(worker: str, reason: str) -> None:
    plugin.register()
    with pytest.raises(ValueError) as refused:
        configured(worker_cls=worker)
    said = str(refused.value)
    assert said.startswith('method "subspec" brings its own worker') and reason in said
    assert said.endswith("remove one of them") and "\n" not in said and worker in said


@on_cpu
def test_a_worker_that_took_the_place_of_ours_is_told() -> None:
    """By a plugin that changes the configuration when it is complete."""
    from vllm_subspec.engine.proposer import DraftProposer

    plugin.register()
    config = configured()
    config.parallel_config.worker_cls = WORKER
    with pytest.raises(ValueError, match=f"another plugin has put {WORKER} in its place"):
        DraftProposer(config)
