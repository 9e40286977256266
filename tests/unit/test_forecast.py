# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""The published runs, from the models' configurations, bandwidths and tokens per round."""

from dataclasses import replace
from pathlib import Path

import pytest

from vllm_subspec.core.forecast import Drafted, Forecast, Machine, forecast
from vllm_subspec.core.plan import GIB, Budget, MemoryPlan, plan_memory
from vllm_subspec.core.shapes import Linear, ModelShape
from vllm_subspec.weights.model_shape import read_shape

CONFIGS = Path(__file__).parent / "configs"
RTX_4090 = Machine(link=22.5e9, device=1008e9)
CONTEXT = 2048
GROUP = 64


def four_bits(linear: Linear) -> int:
    """As HQQ packs it: half a byte an element, and a 16-bit scale and zero point for each group."""
    return linear.size // 2 + 4 * linear.size // GROUP


def planned(model: str, gib: float) -> tuple[ModelShape, MemoryPlan, Forecast]:
    shape, _ = read_shape(str(CONFIGS / model))
    sizes = shape.sizes(2, 1, four_bits, workspace=0)
    budget = Budget(int(gib * GIB), CONTEXT)
    plan = plan_memory(sizes, budget, resident_weights_gib=0, ring_layers=2)
    alone = replace(sizes, substitutes=[0] * len(sizes.layers))
    plain = plan_memory(alone, budget)
    drafted = {"qwen2.5-7b": Drafted(48, 28.35), "qwen2.5-32b": Drafted(48, 28.97)}[model]
    return shape, plan, forecast(plan, plain, 2 * shape.head, drafted, RTX_4090)


@pytest.mark.parametrize(
    ("model", "gib", "layers", "gigabytes", "substitutes", "speedup", "speed"),
    [
        ("qwen2.5-7b", 8, 28, 6.45, 3.67, 9.1, 24.29),
        ("qwen2.5-32b", 24, 64, 22.3, 17.55, 12.5, 6.50),
    ],
)
def test_the_published_runs(
    model: str,
    gib: float,
    layers: int,
    gigabytes: float,
    substitutes: float,
    speedup: float,
    speed: float,
) -> None:
    shape, plan, expected = planned(model, gib)
    assert len(shape.layers) == len(plan.streamed) == layers
    # Published with one layer of staging where our ring has two.
    staged_once = plan.total - plan.ring_bytes // 2
    assert staged_once == pytest.approx(gigabytes * 1e9, rel=0.05)
    assert plan.substitute_bytes == pytest.approx(substitutes * 1e9, rel=0.05)
    assert expected.speedup == pytest.approx(speedup, rel=0.2)
    assert expected.serial == pytest.approx(speed, rel=0.2)
    assert expected.overlapped > expected.serial > expected.plain
