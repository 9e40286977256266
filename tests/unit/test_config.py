# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from vllm_subspec.config import SubspecOptions


def test_defaults() -> None:
    options = SubspecOptions.parse({})
    assert options.num_speculative_tokens == 128
    assert (options.branching, options.depth, options.pruning) == (6, 48, "dynamic")
    assert (options.bits, options.group_size, options.quantizer) == (4, None, None)
    assert options.resident_weights_gib == "auto"
    assert (options.weight_source, options.store_dir, options.ring_layers) == ("auto", None, None)
    assert options.draft_temperature == 0.2
    assert (options.substitute, options.substitute_layers) == (None, "auto")


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"num_speculative_tokens": 512, "branching": 64, "depth": 512, "pruning": "none"},
        {"num_speculative_tokens": 1, "branching": 1, "depth": 1, "pruning": "dynamic"},
        {"num_speculative_tokens": 128, "bits": 8, "group_size": -1, "quantizer": "rtn"},
        {"resident_weights_gib": 0, "weight_source": "disk", "ring_layers": 2},
        {"resident_weights_gib": 2.5, "draft_temperature": 1, "substitute_layers": [3, 0]},
        {"substitute": "owner/model-awq", "substitute_layers": "all"},
    ],
)
def test_json_round_trip(given: dict[str, Any]) -> None:
    options = SubspecOptions.parse(given)
    text = json.dumps(options.to_json_dict(), sort_keys=True)
    again = SubspecOptions.parse(json.loads(text))
    assert again == options
    assert hash(again) == hash(options)
    assert json.dumps(again.to_json_dict(), sort_keys=True) == text


def test_frozen() -> None:
    options = SubspecOptions.parse({})
    with pytest.raises(ValidationError):
        options.bits = 8


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_speculative_tokens", 0),
        ("num_speculative_tokens", 513),
        ("num_speculative_tokens", "48"),
        ("num_speculative_tokens", 4.5),
        ("num_speculative_tokens", True),
        ("num_speculative_tokens", None),
        ("branching", 0),
        ("branching", 65),
        ("branching", 1.0),
        ("branching", "6"),
        ("branching", True),
        ("branching", None),
        ("depth", 0),
        ("depth", 513),
        ("depth", "48"),
        ("pruning", "x"),
        ("pruning", "Dynamic"),
        ("pruning", False),
        ("pruning", None),
        ("bits", 5),
        ("bits", "4"),
        ("bits", [4]),
        ("group_size", 48),
        ("group_size", 0),
        ("quantizer", "gptq"),
        ("resident_weights_gib", -1),
        ("resident_weights_gib", "most"),
        ("resident_weights_gib", float("nan")),
        ("resident_weights_gib", float("inf")),
        ("resident_weights_gib", None),
        ("weight_source", "nvme"),
        ("store_dir", 3),
        ("store_dir", ""),
        ("store_dir", "/dev/null"),
        ("ring_layers", 1),
        ("ring_layers", 2.5),
        ("draft_temperature", 0),
        ("draft_temperature", "cold"),
        ("substitute", "/no/such/checkpoint"),
        ("substitute", "./no-such-checkpoint"),
        ("substitute", ""),
        ("substitute_layers", "none"),
        ("substitute_layers", []),
        ("substitute_layers", [1, 1]),
        ("substitute_layers", [-1]),
        ("substitute_layers", [0.5]),
        ("substitute_layers", 3),
    ],
)
def test_impossible_value_is_one_sentence(key: str, value: object) -> None:
    with pytest.raises(ValueError) as caught:
        SubspecOptions.parse({key: value})
    message = str(caught.value)
    assert message.startswith(f'speculative_config key "{key}" is {value!r}; allowed: ')
    assert message.removesuffix("...").split("allowed: ")[1] == (
        SubspecOptions.model_fields[key].description
    )
    assert "\n" not in message
    assert not isinstance(caught.value, ValidationError)


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("bit", "bits"),
        ("num_speculative_token", "num_speculative_tokens"),
        ("branch", "branching"),
        ("dept", "depth"),
        ("prune", "pruning"),
        ("storedir", "store_dir"),
        ("resident_weight_gb", "resident_weights_gib"),
        ("substitute_layer", "substitute_layers"),
    ],
)
def test_unknown_key_names_the_nearest(key: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f'no key "{key}" .*did you mean "{nearest}"') as caught:
        SubspecOptions.parse({key: 1, "bits": 5})
    assert "\n" not in str(caught.value)


def test_unknown_key_like_none_lists_the_known() -> None:
    with pytest.raises(ValueError, match='no key "zzz".*known: num_speculative_tokens, pruning'):
        SubspecOptions.parse({"zzz": 1})


@pytest.mark.parametrize("extra", [{"bits": 8}, {"group_size": 128}, {"quantizer": "rtn"}])
def test_substitute_contradicts_quantisation(extra: dict[str, Any], tmp_path: Path) -> None:
    key = next(iter(extra))
    with pytest.raises(ValueError, match=f'key "{key}" is .*"substitute"') as caught:
        SubspecOptions.parse({"substitute": str(tmp_path), **extra})
    assert "\n" not in str(caught.value)


def test_local_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "low").mkdir()
    options = SubspecOptions.parse({"substitute": "low", "store_dir": "stores/a"})
    assert options.substitute == str(tmp_path / "low")
    assert options.store_path() == tmp_path / "stores" / "a"


def test_store_defaults_to_the_cache_of_vllm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    assert SubspecOptions.parse({}).store_path() == tmp_path / "subspec"
