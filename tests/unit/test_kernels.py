# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
import gc
import re
import socket
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from vllm.platforms import current_platform

from tests.unit.low_bit import (
    CPU,
    FLOATS,
    check,
    coded,
    error,
    int4_weights,
    int8_weights,
)
from vllm_subspec.weights import kernels
from vllm_subspec.weights.kernels import SubstituteKernel, choice, cpu_own, mixed_precision, native
from vllm_subspec.weights.kernels.cpu_int4 import TorchInt4Kernel
from vllm_subspec.weights.kernels.cpu_int8 import CpuInt8Kernel, OneDnnInt8Kernel, TorchInt8Kernel
from vllm_subspec.weights.kernels.cpu_own import OwnInt4Kernel
from vllm_subspec.weights.kernels.mixed_precision import MixedPrecisionKernel
from vllm_subspec.weights.quantized_weight import QuantFormat, QuantizedWeight

current_platform.import_kernels()

ONEDNN_INT8 = OneDnnInt8Kernel.available(CPU, torch.float32)
needs_int8 = pytest.mark.skipif(not ONEDNN_INT8, reason="this CPU has no VNNI")


@pytest.mark.parametrize("dtype", FLOATS)
@int4_weights
def test_int4_computes_with_the_dequantized_weight(
    rows: int, columns: int, fmt: QuantFormat, dtype: torch.dtype
) -> None:
    weight = coded(rows, columns, fmt)
    # bfloat16 activations, offsets and (twice) results: the weight itself is exact.
    check(TorchInt4Kernel(weight, dtype), weight, dtype, 0.006)


INT8 = QuantFormat(8, -1, symmetric=True)
int8_kernels = pytest.mark.parametrize(
    "kernel", [pytest.param(OneDnnInt8Kernel, marks=needs_int8), TorchInt8Kernel]
)


@int8_kernels
@pytest.mark.parametrize("dtype", FLOATS)
@int8_weights
def test_int8_is_within_the_rounding_of_its_activations(
    rows: int, columns: int, dtype: torch.dtype, kernel: type[CpuInt8Kernel]
) -> None:
    weight = coded(rows, columns, INT8)
    # One output of one token may be off by three times what many are on average.
    check(kernel(weight, dtype), weight, dtype, 0.03)


@needs_int8
def test_int8_result_of_a_token_does_not_depend_on_its_batch() -> None:
    kernel = OneDnnInt8Kernel(coded(256, 512, INT8), torch.float32)
    x = torch.randn(33, 512) * torch.logspace(-2, 2, 33).unsqueeze(1)
    together = kernel(x)
    for i in (0, 16, 32):
        torch.testing.assert_close(kernel(x[i : i + 1])[0], together[i], rtol=1e-5, atol=0)


@int8_kernels
def test_int8_takes_extreme_codes(kernel: type[CpuInt8Kernel]) -> None:
    """128 times 127, summed over many columns, saturates anything narrower than 32 bits."""
    codes = torch.zeros(32, 4096, dtype=torch.uint8)
    codes[1] = 255
    zeros = torch.full((32, 1), 128, dtype=torch.uint8)
    out = kernel(QuantizedWeight(codes, torch.ones(32, 1), zeros, INT8), torch.float32)(
        torch.ones(2, 4096)
    )
    torch.testing.assert_close(out[:, 0], torch.full((2,), -128.0 * 4096))
    # bfloat16 has no 127 x 4096.
    torch.testing.assert_close(out[:, 1], torch.full((2,), 127.0 * 4096), rtol=4e-3, atol=0)


@int8_kernels
def test_int8_codes_a_grouped_checkpoint_anew(kernel: type[CpuInt8Kernel]) -> None:
    weight = coded(64, 256, QuantFormat(8, 64))
    check(kernel(weight, torch.float32), weight, torch.float32, 0.015)


@pytest.fixture(scope="module")
def tensor_parallel_group() -> Iterator[None]:
    """vLLM's parameters ask for their rank; a process group of one answers."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        init_distributed_environment,
        initialize_model_parallel,
    )

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"tcp://127.0.0.1:{port}", 0, "gloo")
        initialize_model_parallel(1)
        yield
    cleanup_dist_env_and_memory()


@pytest.mark.usefixtures("tensor_parallel_group")
@pytest.mark.skipif(not current_platform.is_cpu(), reason="the CPU kernel checks the layout here")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "fmt",
    [
        QuantFormat(4, 64),
        QuantFormat(4, 256),
        QuantFormat(4, -1),
        QuantFormat(3, 64),
        QuantFormat(4, 64, symmetric=True),
        QuantFormat(2, 32, symmetric=True),
    ],
    ids=str,
)
def test_vllm_mixed_precision_layout(
    fmt: QuantFormat, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same parameters as on CUDA, read by vLLM's CPU kernel of the same format."""
    if (reason := mixed_precision.no_w4a16()) is not None:
        pytest.skip(reason)
    monkeypatch.setenv("VLLM_CPU_INT4_W4A8", "0")  # a layout of its own, where there is AMX
    weight = coded(96, 512, fmt)
    kernel = MixedPrecisionKernel(weight, dtype)
    check(kernel, weight, dtype, 0.012)
    assert kernel.nbytes == MixedPrecisionKernel.estimate_nbytes(fmt, 96, 512)


@pytest.mark.gpu
@pytest.mark.usefixtures("tensor_parallel_group")
@pytest.mark.skipif(not current_platform.is_cuda(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_kernel_chosen_on_cuda(bits: int, dtype: torch.dtype) -> None:
    device = torch.device("cuda")
    kernel, fmt = kernels.choose(bits, 64, device, dtype)
    weight = coded(256, 512, fmt)
    packed = kernel(weight.to(device), dtype)
    x = torch.randn(17, 512).to(dtype)
    assert error(packed(x.to(device)).cpu(), x, weight, None) < 0.02


@pytest.mark.parametrize(
    ("kernel", "fmt", "rows", "columns", "reason"),
    [
        (TorchInt4Kernel, QuantFormat(4, 64), 64, 100, "does not divide its 100 columns"),
        (TorchInt4Kernel, QuantFormat(4, 48), 64, 96, "no multiple of 32"),
        (TorchInt4Kernel, QuantFormat(4, -1), 64, 100, "no multiple of 32"),
        (OwnInt4Kernel, QuantFormat(4, 48), 64, 96, "no multiple of 32"),
        (OwnInt4Kernel, QuantFormat(4, 64), 64, 100, "does not divide its 100 columns"),
        (TorchInt4Kernel, QuantFormat(8, 64), 64, 64, "8 bits, more than 4"),
        (MixedPrecisionKernel, QuantFormat(4, 64), 64, 96, "does not divide its 96 columns"),
        (MixedPrecisionKernel, QuantFormat(4, 48), 64, 96, "no multiple of 32"),
        (MixedPrecisionKernel, QuantFormat(4, 64), 70, 128, "multiples of 8"),
    ],
)
def test_refused_shapes(
    kernel: type[SubstituteKernel], fmt: QuantFormat, rows: int, columns: int, reason: str
) -> None:
    assert reason in (kernel.refusal(fmt, rows, columns) or "")
    empty = QuantizedWeight(
        torch.zeros(rows, columns, dtype=torch.uint8),
        torch.ones(rows, 1),
        torch.zeros(rows, 1, dtype=torch.uint8),
        fmt,
    )
    with pytest.raises(ValueError, match=reason):
        kernel(empty, torch.bfloat16)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_width_has_a_kernel_on_the_cpu(
    bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(choice.logger, "info_once", lambda text, *args: lines.append(text % args))
    kernel, fmt = kernels.choose(bits, None, CPU, dtype)
    assert fmt == (INT8 if bits == 8 else QuantFormat(bits, 64))
    assert ("container" in lines[0]) == (bits < kernel.container_bits[0])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_width_has_a_kernel_without_a_compiler_and_without_vnni(
    bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(cpu_own.logger, "warning", lambda text, *args: lines.append(text % args))
    monkeypatch.setattr(cpu_own, "_ready", cpu_own._ready.__wrapped__)
    monkeypatch.setattr(native, "load", native.load.__wrapped__)
    monkeypatch.setattr(native, "_load_operators", native._load_operators.__wrapped__)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    monkeypatch.setenv("CXX", "/nonexistent")
    kernel, _ = kernels.choose(bits, None, CPU, torch.bfloat16)
    assert kernel is (TorchInt8Kernel if bits == 8 else TorchInt4Kernel)
    assert any(re.search("'own W4A8'.*slower.*no C\\+\\+ compiler: /nonexistent", x) for x in lines)


def test_the_first_kernel_is_taken_unless_another_is_clearly_faster() -> None:
    def times(one: float, eight: float, many: float) -> dict[int, float]:
        return {1: one, 8: eight, 32: many, 128: 1.0}

    slower, faster = times(1.0, 2.0, 4.0), times(0.95, 1.9, 3.9)
    assert choice.fastest({"ours": slower, "theirs": faster}, "ours") == "ours"
    assert choice.fastest({"ours": slower, "theirs": times(1.0, 1.0, 4.0)}, "ours") == "theirs"
    assert choice.fastest({"theirs": faster}, "ours") == "theirs"


def test_choice_says_that_groups_have_no_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(choice.logger, "info_once", lambda text, *args: lines.append(text % args))
    kernels.choose(8, 64, CPU, torch.bfloat16)
    assert any("group_size 64 has no effect" in line for line in lines)


def test_choice_without_a_kernel_names_the_key() -> None:
    with pytest.raises(ValueError, match="group_size 16"):
        kernels.choose(4, 16, CPU, torch.bfloat16)
    with pytest.raises(ValueError, match="bits 4: no kernel for this meta"):
        kernels.choose(4, 64, torch.device("meta"), torch.bfloat16)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(256, 512), (70, 128)])
def test_bytes_held_are_those_planned(bits: int, shape: tuple[int, int]) -> None:
    kernel, fmt = kernels.choose(bits, None, CPU, torch.bfloat16)
    packed = kernel(coded(*shape, fmt), torch.bfloat16)
    assert packed.nbytes == kernels.estimate_nbytes(bits, None, CPU, torch.bfloat16, *shape)
    assert shape[0] * shape[1] * bits / 8 <= packed.nbytes < shape[0] * shape[1] * bits / 8 * 1.4


def test_a_refused_shape_says_which_groups_fit() -> None:
    with pytest.raises(ValueError, match=r'group_size 64 .* 96 columns; set "group_size": 32$'):
        kernels.estimate_nbytes(4, None, CPU, torch.bfloat16, 64, 96)
    with pytest.raises(ValueError, match="does not divide its 100 columns$"):  # none does
        kernels.estimate_nbytes(4, None, CPU, torch.bfloat16, 64, 100)


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_not_kept(bits: int) -> None:
    kernel, fmt = kernels.choose(bits, None, CPU, torch.bfloat16)
    weight = coded(256, 512, fmt)
    expected = weight.dequantize()
    codes = weakref.ref(weight.codes.untyped_storage())
    packed = kernel(weight, torch.bfloat16)
    del weight
    gc.collect()
    assert codes() is None
    x = torch.randn(3, 512).bfloat16()
    torch.testing.assert_close(packed(x).float(), x.float() @ expected.T, rtol=0.1, atol=0.05)


class _Block(nn.Module):
    def __init__(self, kernel: SubstituteKernel) -> None:
        super().__init__()
        self.linear = kernel

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.linear(x))


@pytest.mark.parametrize("bits", [4, 8])
def test_traces_as_one_graph(bits: int) -> None:
    kernel, fmt = kernels.choose(bits, None, CPU, torch.bfloat16)
    block = _Block(kernel(coded(64, 128, fmt), torch.bfloat16))
    traced = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=True)
    for m in (2, 5):
        x = torch.randn(m, 128).bfloat16()
        assert torch.equal(traced(x), block(x))
