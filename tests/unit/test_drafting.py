# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""The options reach the drafters: none of these is its default."""

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_subspec.config import HierspecOptions, SubspecOptions
from vllm_subspec.core.depth import DepthController, FullGrowth
from vllm_subspec.core.sequence import FixedSequence, SequenceController
from vllm_subspec.engine import drafting
from vllm_subspec.engine.coverage import OwnCoverage
from vllm_subspec.engine.drafting import Models

NGRAM: dict[str, Any] = {
    "method": "ngram",
    "depth": 7,
    "branching": 4,
    "nodes": 19,
    "prompt_lookup_min": 3,
    "prompt_lookup_max": 9,
}
BOTH: dict[str, Any] = {"draft_temperature": 0.7, "num_speculative_tokens": 40}
MODEL: dict[str, Any] = {k: v for k, v in NGRAM.items() if not k.startswith("prompt")}
MODEL |= {"method": "draft_model", "model": "owner/small"}

Made = list[dict[str, Any]]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> dict[str, Made]:
    """By class of drafter, what each was made with."""
    calls: dict[str, Made] = {}

    def spy(name: str) -> None:
        drafter = getattr(drafting, name)
        signature = inspect.signature(drafter)

        def make(*args: Any) -> Any:
            calls.setdefault(name, []).append(signature.bind(*args).arguments)
            return drafter(*args)

        monkeypatch.setattr(drafting, name, make)

    for name in ("NgramDrafter", "ModelDrafter", "Hierarchy"):
        spy(name)
    return calls


def models(options: SubspecOptions | HierspecOptions, intermediate: bool = True) -> Models:
    runner: Any = SimpleNamespace(device=torch.device("cpu"), layers_of=list)
    found = Models(runner, options, None)
    if intermediate:
        model: Any = SimpleNamespace(layers=frozenset())
        found._intermediate = model, OwnCoverage()
    return found


def assert_ngram(given: dict[str, Any]) -> None:
    assert (given["shortest"], given["longest"], given["branching"]) == (3, 9, 4)
    assert given["growth"].max_steps == 7


@pytest.mark.parametrize(
    ("pruning", "growth"), [("dynamic", DepthController), ("none", FullGrowth)]
)
def test_lookups_alone(made: dict[str, Made], pruning: Any, growth: type) -> None:
    options = HierspecOptions.parse({"drafter": NGRAM, **BOTH})
    drafter = models(options, intermediate=False).drafter(5, 11, pruning, hierarchy=True)
    assert made.keys() == {"NgramDrafter"}
    assert_ngram(*made["NgramDrafter"])
    assert type(drafter.growth) is growth  # type: ignore[attr-defined]


@pytest.mark.parametrize("options", [SubspecOptions, HierspecOptions])
@pytest.mark.parametrize(
    ("pruning", "growth", "sequence"),
    [
        ("dynamic", DepthController, SequenceController),
        ("none", FullGrowth, FixedSequence),
    ],
)
def test_a_hierarchy(
    made: dict[str, Made], options: Any, pruning: Any, growth: type, sequence: type
) -> None:
    parsed = options.parse({"drafter": NGRAM, **BOTH, "min_draft_length": 13})
    models(parsed).drafter(5, 22, pruning, hierarchy=True)
    assert made.keys() == {"NgramDrafter", "Hierarchy"}
    assert_ngram(*made["NgramDrafter"])
    assert type(made["NgramDrafter"][0]["growth"]) is growth
    (given,) = made["Hierarchy"]
    assert (given["nodes"], given["draft_temperature"]) == (19, 0.7)
    assert (given["growth"].max_steps, given["growth"].least) == (22, 13)
    assert type(given["growth"]) is sequence
    assert given["device"] == torch.device("cpu")


@pytest.mark.parametrize(
    ("options", "given", "depth", "least"),
    [
        (SubspecOptions, {}, 48, 24),
        (HierspecOptions, {}, 48, 6),
        (SubspecOptions, {"num_speculative_tokens": 16}, 48, 16),
        (SubspecOptions, {"min_draft_length": 3}, 48, 3),
        (SubspecOptions, {"min_draft_length": 30}, 48, 30),
        (SubspecOptions, {"min_draft_length": 30}, 9, 9),
    ],
)
def test_how_long_a_sequence_begins(
    made: dict[str, Made], options: Any, given: dict[str, Any], depth: int, least: int
) -> None:
    models(options.parse({"drafter": NGRAM, **given})).drafter(5, depth, "none", hierarchy=True)
    assert made["Hierarchy"][0]["growth"].least == least


def test_trees_of_the_substitute(made: dict[str, Made]) -> None:
    without = SubspecOptions.parse({**BOTH, "drafter": None})
    beside = SubspecOptions.parse({**BOTH, "drafter": NGRAM})
    models(without).drafter(5, 11, "none", hierarchy=True)
    models(beside).drafter(5, 11, "none", hierarchy=False)
    assert made.keys() == {"ModelDrafter"}
    for given in made["ModelDrafter"]:
        assert (given["branching"], given["draft_temperature"]) == (5, 0.7)
        assert given["growth"].max_steps == 11 and type(given["growth"]) is FullGrowth


def test_trees_of_a_draft_model(made: dict[str, Made]) -> None:
    parsed = models(HierspecOptions.parse({"drafter": MODEL, **BOTH}))
    inner: Any = SimpleNamespace()
    parsed._inner = inner
    parsed.drafter(5, 11, "dynamic", hierarchy=True)
    assert made.keys() == {"ModelDrafter", "Hierarchy"}
    (given,) = made["ModelDrafter"]
    assert given["model"] is inner
    assert (given["branching"], given["draft_temperature"]) == (4, 0.7)
    assert given["growth"].max_steps == 7 and type(given["growth"]) is DepthController


def test_without_a_hierarchy_nothing_drafts() -> None:
    alone = models(HierspecOptions.parse({"drafter": NGRAM}), intermediate=False)
    with pytest.raises(ValueError) as refused:
        alone.drafter(5, 11, "none", hierarchy=False)
    assert str(refused.value) == '"hierarchy" is False, but there is no "intermediate" to draft'
