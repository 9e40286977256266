# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Whatever ``--speculative-config`` holds, it is accepted or refused in one sentence.

Asked is the method of vLLM's `EngineArgs` that reads it, with the plugin's hook in it.
"""

import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from vllm import EngineArgs
from vllm.config import ModelConfig, ParallelConfig

from vllm_subspec.config import METHODS, DrafterOptions, shown
from vllm_subspec.engine.in_use import KEY
from vllm_subspec.engine.method import options_of
from vllm_subspec.plugin import register

MODEL = str(Path(__file__).resolve().parents[2] / "models" / "pystd-1m")
FOLDER = str(Path(__file__).parent)

Given = dict[Any, Any]

# Existing and not, file and folder, name and nonsense: none is asked of a model hub.
PATHS = [MODEL, FOLDER, __file__, "/", ".", "~", "", " ", "./no", "../no", "~no/such", "a/b/c"]
TEXTS = [*PATHS, "a\0b", "4" * 5000, "\ud800", "\n", '"', "auto", "none", "ngram", "model", "eagle"]
NUMBERS: list[float] = [-1, 0, 1, 2, 3, 8, 64, 65, 512, 513, 2**63, -(2**64), 10**400]
NUMBERS += [0.0, -0.0, 0.5, 1e308, 5e-324, float("nan"), float("inf"), True, False]
LEAVES = st.sampled_from([None, *NUMBERS, *TEXTS]) | st.integers(-2, 70) | st.text(max_size=4)
KEYS = st.sampled_from(TEXTS) | st.text(max_size=4)
BRANCHES = st.lists(LEAVES, max_size=3) | st.dictionaries(KEYS, LEAVES, max_size=3)
ANYTHING = LEAVES | BRANCHES | st.lists(BRANCHES, max_size=2) | st.dictionaries(KEYS, BRANCHES)


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


SMALL = st.integers(1, 64)
NGRAM = st.fixed_dictionaries(
    {"method": st.just("ngram")},
    optional={
        "depth": SMALL,
        "branching": SMALL,
        "nodes": SMALL,
        "prompt_lookup_min": st.integers(1, 5),
        "prompt_lookup_max": st.integers(5, 64),
    },
)
DRAFT_MODEL = st.fixed_dictionaries(
    {"method": st.just("draft_model"), "model": st.just(MODEL)},
    optional={"depth": SMALL, "branching": SMALL, "nodes": SMALL},
)
# Few with models: vLLM reads the configuration of each.
DRAFTERS = st.integers(0, 23).flatmap(lambda i: NGRAM if i else DRAFT_MODEL)
COMMON: dict[str, st.SearchStrategy[Any]] = {
    "num_speculative_tokens": st.integers(1, 512),
    "pruning": st.sampled_from(["dynamic", "none"]),
    "draft_temperature": st.floats(0.01, 10) | SMALL,
}
VALID: dict[str, st.SearchStrategy[Given]] = {
    "subspec": st.fixed_dictionaries(
        {},
        optional={
            **COMMON,
            "drafter": st.none() | DRAFTERS,
            "branching": SMALL,
            "depth": st.integers(1, 512),
            "bits": st.sampled_from([2, 3, 4, 8]),
            "group_size": st.sampled_from([None, 32, 64, 128, 256, -1]),
            "quantizer": st.sampled_from([None, "hqq", "rtn"]),
            "resident_weights_gib": st.just("auto") | st.floats(0, 1e6) | SMALL,
            "weight_source": st.sampled_from(["auto", "host", "disk"]),
            "store_dir": st.sampled_from([None, FOLDER, "stores/new"]),
            "ring_layers": st.none() | st.integers(2, 9),
            "substitute_layers": st.sampled_from(["auto", "all", [0], [2, 1]]),
        },
    ),
    "hierspec": st.fixed_dictionaries(
        {"drafter": DRAFTERS},
        optional={**COMMON, "intermediate": st.sampled_from([None] * 23 + [MODEL])},
    ),
}


@st.composite
def mutated(draw: st.DrawFn, method: str) -> Given:
    """Valid options of ``method``, some of them then changed: key, value, or a key too many."""
    options = dict(draw(VALID[method]))
    known = list(METHODS[method].model_fields)
    for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2]))):
        target, names = options, known
        if isinstance(options.get("drafter"), dict) and draw(st.booleans()):
            target = options["drafter"] = dict(options["drafter"])
            names = list(DrafterOptions.model_fields)
        change = draw(st.sampled_from(["value", "value", "value", "misspell", "key", "drop"]))
        if change == "value":
            target[draw(st.sampled_from(names))] = draw(ANYTHING)
        elif change == "misspell":
            name = draw(st.sampled_from(names))
            target[name.replace("_", "-") if draw(st.booleans()) else name[1:]] = draw(LEAVES)
        elif change == "key":
            target[draw(KEYS | st.integers() | st.none())] = draw(LEAVES)
        elif target:
            del target[draw(st.sampled_from(list(target)))]
    return {"method": method, **options}


@pytest.fixture(scope="module")
def model() -> ModelConfig:
    register()
    return EngineArgs(MODEL, max_model_len=128).create_model_config()


def configure(model: ModelConfig, given: Any) -> EngineArgs:
    args = EngineArgs(MODEL, max_model_len=128)
    args.speculative_config = given
    args.create_speculative_config(model, ParallelConfig())
    return args


def refusal(model: ModelConfig, given: Any) -> str | None:
    """The sentence with which ours is refused; None if it is accepted, and then it travels whole.

    Raises what is neither: any error but a ValueError, or one that is no sentence.
    """
    try:
        args = configure(model, given)
    except ValueError as error:
        message = str(error)
        assert not isinstance(error, ValidationError)
        assert re.fullmatch(r"[^\n]{20,1200}", message), message
        assert re.match(r'speculative_config (key|has no key) "|method "', message), message
        return message
    travelling = json.loads(json.dumps(args.additional_config))
    options = options_of(SimpleNamespace(additional_config=travelling))
    assert options is not None
    assert {"method": options.METHOD, **options.to_json_dict()} == travelling[KEY]
    assert_is_what_was_given(travelling[KEY], given)
    return None


REWRITTEN = {"drafter", "store_dir", "substitute", "intermediate", "substitute_layers"}
"""Mappings, paths and lists: they travel in another form."""


def assert_is_what_was_given(travelling: Given, given: Given) -> None:
    asked = {str(name).replace("-", "_"): value for name, value in given.items()}
    for name in asked.keys() - REWRITTEN:
        assert travelling[name] == asked[name], name
    inner = asked.get("drafter")
    if isinstance(inner, dict):
        for name in inner.keys() - {"model"}:
            assert travelling["drafter"][name] == inner[name], name


OURS = settings(
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@pytest.mark.parametrize("method", METHODS)
def test_near_valid_options(model: ModelConfig, method: str) -> None:
    outcomes: Counter[bool] = Counter()
    inner_keys = (f"drafter.{name}" for name in DrafterOptions.model_fields)
    keys = [*METHODS[method].model_fields, *inner_keys]

    @settings(OURS, max_examples=900)
    @given(mutated(method))
    def ask(given: Given) -> None:
        message = refusal(model, given)
        outcomes[message is None] += 1
        if message is not None:  # it names what was given, or a key that is missing
            inner = given.get("drafter")
            unknown = [str(key).replace("-", "_") for key in given]
            unknown += [f"drafter.{key}" for key in (inner if isinstance(inner, dict) else ())]
            named = [*keys, *(shown(key)[1:-1] for key in unknown)]
            assert any(f'"{name}"' in message for name in named), message

    ask()
    assert min(outcomes[True], outcomes[False]) > 150, outcomes


@settings(OURS, max_examples=300)
@given(method=st.sampled_from(list(METHODS)), options=st.dictionaries(KEYS, ANYTHING, max_size=4))
def test_arbitrary_options(model: ModelConfig, method: str, options: Given) -> None:
    refusal(model, {**options, "method": method})


@settings(OURS, max_examples=100)
@given(ANYTHING.filter(lambda value: value is not None))
def test_arbitrary_json(model: ModelConfig, given: Any) -> None:
    """Of no method of ours: the refusal is vLLM's, which is pydantic's or an accident."""
    with pytest.raises(ValueError if isinstance(given, dict) else Exception):
        configure(model, given)


@pytest.mark.parametrize("given", ["subspec", '{"method": "hierspec"}', "subspec" * 99])
def test_our_methods_in_no_mapping(model: ModelConfig, given: str) -> None:
    with pytest.raises(ValueError) as caught:
        configure(model, given)
    assert re.fullmatch(r"--speculative-config is [^\n]{1,200}", str(caught.value))


@settings(OURS, max_examples=50)
@given(ANYTHING.filter(lambda value: value not in ("subspec", "hierspec", None)))
def test_arbitrary_methods(model: ModelConfig, method: Any) -> None:
    with pytest.raises(ValueError):
        configure(model, {"method": method})


@pytest.mark.parametrize(
    "value", [nested(50), nested(900), nested(100_000), 10**5000], ids=["50", "900", "1e5", "long"]
)
def test_what_python_itself_refuses_to_print(model: ModelConfig, value: Any) -> None:
    for key in ("bits", "drafter", "substitute_layers", "store_dir", "draft_temperature"):
        message = refusal(model, {"method": "subspec", key: value})
        assert message is not None and f'key "{key}" is ' in message
