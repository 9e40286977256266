# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
import pytest
import torch
from torch.nn import functional
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.platforms import current_platform

from vllm_subspec.weights import kernels
from vllm_subspec.weights.kernels.cpu_int8 import OneDnnInt8Kernel
from vllm_subspec.weights.packed_experts import Order
from vllm_subspec.weights.quantize import quantize
from vllm_subspec.weights.substitute_experts import SubstituteExperts

current_platform.import_kernels()
pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="vLLM's CPU kernels")

CPU = torch.device("cpu")
EXPERTS, HIDDEN, INTERMEDIATE = 5, 128, 192
# AMX packs bfloat16 only.
ORDERS = [("vec", torch.float32), ("vec", torch.bfloat16)]
if torch.cpu._is_amx_tile_supported():
    ORDERS.append(("amx", torch.bfloat16))


@pytest.mark.parametrize(("isa", "dtype"), ORDERS)
@pytest.mark.parametrize("rows", [32, 192])
def test_unpacking_is_the_inverse_of_vllms_packing(isa: str, dtype: torch.dtype, rows: int) -> None:
    weight = torch.randn(EXPERTS, rows, HIDDEN).to(dtype)
    order = Order(isa)
    packed = order.pack(weight)
    assert packed.shape == weight.shape
    assert not torch.equal(packed, weight)
    assert torch.equal(order.unpack(packed), weight)


def test_experts_in_the_checkpoints_order_stay_where_they_are() -> None:
    weight = torch.randn(EXPERTS, 32, HIDDEN)
    order = Order(None)
    assert order.pack(weight) is order.unpack(weight) is weight


def _experts(gate_up: torch.Tensor, down: torch.Tensor, bits: int) -> SubstituteExperts:
    kernel, fmt = kernels.choose(bits, None, CPU, torch.float32)

    def made(weights: torch.Tensor) -> list[kernels.SubstituteKernel]:
        return [kernel(quantize(weight, fmt, "rtn"), torch.float32) for weight in weights]

    return SubstituteExperts(made(gate_up), made(down))


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize(
    ("bits", "limit"),
    [
        pytest.param(
            *(8, 0.04),
            marks=pytest.mark.skipif(
                not OneDnnInt8Kernel.available(CPU, torch.float32), reason="this CPU has no VNNI"
            ),
        ),
        (4, 0.25),
    ],
)
def test_each_token_gets_its_experts_by_their_weights(tokens: int, bits: int, limit: float) -> None:
    torch.manual_seed(0)
    gate_up = torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN) / HIDDEN**0.5
    down = torch.randn(EXPERTS, HIDDEN, INTERMEDIATE) / INTERMEDIATE**0.5
    x = torch.randn(tokens, HIDDEN)
    chosen = torch.stack([torch.randperm(EXPERTS)[:2] for _ in range(tokens)]).int()
    weights = torch.rand(tokens, 2)

    expected = torch.zeros_like(x)
    for token in range(tokens):
        for place in range(2):
            expert = chosen[token, place]
            gate, up = (gate_up[expert] @ x[token]).chunk(2)
            hidden = functional.silu(gate) * up
            expected[token] += weights[token, place] * (down[expert] @ hidden)
    experts = _experts(gate_up, down, bits)
    got = experts(x, weights, chosen, MoEActivation.SILU)

    errors = (got - expected).norm(dim=1) / expected.norm(dim=1)
    assert errors.max() < limit  # another expert or weight would be of the order of 1
