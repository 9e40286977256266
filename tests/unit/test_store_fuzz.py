# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""A weight store is data: whatever bytes it holds, it is refused in one sentence or gives exactly
the tensors that were written, and it never makes us allocate, wait or run anything.

The header's checksum keeps accidents out, not attacks, so most of the fuzzed headers are sealed
anew. The blocks' checksums lie in the header.
"""

import json
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_subspec.weights.host_memory import forget_peak, peak_memory
from vllm_subspec.weights.store import (
    BlockLayout,
    StoreError,
    StoreWriter,
    TensorSpec,
    WeightStore,
    aligned_buffer,
)
from vllm_subspec.weights.store_format import MAGIC, PAGE, PREAMBLE

FINGERPRINT: dict[str, str | int] = {"model": "example", "rank": 0}
BLOCKS = tuple(
    BlockLayout(
        f"layers.{i}",
        (
            TensorSpec("qkv", (48, 40), torch.bfloat16),
            TensorSpec("up", (9, 7 + i), torch.float32),
        ),
    )
    for i in range(3)
)
HUGE = [-(2**63), -1, 0, 1, 2**31, 2**48 - 1, 2**62, 2**63, 10**30]

MOST_MEMORY = 96 << 20
"""Bytes that all of it may add to this process; the smallest lie about a size claims far more."""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, list[dict[str, bytes]]]:
    """A sound store's bytes, and its tensors'."""
    path = tmp_path_factory.mktemp("sound") / "w.store"
    g = torch.Generator().manual_seed(0)
    content = []
    with StoreWriter(str(path), FINGERPRINT, BLOCKS) as writer:
        for index, block in enumerate(BLOCKS):
            tensors = {
                spec.name: torch.randint(0, 256, (spec.nbytes,), generator=g, dtype=torch.uint8)
                for spec in block.tensors
            }
            views = {
                spec.name: tensors[spec.name].view(spec.dtype).view(spec.shape)
                for spec in block.tensors
            }
            writer.write_block(index, views)
            content.append({name: bytes(raw.numpy()) for name, raw in tensors.items()})
    return path.read_bytes(), content


def outcome(path: Path, content: list[dict[str, bytes]]) -> str:
    """``"sound"``, or why the file is refused. Anything else fails the test."""
    try:
        # First by what the file itself says; then the engine says what it expects.
        for expected in (None, BLOCKS):
            with WeightStore.open(str(path), FINGERPRINT, expected) as store:
                store.verify()
                got = tensors_of(store)
        assert got == content
    except StoreError as error:
        message = str(error)
        assert len(message) < 600 + len(str(path)) and "\n" not in message, message
        return error.reason
    return "sound"


def tensors_of(store: WeightStore) -> list[dict[str, bytes]]:
    found = []
    with store.open_reader() as reader:
        for index, block in enumerate(store.blocks):
            buffer = aligned_buffer(block.nbytes)
            reader.read(index, buffer)
            views = block.views(buffer).items()
            found.append({name: bytes(v.flatten().view(torch.uint8).numpy()) for name, v in views})
    return found


def header_of(raw: bytes) -> tuple[Any, bytes]:
    """The header's JSON, and the blocks."""
    length = struct.unpack_from("<I", raw, 12)[0]
    start = -(-(PREAMBLE.size + length) // PAGE) * PAGE
    return json.loads(raw[PREAMBLE.size : PREAMBLE.size + length]), raw[start:]


def sealed(text: bytes, blocks: bytes) -> bytes:
    """A file with a right header checksum around any text."""
    size = -(-(PREAMBLE.size + len(text)) // PAGE) * PAGE
    rest = text.ljust(size - PREAMBLE.size, b"\0")
    digest = xxhash.xxh3_64_intdigest(PREAMBLE.pack(MAGIC, 1, len(text), 0) + rest)
    return PREAMBLE.pack(MAGIC, 1, len(text), digest) + rest + blocks


def compact(body: Any) -> bytes:
    return json.dumps(body, separators=(",", ":"), sort_keys=True).encode()


# ---- what is done to the bytes


def flip(data: st.DataObject, raw: bytes) -> bytes:
    at = data.draw(st.integers(0, len(raw) * 8 - 1))
    changed = bytearray(raw)
    changed[at // 8] ^= 1 << at % 8
    return bytes(changed)


def cut(data: st.DataObject, raw: bytes) -> bytes:
    return raw[
        : data.draw(st.integers(0, len(raw) - 1) | st.sampled_from(range(0, len(raw), PAGE)))
    ]


def extend(data: st.DataObject, raw: bytes) -> bytes:
    return raw + bytes(data.draw(st.sampled_from([1, 511, PAGE, 2 * PAGE])))


def zero(data: st.DataObject, raw: bytes) -> bytes:
    """A page that was reserved and never written."""
    at = data.draw(st.sampled_from(range(0, len(raw), PAGE)))
    return raw[:at] + bytes(PAGE) + raw[at + PAGE :]


def swap(data: st.DataObject, raw: bytes) -> bytes:
    """Two pages in each other's place."""
    pages = [raw[at : at + PAGE] for at in range(0, len(raw), PAGE)]
    i, j = (data.draw(st.integers(0, len(pages) - 1)) for _ in range(2))
    pages[i], pages[j] = pages[j], pages[i]
    return b"".join(pages)


def claim(data: st.DataObject, raw: bytes) -> bytes:
    """Another number among the fields before the JSON."""
    at = data.draw(st.sampled_from([8, 12, 16, 20]))
    value = data.draw(st.sampled_from([0, 1, 2, 23, 2**24, 2**31, 2**32 - 1]))
    return raw[:at] + struct.pack("<I", value) + raw[at + 4 :]


def nodes(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything in a JSON value."""
    if not isinstance(value, dict | list):
        return []
    found = []
    for key in value if isinstance(value, dict) else range(len(value)):
        found += [(value, key), *nodes(value[key])]
    return found


JSON = st.recursive(
    st.none() | st.booleans() | st.sampled_from(HUGE) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


def header(data: st.DataObject, raw: bytes) -> bytes:
    """One value of the header is another one: of any kind, huge, negative, a neighbour's."""
    body, blocks = header_of(raw)
    places = nodes(body)
    holder, key = data.draw(st.sampled_from(places))
    other, its = data.draw(st.sampled_from(places))
    holder[key] = data.draw(
        JSON | st.sampled_from(HUGE) | st.just(json.loads(json.dumps(other[its])))
    )
    return sealed(compact(body), blocks)


def forget(data: st.DataObject, raw: bytes) -> bytes:
    """A value too few, or twice."""
    body, blocks = header_of(raw)
    holder, key = data.draw(st.sampled_from(nodes(body)))
    if isinstance(holder, list) and data.draw(st.booleans()):
        holder.insert(key, holder[key])
    else:
        del holder[key]
    return sealed(compact(body), blocks)


def text(data: st.DataObject, raw: bytes) -> bytes:
    """What is no JSON, or no longer."""
    body, blocks = header_of(raw)
    whole = compact(body)
    at = data.draw(st.integers(0, len(whole)))
    junk = data.draw(
        st.binary(max_size=8)
        | st.sampled_from([b"[" * 5000, b'{"a":' * 5000, b"9" * 9000, b"NaN", b" ", b"\0"])
    )
    return sealed(whole[:at] + junk + whole[at:], blocks)


CHANGES: dict[str, Callable[[st.DataObject, bytes], bytes]] = {
    change.__name__: change
    for change in (flip, cut, extend, zero, swap, claim, header, forget, text)
}


@pytest.mark.parametrize("change", CHANGES)
def test_damage_is_refused_or_harmless(
    written: tuple[bytes, list[dict[str, bytes]]], tmp_path: Path, change: str
) -> None:
    raw, content = written
    path = tmp_path / "w.store"
    seen: Counter[str] = Counter()
    forget_peak()
    before = peak_memory()

    @settings(
        database=None,
        max_examples=250,
        suppress_health_check=[HealthCheck.data_too_large, HealthCheck.too_slow],
    )
    @given(data=st.data())
    def damage(data: st.DataObject) -> None:
        changed = CHANGES[change](data, raw)
        path.write_bytes(changed)
        found = outcome(path, content)
        seen[found] += 1
        assert (found == "sound") <= (changed == raw)  # every byte counts

    damage()
    assert seen.total() - seen["sound"] > 2, seen
    assert peak_memory() < before + MOST_MEMORY


def test_what_is_damaged_above_was_sound(
    written: tuple[bytes, list[dict[str, bytes]]], tmp_path: Path
) -> None:
    raw, content = written
    body, blocks = header_of(raw)
    path = tmp_path / "w.store"
    for same in (raw, sealed(compact(body), blocks)):
        path.write_bytes(same)
        assert outcome(path, content) == "sound"
