# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_subspec.core.plan import (
    GIB,
    Budget,
    MemoryPlan,
    ModelSizes,
    overlapped_bound,
    plan_memory,
    serial_bound,
)

# 28 layers of 466 MB, as in a 7B model, with 4-bit substitutes.
SEVEN_B = ModelSizes([466_000_000] * 28, [131_000_000] * 28, 2_180_000_000, 57_344, 300_000_000)


@st.composite
def models(draw: st.DrawFn) -> tuple[ModelSizes, Budget, dict[str, Any]]:
    layers = draw(st.lists(st.integers(1, 1000), min_size=1, max_size=12))
    substitutes = [draw(st.integers(1, size)) for size in layers]
    sizes = ModelSizes(layers, substitutes, draw(st.integers(0, 500)), 1, draw(st.integers(0, 100)))
    budget = Budget(draw(st.integers(0, 15_000)), draw(st.integers(0, 500)))
    layer = st.integers(0, len(layers) - 1)
    options = {
        "ring_layers": draw(st.none() | st.integers(2, 6)),
        "substitute_layers": draw(
            st.sampled_from(["auto", "all"]) | st.lists(layer, min_size=1, unique=True)
        ),
    }
    return sizes, budget, options


def brute_force(sizes: ModelSizes, budget: Budget, options: dict[str, Any], streamed: int) -> int:
    """Least bytes with the first ``streamed`` layers streamed, written out by hand."""
    total = sizes.other + sizes.workspace + budget.kv_tokens * sizes.kv_per_token
    extra = options["substitute_layers"]
    for layer, (full, low) in enumerate(zip(sizes.layers, sizes.substitutes, strict=True)):
        if layer >= streamed:
            total += full
        if layer < streamed or extra == "all" or (extra != "auto" and layer in extra):
            total += low
    slots = min(options["ring_layers"] or 2, streamed)
    return total + slots * max([0, *sizes.layers[:streamed]])


def plan_or_none(sizes: ModelSizes, budget: Budget, options: dict[str, Any]) -> MemoryPlan | None:
    try:
        return plan_memory(sizes, budget, **options)
    except ValueError:
        return None


@given(models())
def test_fits_and_is_maximal(model: tuple[ModelSizes, Budget, dict[str, Any]]) -> None:
    sizes, budget, options = model
    count = len(sizes.layers)
    fits = [s for s in range(count + 1) if brute_force(sizes, budget, options, s) <= budget.device]
    plan = plan_or_none(sizes, budget, options)
    if not fits:
        assert plan is None
        return
    assert plan is not None
    assert plan.total <= budget.device
    assert len(plan.streamed) == min(fits)  # one more resident layer would not fit
    assert plan.streamed + plan.resident == tuple(range(count))
    assert set(plan.streamed) <= set(plan.substituted)
    assert plan.store_bytes == sum(sizes.layers[i] for i in plan.streamed)
    assert plan.ring_layers == 0 if not plan.streamed else plan.ring_layers >= 1
    if options["ring_layers"] is not None:
        assert plan.ring_layers == min(options["ring_layers"], len(plan.streamed))
    # The parts add up to what was counted by hand, but for what is taken from the rest.
    spare = plan.total - brute_force(sizes, budget, options, len(plan.streamed))
    if plan.streamed:
        slot = max(sizes.layers[i] for i in plan.streamed)
        least = min(options["ring_layers"] or 2, len(plan.streamed))
        assert spare == (plan.ring_layers - least) * slot
    elif options["substitute_layers"] == "auto":
        assert plan.substituted == tuple(range(len(plan.substituted)))
        assert spare == sum(sizes.substitutes[i] for i in plan.substituted)
        if len(plan.substituted) < count:
            assert plan.total + sizes.substitutes[len(plan.substituted)] > budget.device


@given(models(), st.integers(0, 2000))
def test_more_memory_never_means_fewer_resident_layers(
    model: tuple[ModelSizes, Budget, dict[str, Any]], more: int
) -> None:
    sizes, budget, options = model
    plan = plan_or_none(sizes, budget, options)
    if plan is not None:
        larger = plan_memory(sizes, Budget(budget.device + more, budget.kv_tokens), **options)
        assert len(larger.resident) >= len(plan.resident)


@given(models(), st.floats(0, 10_000))
def test_a_number_keeps_that_much(
    model: tuple[ModelSizes, Budget, dict[str, Any]], limit: float
) -> None:
    sizes, budget, options = model
    large = Budget(10**6, budget.kv_tokens)
    plan = plan_memory(sizes, large, resident_weights_gib=limit / GIB, **options)
    assert plan.resident_bytes <= limit
    if plan.streamed:
        assert plan.resident_bytes + sizes.layers[plan.streamed[-1]] > int(limit / GIB * GIB)


def test_zero_streams_every_layer_whatever_the_budget() -> None:
    plan = plan_memory(SEVEN_B, Budget(80 * GIB, 2048), resident_weights_gib=0)
    assert plan.resident == ()
    assert plan.substituted == plan.streamed == tuple(range(28))
    assert plan.ring_layers == 4


def test_published_configuration_fits_in_eight_gb() -> None:
    """A 7B model in 8 GB: every layer but a few is streamed, with a ring of two layers."""
    plan = plan_memory(SEVEN_B, Budget(8_000_000_000, 2048))
    assert plan.ring_layers == 2
    assert plan.resident == (26, 27)
    assert plan.total <= 8_000_000_000 < plan.total + 466_000_000 - 131_000_000


def test_everything_resident_when_it_fits_without_substitutes() -> None:
    needed = sum(SEVEN_B.layers) + SEVEN_B.other + SEVEN_B.workspace
    plan = plan_memory(SEVEN_B, Budget(needed, 0))
    assert (plan.streamed, plan.substituted, plan.ring_layers) == ((), (), 0)
    plan = plan_memory(SEVEN_B, Budget(needed + 10 * GIB, 0))
    assert plan.substituted == tuple(range(28))
    assert plan_memory(SEVEN_B, Budget(needed - 1, 0)).streamed


def test_shortage_is_one_sentence_with_numbers() -> None:
    with pytest.raises(ValueError, match=r"needs 6\.70 GiB .*short by 2\.70 GiB") as caught:
        plan_memory(SEVEN_B, Budget(4 * GIB, 2048))
    assert "\n" not in str(caught.value)
    assert "resident_weights_gib" not in str(caught.value)
    with pytest.raises(ValueError, match='smaller "resident_weights_gib"'):
        plan_memory(SEVEN_B, Budget(8 * GIB, 2048), resident_weights_gib=6)


def test_inconsistent_input_is_refused() -> None:
    with pytest.raises(ValueError, match="2 layers but 1 substitutes"):
        plan_memory(ModelSizes([1, 1], [1], 0, 0, 0), Budget(9, 0))
    with pytest.raises(ValueError, match="layer 28"):
        plan_memory(SEVEN_B, Budget(80 * GIB, 0), substitute_layers=[3, 28])


def test_describe_lists_every_part() -> None:
    plan = plan_memory(SEVEN_B, Budget(8_000_000_000, 2048))
    lines = dict(line.rsplit(maxsplit=2)[:2] for line in plan.describe().splitlines())
    assert float(lines["total"]) == pytest.approx(plan.total / GIB, abs=1e-3)
    assert float(lines["26 substitutes"]) == pytest.approx(26 * 131e6 / GIB, abs=1e-3)
    assert float(lines["store of 26 streamed layers"]) == pytest.approx(26 * 466e6 / GIB, abs=1e-3)


def test_bounds() -> None:
    assert overlapped_bound(28.35, 0.58, 0.5) == pytest.approx(28.35 / 0.58)
    assert serial_bound(28.35, 0.58, 0.58) == pytest.approx(24.44, abs=0.01)
