# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from vllm_subspec.config import METHODS, HierspecOptions, SubspecOptions


def test_defaults() -> None:
    options = SubspecOptions.parse({})
    assert options.num_speculative_tokens == 128
    assert (options.branching, options.depth, options.pruning) == (6, 48, "dynamic")
    assert (options.bits, options.group_size, options.quantizer) == (4, None, None)
    assert options.resident_weights_gib == "auto"
    assert (options.weight_source, options.store_dir, options.ring_layers) == ("auto", None, None)
    assert options.draft_temperature == 0.2
    assert options.drafter is not None
    assert (options.drafter.method, options.drafter.branching) == ("ngram", 1)
    assert SubspecOptions.parse({"branching": 1}).trees == []
    assert SubspecOptions.parse({"branching": 6}).drafter is None
    wide = {"drafter": {"method": "ngram", "branching": 2}}
    assert SubspecOptions.parse(wide).trees == ["branching", "drafter.branching"]
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
        ("store_dir", "a\0b"),
        ("ring_layers", 1),
        ("ring_layers", 2.5),
        ("draft_temperature", 0),
        ("draft_temperature", "cold"),
        ("substitute", "/no/such/checkpoint"),
        ("substitute", "./no-such-checkpoint"),
        ("substitute", ""),
        ("substitute", "a\0b"),
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


NGRAM = {"method": "ngram"}


@pytest.mark.parametrize("method", METHODS)
def test_a_hierarchy_survives_a_round_trip(method: str) -> None:
    given = {"drafter": {**NGRAM, "depth": 5, "prompt_lookup_max": 7}, "min_draft_length": 9}
    options = METHODS[method].parse(given)
    assert options.sequence_length == 9
    assert METHODS[method].parse(json.loads(json.dumps(options.to_json_dict()))) == options


def test_a_drafter_with_a_model_survives_a_round_trip(tmp_path: Path) -> None:
    given = {"drafter": {"method": "eagle3", "model": str(tmp_path)}, "intermediate": str(tmp_path)}
    options = HierspecOptions.parse(given)
    assert HierspecOptions.parse(json.loads(json.dumps(options.to_json_dict()))) == options
    assert options.lookahead == options.num_speculative_tokens + 30


def test_nodes_bound_what_the_target_verifies_of_a_tree() -> None:
    options = HierspecOptions.parse({"drafter": {**NGRAM, "nodes": 12}})
    assert (options.limit, options.lookahead) == (12, options.num_speculative_tokens)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({}, 'key "drafter" is missing; allowed: a mapping'),
        ({"drafter": "ngram"}, "key \"drafter\" is 'ngram'; allowed: a mapping"),
        ({"drafter": {}}, 'key "drafter.method" is missing; allowed: "ngram"'),
        ({"drafter": {"method": "medusa"}}, "key \"drafter.method\" is 'medusa'; allowed: "),
        ({"drafter": {**NGRAM, "deph": 3}}, 'no key "drafter.deph" .*did you mean "drafter.depth"'),
        ({"drafter": {**NGRAM, "depth": 0}}, 'key "drafter.depth" is 0; allowed: an integer'),
        ({"drafter": {**NGRAM, "model": "some/model"}}, '"drafter.model" is set, but "ngram"'),
        ({"drafter": {"method": "eagle"}}, '"drafter.model" is missing: "eagle" needs'),
        (
            {"drafter": {"method": "eagle", "model": "./nowhere"}},
            "key \"drafter.model\" is './nowhere'; allowed: an existing directory",
        ),
        ({"drafter": NGRAM, "intermediate": "./no"}, "key \"intermediate\" is './no'; allowed: "),
        (
            {"drafter": {**NGRAM, "prompt_lookup_min": 9}},
            '"drafter.prompt_lookup_min" is 9; allowed: up to "prompt_lookup_max", 5',
        ),
        (
            {"drafter": {"method": "eagle", "model": "a/b", "prompt_lookup_max": 9}},
            '"drafter.prompt_lookup_max" is for the method "ngram", not "eagle"',
        ),
        (
            {"drafter": NGRAM, "min_draft_length": 40},
            '"min_draft_length" is 40; allowed: up to "num_speculative_tokens", 32',
        ),
    ],
    ids=str,
)
def test_a_wrong_hierarchy_is_one_sentence(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        HierspecOptions.parse(given)
    assert "\n" not in str(caught.value)


def test_a_sequence_needs_a_drafter() -> None:
    with pytest.raises(ValueError, match='"min_draft_length" is for a hierarchy: set "drafter"'):
        SubspecOptions.parse({"drafter": None, "min_draft_length": 4})
