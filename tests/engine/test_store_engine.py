# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""The weight store from one start of the engine to the next."""

import contextlib
import itertools
import logging
import os
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file
from vllm import LLM
from vllm.model_executor.model_loader import weight_utils

from tests.engine.helpers import (
    MODEL,
    ROUGH,
    Answer,
    Engines,
    generate,
    greedy,
    resident_gib,
    source_prompts,
    worker_of,
)
from vllm_subspec.engine import loading
from vllm_subspec.weights import substitute_source
from vllm_subspec.weights.store import StoreError

PROMPTS = source_prompts(4, 10, 60)
PARAMS = [greedy(24)] * len(PROMPTS)


@pytest.fixture(scope="module")
def expected(engines: Engines) -> list[Answer]:
    return engines.reference(PROMPTS, PARAMS)


@pytest.fixture(scope="module")
def sound(
    engines: Engines, expected: list[Answer], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with the sound store of one start."""
    folder = tmp_path_factory.mktemp("sound")
    llm = start(engines, folder)
    assert generate(llm, PROMPTS, PARAMS) == expected
    engines.close()
    return folder


@pytest.fixture
def store(sound: Path, tmp_path: Path) -> Path:
    """A copy of the sound store: its file."""
    shutil.copytree(sound, tmp_path / "store")
    return only_store(tmp_path / "store")


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], str]]:
    """What this package warned about since the test began."""
    logger = logging.getLogger("vllm_subspec")
    logger.addHandler(caplog.handler)
    yield lambda: "\n".join(
        record.getMessage()
        for record in caplog.records
        if record.name.startswith("vllm_subspec") and record.levelno >= logging.WARNING
    )
    logger.removeHandler(caplog.handler)


def start(engines: Engines, folder: Path, model: Path = MODEL, **settings: Any) -> LLM:
    """A new engine, even where the last one was started in the same way."""
    engines.close()
    return engines.get({**ROUGH, "store_dir": str(folder)}, model, **settings)


def only_store(folder: Path) -> Path:
    (path,) = folder.glob("*.store")
    return path


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4096)


def flip_bit(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0x10]))


def half_write(path: Path) -> None:
    """The whole file is reserved, its first blocks are there, its header is not."""
    with path.open("r+b") as file:
        file.write(bytes(4096))
        size = path.stat().st_size
        file.truncate(size // 2)
        file.truncate(size)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def test_a_second_start_searches_no_scales(
    engines: Engines,
    sound: Path,
    expected: list[Answer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its drafts are those of the first: as many tokens are accepted of as many."""
    options = {**ROUGH, "quantizer": "hqq", "resident_weights_gib": resident_gib(2)}
    options |= {"substitute_layers": "all", "store_dir": str(tmp_path / "store")}
    shutil.copytree(sound, tmp_path / "store")  # of the weights alone

    def run() -> dict[str, Any]:
        engines.close()
        llm = engines.get(
            {**options, "store_dir": str(tmp_path / "store"), "substitute_layers": "all"}
        )
        assert generate(llm, PROMPTS, PARAMS) == expected
        log = worker_of(llm).round_log(float("inf"))
        return {name: log[name] for name in ("emitted", "by_depth", "draft_nodes")}

    first = run()
    (kept,) = (tmp_path / "store").glob("*.substitutes")
    made = kept.stat().st_mtime_ns

    def quantized_again(*_: object) -> None:
        raise AssertionError("a substitute was quantized again")

    with monkeypatch.context() as patch:
        patch.setattr(substitute_source, "quantize", quantized_again)
        assert run() == first
        assert kept.stat().st_mtime_ns == made
        with pytest.raises(Exception, match="quantized again"):
            engines.get({**options, "bits": 4})
    engines.close()
    flip_bit(kept)
    assert run() == first
    assert kept.stat().st_mtime_ns > made


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "truncated"),
        (flip_bit, "corrupted"),
        (half_write, "corrupted"),
        (empty, "truncated"),
    ],
)
def test_a_damaged_store_is_rebuilt(
    engines: Engines,
    store: Path,
    expected: list[Answer],
    messages: Callable[[], str],
    damage: Callable[[Path], None],
    reason: str,
) -> None:
    whole = store.read_bytes()
    damage(store)
    llm = start(engines, store.parent)
    assert re.search(f"weight store will be rebuilt .*{reason}", messages())
    assert not worker_of(llm).loading.store_reused
    assert generate(llm, PROMPTS, PARAMS) == expected
    assert store.read_bytes() == whole


def test_a_killed_writers_partial_file_is_removed(
    engines: Engines, store: Path, expected: list[Answer], messages: Callable[[], str]
) -> None:
    partial = store.with_name(f"{store.name}.4242-0badcafe.partial")
    store.rename(partial)
    half_write(partial)
    llm = start(engines, store.parent)
    assert "left by a writer that was killed" in messages()
    assert not partial.exists() and only_store(store.parent) == store
    assert generate(llm, PROMPTS, PARAMS) == expected


def change_weights(model: Path, keep_time: bool, factor: float = 0.5) -> None:
    """Scale the weights that are streamed."""
    path = model / "model.safetensors"
    status = path.stat()
    weights = {
        name: weight * factor if re.search(r"layers\..*proj\.weight", name) else weight
        for name, weight in load_file(path).items()
    }
    assert sum(torch.any(weight != 0).item() for weight in weights.values()) > 6
    save_file(weights, path, metadata={"format": "pt"})
    assert path.stat().st_size == status.st_size
    if keep_time:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the model, to change it."""
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


def test_another_models_store_is_rebuilt(
    engines: Engines,
    model: Path,
    expected: list[Answer],
    tmp_path: Path,
    messages: Callable[[], str],
) -> None:
    """The checkpoint is replaced by another of the same shape under the same name."""
    first = start(engines, tmp_path / "store", model)
    assert generate(first, PROMPTS, PARAMS) == expected
    change_weights(model, keep_time=False)
    second = start(engines, tmp_path / "store", model)
    assert "belongs to something else" in messages() and "will be rebuilt" in messages()
    answers = generate(second, PROMPTS, PARAMS)
    assert answers == generate(engines.get(None, model), PROMPTS, PARAMS)
    assert all(a.tokens != e.tokens for a, e in zip(answers, expected, strict=True))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tensors whose data are read from checkpoints."""
    read: list[str] = []

    class Noting:
        def __init__(self, file: Any) -> None:
            self._file = file

        def get_tensor(self, name: str) -> torch.Tensor:
            read.append(name)
            tensor: torch.Tensor = self._file.get_tensor(name)
            return tensor

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

    @contextlib.contextmanager
    def opened(*args: Any, **kwargs: Any) -> Iterator[Noting]:
        with safe_open(*args, **kwargs) as file:
            yield Noting(file)

    monkeypatch.setattr(weight_utils, "safe_open", opened)
    return read


def test_the_second_start_reads_the_store_only(
    engines: Engines,
    model: Path,
    expected: list[Answer],
    tmp_path: Path,
    messages: Callable[[], str],
    reads: list[str],
) -> None:
    """The checkpoint's own copy of the streamed weights is wrong by then, and nobody notices."""
    first = start(engines, tmp_path / "store", model)
    assert not worker_of(first).loading.store_reused
    assert generate(first, PROMPTS, PARAMS) == expected
    written = only_store(tmp_path / "store").stat()
    change_weights(model, keep_time=True, factor=2.0)
    assert any("q_proj" in name for name in reads)
    reads.clear()
    second = start(engines, tmp_path / "store", model)
    assert worker_of(second).loading.store_reused and messages() == ""
    assert not worker_of(second).loading._host_blocks  # nothing came from the checkpoint
    assert sorted({name.split(".")[-2] for name in reads}) == [
        *("embed_tokens", "input_layernorm", "norm", "post_attention_layernorm")
    ]
    assert generate(second, PROMPTS, PARAMS) == expected
    assert only_store(tmp_path / "store").stat().st_mtime_ns == written.st_mtime_ns


def test_a_second_start_that_reads_everything_says_so(
    engines: Engines, expected: list[Answer], tmp_path: Path, messages: Callable[[], str]
) -> None:
    whole_files = {"enable_multithread_load": True}
    start(engines, tmp_path)
    assert messages() == ""
    llm = start(engines, tmp_path, model_loader_extra_config=whole_files)
    assert worker_of(llm).loading.store_reused
    assert "--model-loader-extra-config" in messages()
    assert generate(llm, PROMPTS, PARAMS) == expected


def test_other_weights_need_a_restart(
    engines: Engines, expected: list[Answer], tmp_path: Path
) -> None:
    llm = start(engines, tmp_path)
    for call in ("reload_weights", "update_weights"):
        with pytest.raises(NotImplementedError, match="restart to serve others"):
            llm.collective_rpc(call, args=({},))
    assert generate(llm, PROMPTS, PARAMS) == expected


@pytest.fixture
def short_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Host memory looks large enough, but only two blocks can be had."""
    monkeypatch.setattr(loading, "choose_tier", lambda *_: "host")
    allocate, taken = loading._host_block, itertools.count()

    def host_block(*args: Any) -> torch.Tensor:
        if next(taken) >= 2:
            raise MemoryError("cannot page-lock 1 bytes")
        return allocate(*args)

    monkeypatch.setattr(loading, "_host_block", host_block)


def test_streaming_from_host_memory(
    engines: Engines, expected: list[Answer], tmp_path: Path
) -> None:
    llm = engines.get({**ROUGH, "store_dir": str(tmp_path), "weight_source": "host"})
    assert generate(llm, PROMPTS, PARAMS) == expected
    (told,) = llm.collective_rpc("statistics")
    assert told["store"]["source"] == "host" and told["counters"]["streamed_bytes"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("before", ["no store", "a store"])
def test_memory_that_runs_out_falls_to_the_disk(
    engines: Engines,
    sound: Path,
    expected: list[Answer],
    tmp_path: Path,
    messages: Callable[[], str],
    short_of_memory: None,
    before: str,
) -> None:
    folder = tmp_path / "store"
    if before == "a store":
        shutil.copytree(sound, folder)
    llm = start(engines, folder)
    assert "from disk, not from host memory: cannot page-lock 1 bytes" in messages()
    assert not worker_of(llm).loading._host_blocks
    assert generate(llm, PROMPTS, PARAMS) == expected
    assert only_store(folder).read_bytes() == only_store(sound).read_bytes()


def test_memory_that_runs_out_is_refused_where_it_was_asked_for(
    engines: Engines, tmp_path: Path, short_of_memory: None
) -> None:
    engines.close()
    host = {**ROUGH, "store_dir": str(tmp_path), "weight_source": "host"}
    with pytest.raises(MemoryError, match='1 bytes, or set "weight_source" to "disk"'):
        engines.get(host)
    assert list(tmp_path.iterdir()) == []


def test_a_store_dir_that_cannot_be_made(engines: Engines, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(StoreError, match="; choose another store_dir$") as caught:
        start(engines, tmp_path / "file" / "store")
    assert "\n" not in str(caught.value) and str(tmp_path / "file") in str(caught.value)
    assert (tmp_path / "file").read_text() == "not a directory"


def test_disk_full(engines: Engines, tmp_path: Path, expected: list[Answer]) -> None:
    """The system refuses files of the store's size: nothing is left behind, and the next start
    with room succeeds."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    engines.close()
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(StoreError, match="no room for the weight store.*store_dir"):
            start(engines, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path for path in tmp_path.iterdir() if path.suffix != ".lock"] == []
    assert generate(start(engines, tmp_path), PROMPTS, PARAMS) == expected
