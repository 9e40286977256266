# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""The weight store: what is written comes back bit for bit; anything else is an error.

Damage, killed writers, full disks and competing writers are real ones; run as a script, this file
is the program that is killed or competes.
"""

import json
import logging
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from vllm_subspec.weights.host_memory import forget_peak, peak_memory
from vllm_subspec.weights.store import (
    BlockLayout,
    StoreCorruptError,
    StoreError,
    StoreForeignError,
    StoreMissingError,
    StoreReadError,
    StoreTruncatedError,
    StoreVersionError,
    StoreWriteError,
    StoreWriter,
    TensorSpec,
    WeightStore,
    aligned_buffer,
    open_or_create,
)
from vllm_subspec.weights.store_format import CHUNK, DTYPE_NAMES, MAGIC, PAGE, PREAMBLE

FINGERPRINT: dict[str, str | int] = {"model": "example", "revision": "abc", "rank": 0}
BLOCKS = (
    BlockLayout(
        "layers.0",
        (
            TensorSpec("qkv", (48, 40), torch.bfloat16),
            TensorSpec("scale", (), torch.float32),
            TensorSpec("empty", (0, 3), torch.int8),
            TensorSpec("codes", (3, 5), torch.uint8),
        ),
    ),
    BlockLayout("layers.1", (TensorSpec("qkv", (64, 32), torch.float32),)),
    BlockLayout("head", (TensorSpec("w", (7,), torch.int64),)),
)
Content = list[dict[str, Tensor]]


def fill(blocks: tuple[BlockLayout, ...], seed: int = 0) -> Content:
    """Random bytes for every tensor: NaNs and all."""
    g = torch.Generator().manual_seed(seed)
    content: Content = []
    for block in blocks:
        tensors = {}
        for spec in block.tensors:
            high = 2 if spec.dtype == torch.bool else 256
            raw = torch.randint(0, high, (spec.nbytes,), generator=g, dtype=torch.uint8)
            tensors[spec.name] = raw.view(spec.dtype).view(spec.shape)
        content.append(tensors)
    return content


def write(
    path: Path, blocks: tuple[BlockLayout, ...], content: Content, fingerprint: Any = FINGERPRINT
) -> None:
    with StoreWriter(str(path), fingerprint, blocks) as writer:
        for index, tensors in enumerate(content):
            writer.write_block(index, tensors)


def raw(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().flatten().view(torch.uint8).numpy())


def assert_holds(store: WeightStore, blocks: tuple[BlockLayout, ...], content: Content) -> None:
    assert store.blocks == blocks
    with store.open_reader() as reader:
        for index, block in enumerate(blocks):
            buffer = aligned_buffer(block.nbytes).fill_(255)
            reader.read(index, buffer)
            views = block.views(buffer)
            for spec in block.tensors:
                view = views[spec.name]
                assert view.dtype == spec.dtype and tuple(view.shape) == spec.shape
                assert raw(view) == raw(content[index][spec.name])
                if view.numel():
                    assert view.data_ptr() % 64 == 0
                    assert view.untyped_storage().data_ptr() == buffer.data_ptr()


def check(path: Path) -> None:
    with WeightStore.open(str(path), FINGERPRINT, BLOCKS) as store:
        store.verify()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "weights.store"


@pytest.fixture
def good(path: Path) -> bytes:
    write(path, BLOCKS, fill(BLOCKS))
    return path.read_bytes()


# ---- round trips


def names() -> st.SearchStrategy[str]:
    return st.text(min_size=1, max_size=8)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[BlockLayout, ...]:
    spec = st.builds(
        TensorSpec,
        names(),
        st.lists(st.integers(0, 9), max_size=4).map(tuple),
        st.sampled_from(list(DTYPE_NAMES)),
    )
    tensors = st.lists(spec, min_size=1, max_size=5, unique_by=lambda s: s.name).filter(
        lambda specs: any(s.nbytes for s in specs)
    )
    block = st.builds(BlockLayout, names(), tensors.map(tuple))
    return tuple(draw(st.lists(block, min_size=1, max_size=4, unique_by=lambda b: b.name)))


@given(
    blocks=layouts(),
    fingerprint=st.dictionaries(st.text(), st.text() | st.integers(-(2**62), 2**62), max_size=4),
    rng=st.randoms(use_true_random=False),
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_layout_round_trips(
    path: Path, blocks: tuple[BlockLayout, ...], fingerprint: dict[str, str | int], rng: Any
) -> None:
    content = fill(blocks, rng.randrange(1 << 30))
    order = list(range(len(blocks)))
    rng.shuffle(order)
    with StoreWriter(str(path), fingerprint, blocks) as writer:
        for index in order:
            writer.write_block(index, content[index])
    with WeightStore.open(str(path), fingerprint, blocks) as store:
        store.verify()
        assert store.fingerprint == fingerprint
        assert path.stat().st_size % PAGE == 0
        assert_holds(store, blocks, content)


def test_blocks_larger_than_a_chunk_and_strided_tensors(path: Path) -> None:
    blocks = (
        BlockLayout(
            "big",
            (
                TensorSpec("a", (CHUNK // 2 + 77,), torch.uint8),
                TensorSpec("b", (3, CHUNK // 4), torch.bfloat16),  # spans three chunks
            ),
        ),
        BlockLayout("exact", (TensorSpec("c", (CHUNK,), torch.uint8),)),
    )
    content = fill(blocks)
    content[0]["b"] = content[0]["b"].T.contiguous().T
    write(path, blocks, content)
    with WeightStore.open(str(path), FINGERPRINT) as store:
        store.verify()
        assert_holds(store, blocks, content)
    for offset in (path.stat().st_size - 1, path.stat().st_size - CHUNK - PAGE):
        damage(path, offset, 1)
    with (
        WeightStore.open(str(path), FINGERPRINT) as store,
        pytest.raises(StoreCorruptError, match="'(big|exact)'"),
    ):
        store.verify()


def test_files_are_private_and_aligned(tmp_path: Path) -> None:
    path = tmp_path / "new" / "weights.store"
    write(path, BLOCKS, fill(BLOCKS))
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert {p.name: p.stat().st_mode & 0o777 for p in path.parent.iterdir()} == {
        "weights.store": 0o600,
        "weights.store.lock": 0o600,
    }


def test_nothing_of_one_block_leaks_into_the_padding_of_the_next(good: bytes) -> None:
    assert good[-PAGE + 7 * 8 :] == bytes(PAGE - 7 * 8)
    gap = regions(good)["gap between tensors"]
    assert not any(good[gap.start : gap.stop])


def test_views_refuse_a_wrong_buffer() -> None:
    block = BLOCKS[1]
    buffer = aligned_buffer(2 * block.nbytes)
    for bad in (buffer[: block.nbytes - 1], buffer[1:], buffer[::2], buffer.view(torch.int32)):
        with pytest.raises(ValueError, match="layers.1"):
            block.views(bad)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (("", (1,), torch.uint8), "1 to 1024"),
        (("x", (-1,), torch.uint8), "shape"),
        (("x", (True,), torch.uint8), "shape"),
        (("x", (1 << 60,), torch.uint8), "shape"),
        (("x", (1,), torch.complex64), "complex64"),
    ],
)
def test_impossible_tensors_are_refused(spec: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TensorSpec(*spec)


def test_impossible_stores_are_refused(path: Path) -> None:
    one = TensorSpec("x", (1,), torch.uint8)
    for tensors, message in [((), "no bytes"), ((one, one), "twice")]:
        with pytest.raises(ValueError, match=message):
            BlockLayout("b", tensors)
    block = BlockLayout("b", (one,))
    for blocks in ((), (block, block)):
        with pytest.raises(ValueError, match="at least one block"):
            StoreWriter(str(path), FINGERPRINT, blocks)
    for value in (1.5, True, None, 1 << 63):
        with pytest.raises(ValueError, match="'key'"):
            StoreWriter(str(path), {"key": value}, (block,))  # type: ignore[dict-item]


# ---- opening what is not a sound store of ours


def test_missing_and_unreadable_stores(path: Path) -> None:
    with pytest.raises(StoreMissingError) as missing:
        check(path)
    assert missing.value.reason == "missing"
    path.mkdir()
    with pytest.raises(StoreReadError, match="not a regular file"):
        check(path)


@pytest.mark.parametrize(
    ("change", "key"),
    [({"revision": "abd"}, "revision"), ({"rank": 1}, "rank"), ({"layout": "x"}, "layout")],
)
def test_foreign_store_names_the_key(path: Path, good: bytes, change: Any, key: str) -> None:
    with pytest.raises(StoreForeignError, match=repr(key)) as error:
        WeightStore.open(str(path), FINGERPRINT | change)
    assert error.value.key == key and error.value.reason == "foreign"


def test_foreign_layout(path: Path, good: bytes) -> None:
    with pytest.raises(StoreForeignError, match="other tensors"):
        WeightStore.open(str(path), FINGERPRINT, BLOCKS[::-1])


def damage(path: Path, offset: int, mask: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ mask]))


def regions(content: bytes) -> dict[str, range]:
    """Byte ranges of the file by what they hold, worked out here from the format's description."""
    json_end = PREAMBLE.size + struct.unpack_from("<I", content, 12)[0]
    start = -(-json_end // PAGE) * PAGE
    return {
        "magic": range(8),
        "version": range(8, 12),
        "length": range(12, 16),
        "header checksum": range(16, 24),
        "json": range(24, json_end, 5),
        "header padding": range(json_end, start, 31),
        "tensor": range(start, start + 48 * 40 * 2, 29),
        "gap between tensors": range(start + 48 * 40 * 2 + 4, start + 48 * 40 * 2 + 64, 3),
        "block padding": range(start + 48 * 40 * 2 + 64 + 15, start + PAGE, 11),
        "later blocks": range(start + PAGE, len(content), 97),
        "last byte": range(len(content) - 1, len(content)),
    }


@pytest.mark.parametrize("region", list(regions(bytes(PAGE * 5))))
def test_a_flipped_bit_is_found_wherever_it_is(path: Path, good: bytes, region: str) -> None:
    positions = regions(good)[region]
    assert len(positions)
    for position in positions:
        mask = 1 << position % 8
        damage(path, position, mask)
        with pytest.raises(StoreError) as error:
            check(path)
        expected: tuple[type[StoreError], ...] = (StoreCorruptError,)
        if region == "version":
            expected = (StoreVersionError,)
        elif region == "length":  # a longer header may end behind the file
            expected = (StoreCorruptError, StoreTruncatedError)
        assert isinstance(error.value, expected)
        if region in ("tensor", "gap between tensors", "block padding"):
            assert "'layers.0'" in str(error.value)
        damage(path, position, mask)
    check(path)


def test_truncation_anywhere_and_growth(path: Path, good: bytes) -> None:
    for length in [*range(30), *range(30, len(good), 509), len(good) - 1]:
        path.write_bytes(good[:length])
        with pytest.raises(StoreTruncatedError):
            check(path)
    path.write_bytes(good + b"\0")
    with pytest.raises(StoreCorruptError):
        check(path)


def test_unsupported_version(path: Path, good: bytes) -> None:
    path.write_bytes(good[:8] + struct.pack("<I", 2) + good[12:])
    with pytest.raises(StoreVersionError, match="version 2, this release reads 1"):
        check(path)


def seal(text: bytes, claimed: int | None = None) -> bytes:
    """A header with a right checksum around any JSON."""
    size = len(text) if claimed is None else claimed
    rest = text.ljust(-(-(PREAMBLE.size + len(text)) // PAGE) * PAGE - PREAMBLE.size, b"\0")
    start = PREAMBLE.pack(MAGIC, 1, size, 0)
    return PREAMBLE.pack(MAGIC, 1, size, xxhash.xxh3_64_intdigest(start + rest)) + rest


def body_of(content: bytes) -> Any:
    return json.loads(content[24 : 24 + struct.unpack_from("<I", content, 12)[0]])


def compact(body: Any) -> bytes:
    return json.dumps(body, separators=(",", ":"), sort_keys=True).encode()


def blocks_of(content: bytes) -> bytes:
    return content[regions(content)["tensor"].start :]


def test_the_hostile_headers_below_are_sealed_rightly(path: Path, good: bytes) -> None:
    path.write_bytes(seal(compact(body_of(good))) + blocks_of(good))
    check(path)


TENSOR = ("blocks", 1, "tensors", 0)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("chunk",), 1),
        (("extra",), 1),
        (("fingerprint",), []),
        (("fingerprint",), {"a": 1.5}),
        (("fingerprint",), {"a": 1 << 70}),
        (("blocks",), []),
        (("blocks",), {}),
        (("blocks",), "layers"),
        (("blocks", 1), None),
        (("blocks", 1, "name"), ""),
        (("blocks", 1, "name"), ["x"]),
        (("blocks", 1, "name"), "layers.0"),
        (("blocks", 1, "offset"), 0),
        (("blocks", 1, "offset"), -PAGE),
        (("blocks", 1, "offset"), 1 << 62),
        (("blocks", 1, "nbytes"), 1 << 62),
        (("blocks", 1, "nbytes"), PAGE),
        (("blocks", 1, "extra"), 0),
        (("blocks", 1, "tensors"), []),
        (("blocks", 1, "tensors"), ["abc"]),
        (("blocks", 1, "checksums"), []),
        (("blocks", 1, "checksums"), ["0" * 16, "0" * 16]),
        (("blocks", 1, "checksums"), ["G" * 16]),
        (("blocks", 1, "checksums"), [7]),
        (TENSOR, ["qkv", [64, 32]]),
        ((*TENSOR, 0), "x" * (1 << 20)),
        ((*TENSOR, 1), [1 << 47] * 16),
        ((*TENSOR, 1), [1] * 1000),
        ((*TENSOR, 1), [-64, -32]),
        ((*TENSOR, 1), [64.0, 32.0]),
        ((*TENSOR, 1), [True]),
        ((*TENSOR, 1), [64, 33]),
        ((*TENSOR, 1), [1 << 33]),
        ((*TENSOR, 1), "64"),
        ((*TENSOR, 1), 64),
        ((*TENSOR, 2), "float64"),
        ((*TENSOR, 2), "object"),
        ((*TENSOR, 2), ["float32"]),
    ],
)
def test_hostile_header_fields(path: Path, good: bytes, where: Any, value: Any) -> None:
    body = body_of(good)
    parent = body
    for step in where[:-1]:
        parent = parent[step]
    parent[where[-1]] = value
    path.write_bytes(seal(compact(body)) + blocks_of(good))
    forget_peak()
    before = peak_memory()
    with pytest.raises(StoreError) as error:
        WeightStore.open(str(path), FINGERPRINT)
    assert len(str(error.value)) < 1000 + len(str(path))
    assert peak_memory() < before + (64 << 20)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"[" * 100_000,
        b'{"fingerprint":' * 5000,
        b'{"fingerprint":{"a":' + b"9" * 10_000 + b'},"blocks":[]}',
        b'{"fingerprint":{"a":NaN},"blocks":[]}',
        b"\xff\xfe\x00",
    ],
)
def test_hostile_json(path: Path, good: bytes, text: bytes) -> None:
    path.write_bytes(seal(text) + blocks_of(good))
    with pytest.raises(StoreCorruptError):
        WeightStore.open(str(path), FINGERPRINT)


def test_a_differently_written_header_is_refused(path: Path, good: bytes) -> None:
    spaced = json.dumps(body_of(good), sort_keys=True).encode()
    path.write_bytes(seal(spaced) + blocks_of(good))
    with pytest.raises(StoreCorruptError, match="contradicts itself"):
        WeightStore.open(str(path), FINGERPRINT)


@pytest.mark.parametrize("claimed", [2**32 - 1, (16 << 20) + 1, 16 << 20, 8000, 0])
def test_hostile_header_length(path: Path, good: bytes, claimed: int) -> None:
    path.write_bytes(seal(compact(body_of(good)), claimed))
    with pytest.raises((StoreCorruptError, StoreTruncatedError)):
        WeightStore.open(str(path), FINGERPRINT)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


@given(data=st.data())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_mutated_header_is_refused_or_means_the_same(
    path: Path, good: bytes, data: st.DataObject
) -> None:
    body = body_of(good)
    node: Any = body
    while True:
        steps = list(node) if isinstance(node, dict) else list(range(len(node)))
        step = data.draw(st.sampled_from(steps))
        inner = node[step]
        if not isinstance(inner, dict | list) or not inner or data.draw(st.booleans()):
            break
        node = inner
    node[step] = data.draw(JSON_VALUES)
    path.write_bytes(seal(compact(body)) + blocks_of(good))
    try:
        with WeightStore.open(str(path), FINGERPRINT, BLOCKS) as store:
            store.verify()
            assert_holds(store, BLOCKS, fill(BLOCKS))
    except StoreError:
        pass


def test_replaced_and_deleted_stores_stay_what_they_were(path: Path) -> None:
    old, new = fill(BLOCKS, 1), fill(BLOCKS, 2)
    write(path, BLOCKS, old)
    with WeightStore.open(str(path), FINGERPRINT) as before:
        write(path, BLOCKS, new)
        assert_holds(before, BLOCKS, old)
        with WeightStore.open(str(path), FINGERPRINT) as after:
            path.unlink()
            assert_holds(after, BLOCKS, new)
            after.verify()


# ---- writing


def leftovers(path: Path) -> list[str]:
    return sorted(p.name for p in path.parent.iterdir() if p.name != f"{path.name}.lock")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_failed_writer_leaves_nothing(path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), StoreWriter(str(path), FINGERPRINT, BLOCKS) as writer:
        writer.write_block(0, fill(BLOCKS)[0])
        assert len(leftovers(path)) == 1 and path.name not in leftovers(path)
        raise error
    assert leftovers(path) == []
    write(path, BLOCKS, fill(BLOCKS))  # and the lock is free
    check(path)


def test_a_failed_writer_keeps_the_store_there_was(path: Path, good: bytes) -> None:
    with pytest.raises(RuntimeError), StoreWriter(str(path), FINGERPRINT, BLOCKS):
        raise RuntimeError
    assert leftovers(path) == [path.name] and path.read_bytes() == good


def test_blocks_must_come_once_whole_and_all(path: Path) -> None:
    content = fill(BLOCKS)
    with (
        pytest.raises(ValueError, match=r"2 blocks were not written, the first is 'layers\.0'"),
        StoreWriter(str(path), FINGERPRINT, BLOCKS) as writer,
    ):
        writer.write_block(1, content[1])
        with pytest.raises(ValueError, match=r"'layers\.1' is written twice"):
            writer.write_block(1, content[1])
        qkv = content[0]["qkv"]
        for change in ({"qkv": qkv.T}, {"qkv": qkv.half()}, {"other": qkv}):
            with pytest.raises(ValueError, match=r"layers\.0"):
                writer.write_block(0, content[0] | change)
        with pytest.raises(ValueError, match=r"layers\.0"):
            writer.write_block(0, {"qkv": qkv})
        for index in (-1, 3):
            with pytest.raises(IndexError):
                writer.write_block(index, content[0])
    assert leftovers(path) == []
    with pytest.raises(ValueError, match="not open"):
        writer.write_block(0, content[0])


def test_a_damaged_store_is_rebuilt_with_a_warning(
    path: Path, good: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    content = fill(BLOCKS)
    damage(path, len(good) - 1, 1)
    with caplog.at_level(logging.WARNING):
        writer = open_or_create(str(path), FINGERPRINT, BLOCKS)
    assert isinstance(writer, StoreWriter)
    assert "rebuilt (corrupted)" in caplog.text and "'head'" in caplog.text
    with writer:
        for index, tensors in enumerate(content):
            writer.write_block(index, tensors)
    store = open_or_create(str(path), FINGERPRINT, BLOCKS)
    assert isinstance(store, WeightStore)
    assert_holds(store, BLOCKS, content)
    store.close()


def test_a_store_that_cannot_be_read_is_not_replaced(path: Path) -> None:
    path.mkdir()
    with pytest.raises(StoreReadError):
        open_or_create(str(path), FINGERPRINT, BLOCKS)


def test_a_folder_that_cannot_be_written_is_named(path: Path) -> None:
    path.touch()
    with pytest.raises(StoreWriteError, match=r"cannot write .*inside\.store: File exists"):
        write(path / "inside.store", BLOCKS, fill(BLOCKS))


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def large(mib: int) -> tuple[BlockLayout, ...]:
    return tuple(
        BlockLayout(str(i), (TensorSpec("w", (1 << 20,), torch.uint8),)) for i in range(mib)
    )


def test_full_disk_is_found_before_anything_is_written(tiny_disk: Path) -> None:
    path = tiny_disk / "w.store"
    with pytest.raises(StoreWriteError) as error:
        write(path, large(3), [])
    message = str(error.value)
    assert (
        f"no room for the weight store in {tiny_disk}: it needs {3 * (1 << 20) + PAGE} bytes"
        in (message)
    )
    assert "are free (No space left on device)" in message
    assert leftovers(path) == []
    write(path, BLOCKS, fill(BLOCKS))  # the space was given back
    check(path)


def test_file_size_limit_leaves_nothing(path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(StoreWriteError, match="File too large"):
            write(path, large(3), [])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert leftovers(path) == []


def test_a_write_that_fails_midway_leaves_nothing(path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with (
            pytest.raises(StoreWriteError, match="File too large"),
            StoreWriter(str(path), FINGERPRINT, large(3)) as writer,
        ):
            writer.write_block(0, fill(large(1))[0])
            resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, hard))
            writer.write_block(2, fill(large(1))[0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert leftovers(path) == []


# ---- several processes


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What this file, run as a program of its own, saw its children do."""
    folder = tmp_path_factory.mktemp("processes")
    root = str(Path(__file__).parents[2])
    result = subprocess.run(
        [sys.executable, __file__, str(folder)],
        capture_output=True, text=True, timeout=60, env=os.environ | {"PYTHONPATH": root},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def killed(path: Path) -> dict[str, Any]:
    """Kill writers at random moments and record what lies in the folder after each."""
    rng, blocks = random.Random(0), large(8)
    content = fill(blocks)
    seen: dict[str, Any] = {"partial": 0, "finished": 0, "most": 0}
    for _ in range(40):
        child = os.fork()
        if child == 0:
            write(path, blocks, content)
            os._exit(0)
        time.sleep(rng.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        names = leftovers(path)
        seen["most"] = max(seen["most"], len(names))
        if path.name in names:
            seen["finished"] += 1
            with WeightStore.open(str(path), FINGERPRINT, blocks) as store:
                store.verify()
            path.unlink()
        if any(name.endswith(".partial") for name in names):
            seen["partial"] += 1
    write(path, blocks, content)
    seen["left"] = leftovers(path)
    return seen


def competing(path: Path) -> dict[str, Any]:
    """Let three processes want the same store at once; each says whether it wrote or found it."""
    children = []
    for _ in range(3):
        child = os.fork()
        if child == 0:
            got = open_or_create(str(path), FINGERPRINT, BLOCKS)
            if isinstance(got, WeightStore):
                assert_holds(got, BLOCKS, fill(BLOCKS))
                os._exit(10)
            with got:
                time.sleep(0.2)
                for index, tensors in enumerate(fill(BLOCKS)):
                    got.write_block(index, tensors)
            os._exit(20)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return {"codes": sorted(codes), "left": leftovers(path)}


def test_a_killed_writer_leaves_no_store_and_the_next_one_cleans_up(played: Any) -> None:
    seen = played["killed"]
    assert seen["partial"] >= 3, "no writer was killed while it wrote: the test proves nothing"
    assert seen["most"] <= 2  # each writer removed what the one before it left
    assert seen["left"] == ["killed.store"]


def test_competing_writers_take_turns(played: Any) -> None:
    assert played["competing"] == {"codes": [10, 10, 20], "left": ["competing.store"]}


if __name__ == "__main__":
    torch.set_num_threads(1)  # no thread may exist at a fork
    report = {}
    for play in (competing, killed):
        folder = Path(sys.argv[1]) / play.__name__
        folder.mkdir()
        report[play.__name__] = play(folder / f"{play.__name__}.store")
    print(json.dumps(report))
