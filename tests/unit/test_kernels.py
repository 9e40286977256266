# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
import gc
import multiprocessing
import os
import re
import shutil
import socket
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from vllm.platforms import current_platform

from vllm_subspec.weights import kernels
from vllm_subspec.weights.kernels import (
    SubstituteKernel,
    choice,
    cpu_int4_vnni,
    mixed_precision,
    native,
)
from vllm_subspec.weights.kernels.cpu_int4 import TorchInt4Kernel
from vllm_subspec.weights.kernels.cpu_int4_vnni import Int4VnniKernel
from vllm_subspec.weights.kernels.cpu_int8 import OneDnnInt8Kernel
from vllm_subspec.weights.kernels.mixed_precision import MixedPrecisionKernel
from vllm_subspec.weights.quantize import quantize
from vllm_subspec.weights.quantized_weight import QuantFormat, QuantizedWeight

current_platform.import_kernels()

CPU = torch.device("cpu")
ROWS_OF_X = (1, 2, 3, 4, 7, 16, 17, 33, 65)
needs_int8 = pytest.mark.skipif(
    not OneDnnInt8Kernel.available(CPU, torch.float32), reason="this CPU has no VNNI"
)
# Not available(): with a compiler a failure to build must fail the tests.
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
HAS_INT4_VNNI = Int4VnniKernel.has_instructions() and COMPILER is not None
needs_int4_vnni = pytest.mark.skipif(
    not HAS_INT4_VNNI, reason="this machine has no AVX512-VNNI or no C++ compiler"
)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="this machine has no C++ compiler")
CHOSEN_INT4 = Int4VnniKernel if HAS_INT4_VNNI else TorchInt4Kernel


def coded(
    rows: int, columns: int, fmt: QuantFormat, scale_dtype: torch.dtype = torch.bfloat16
) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(rows * 10007 + columns)
    # Off-centre, so that asymmetric zero points are far from the middle code.
    shift = torch.linspace(-1, 1, rows).unsqueeze(1)
    weight = (torch.randn(rows, columns, generator=generator) + shift) / columns**0.5
    return quantize(weight, fmt, "rtn", scale_dtype)


def error(got: Tensor, x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> float:
    """Distance from the float64 product, relative to the size of its terms (which may cancel)."""
    wide = weight.dequantize(torch.float64)
    expected = x.double() @ wide.T
    terms = x.double().square() @ wide.square().T
    if bias is not None:
        expected += bias.double()
        terms += bias.double().square()
    return float((got.double() - expected).norm() / terms.sum().sqrt())


def check(
    kernel: SubstituteKernel, weight: QuantizedWeight, dtype: torch.dtype, limit: float
) -> None:
    rows, columns = weight.codes.shape
    generator = torch.Generator().manual_seed(1)
    for bias in (None, torch.randn(rows, generator=generator).to(dtype)):
        for m in ROWS_OF_X:
            x = torch.randn(m, columns, generator=generator).to(dtype)
            before = x.clone()
            got = kernel(x, bias)
            assert got.dtype == dtype
            assert got.shape == (m, rows)
            assert got.is_contiguous()
            assert error(got, x, weight, bias) < limit
            assert torch.equal(x, before)


int4_weights = pytest.mark.parametrize(
    ("rows", "columns", "fmt"),
    [
        (64, 64, QuantFormat(4, 32)),
        (208, 192, QuantFormat(4, 64)),
        (96, 512, QuantFormat(4, 128)),
        (48, 512, QuantFormat(4, 512)),
        (64, 320, QuantFormat(4, -1)),
        (70, 128, QuantFormat(4, 64)),
        (1, 64, QuantFormat(4, 64)),
        (64, 256, QuantFormat(3, 64)),
        (64, 256, QuantFormat(2, 64)),
        (64, 256, QuantFormat(4, 64, symmetric=True)),
        (64, 256, QuantFormat(3, 64, symmetric=True)),
    ],
    ids=str,
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@int4_weights
def test_int4_computes_with_the_dequantized_weight(
    rows: int, columns: int, fmt: QuantFormat, dtype: torch.dtype
) -> None:
    weight = coded(rows, columns, fmt)
    # bfloat16 activations, offsets and (twice) results: the weight itself is exact.
    check(TorchInt4Kernel(weight, dtype), weight, dtype, 0.006)


@pytest.fixture(scope="module")
def int4_vnni() -> type[Int4VnniKernel]:
    """The kernel, compiled and loaded."""
    assert Int4VnniKernel.available(CPU, torch.float32)
    return Int4VnniKernel


@needs_int4_vnni
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@int4_weights
def test_int4_vnni_is_within_the_rounding_of_its_activations(
    rows: int,
    columns: int,
    fmt: QuantFormat,
    dtype: torch.dtype,
    int4_vnni: type[SubstituteKernel],
) -> None:
    weight = coded(rows, columns, fmt)
    check(int4_vnni(weight, dtype), weight, dtype, 0.02)


@needs_int4_vnni
@int4_weights
def test_int4_vnni_is_exact_where_activations_are(
    rows: int, columns: int, fmt: QuantFormat, int4_vnni: type[SubstituteKernel]
) -> None:
    """Whole numbers up to 127 with a 127 in each group of 32 are their own 8-bit codes."""
    weight = coded(rows, columns, fmt)
    kernel = int4_vnni(weight, torch.float32)
    for m in ROWS_OF_X:
        x = torch.randint(-127, 128, (m, columns)).float()
        x[:, ::32] = 127
        assert error(kernel(x), x, weight, None) < 1e-6


@needs_int4_vnni
def test_int4_vnni_takes_extreme_codes(int4_vnni: type[SubstituteKernel]) -> None:
    codes = torch.full((32, 4096), 15, dtype=torch.uint8)
    zeros = torch.zeros(32, 1, dtype=torch.uint8)
    codes[1], zeros[1] = 0, 15
    weight = QuantizedWeight(codes, torch.ones(32, 1), zeros, QuantFormat(4, -1))
    for sign in (1, -1):
        out = int4_vnni(weight, torch.float32)(torch.full((2, 4096), 1e30 * sign))
        torch.testing.assert_close(out[:, 0], torch.full((2,), 15e30 * 4096 * sign))
        torch.testing.assert_close(out[:, 1], torch.full((2,), -15e30 * 4096 * sign))


@needs_int4_vnni
def test_int4_vnni_result_of_a_token_does_not_depend_on_its_batch(
    int4_vnni: type[SubstituteKernel],
) -> None:
    kernel = int4_vnni(coded(256, 512, QuantFormat(4, 64)), torch.bfloat16)
    x = (torch.randn(70, 512) * torch.logspace(-2, 2, 70).unsqueeze(1)).bfloat16()
    x[3] = 0
    alone = torch.cat([kernel(row) for row in x.split(1)])
    assert not alone[3].any()
    for m in range(1, 71):
        assert torch.equal(kernel(x[:m]), alone[:m])
        assert torch.equal(kernel(x[70 - m :]), alone[70 - m :])


@needs_int4_vnni
def test_int4_vnni_takes_any_input(int4_vnni: type[SubstituteKernel]) -> None:
    """Activations, bias and output of different dtypes; a view; no token at all."""
    kernel = int4_vnni(coded(70, 128, QuantFormat(4, 64)), torch.bfloat16)
    x, bias = torch.randn(5, 256), torch.randn(70)
    half = x[:, 64:192]
    expected = kernel(half.contiguous(), bias.bfloat16())
    assert torch.equal(kernel(half, bias), expected)
    assert kernel(x[:0, :128]).shape == (0, 70)
    with pytest.raises(RuntimeError, match="256 columns"):
        kernel(x)


def counting_compiler(folder: Path) -> Path:
    """A compiler that writes a line to ``folder``/compiled for each library it makes."""
    script = folder / "compiler"
    script.write_text(
        f'''#!/bin/sh
case "$*" in *" -o "*) echo made >> "{folder}/compiled"; sleep 0.3;; esac
exec "{COMPILER}" "$@"
'''
    )
    script.chmod(0o755)
    return script


@needs_compiler
def test_a_kernel_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(counting_compiler(tmp_path)))
    source, folder = tmp_path / "answer.cpp", tmp_path / "cache"
    source.write_text("int answer() { return 42; }")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=native.build, args=(source, folder)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    library = native.build(source, folder)
    assert list(folder.glob("*.so")) == [library]
    assert not list(folder.glob("*.tmp"))
    assert (tmp_path / "compiled").read_text() == "made\n"
    source.write_text("int answer() { return 43; }")
    assert native.build(source, folder) != library
    assert native.build(source, folder, ["-O0"]) not in (library, native.build(source, folder))


@needs_compiler
def test_a_failed_build_leaves_nothing_and_names_the_error(tmp_path: Path) -> None:
    source, folder = tmp_path / "broken.cpp", tmp_path / "cache"
    source.write_text("int answer() { return nothing; }")
    with pytest.raises(native.BuildError, match="failed: .*broken.cpp:1.* error: .*nothing"):
        native.build(source, folder)
    assert not [*folder.glob("*.so"), *folder.glob("*.tmp")]
    source.write_text("int absent(); int answer() { return absent(); }")
    with pytest.raises(native.BuildError, match="cannot be loaded: .*absent"):
        native.load(source, folder)
    (tmp_path / "file").touch()
    with pytest.raises(native.BuildError, match="file cannot hold it"):
        native.build(source, tmp_path / "file")


@pytest.mark.parametrize(
    ("failure", "cause"),
    [
        ("no compiler", "no C\\+\\+ compiler: /nonexistent"),
        pytest.param("wrong results", "wrong results on this CPU", marks=needs_int4_vnni),
    ],
)
def test_without_its_kernel_int4_falls_back_and_says_why(
    failure: str, cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(
        cpu_int4_vnni.logger, "warning", lambda text, *args: lines.append(text % args)
    )
    monkeypatch.setattr(Int4VnniKernel, "has_instructions", lambda: True)
    monkeypatch.setattr(cpu_int4_vnni, "_ready", cpu_int4_vnni._ready.__wrapped__)
    if failure == "no compiler":
        monkeypatch.setenv("CXX", "/nonexistent")
    else:
        monkeypatch.setattr(
            Int4VnniKernel, "forward", lambda self, x: torch.zeros(len(x), self.rows)
        )
    assert kernels.choose(4, None, CPU, torch.bfloat16)[0] is TorchInt4Kernel
    assert len(lines) == 1
    assert re.search(f"torch int4pack .*{cause}", lines[0])


@needs_int8
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (70, 100), (1, 512), (200, 2048), (33, 7)])
def test_int8_is_within_the_rounding_of_its_activations(
    rows: int, columns: int, dtype: torch.dtype
) -> None:
    weight = coded(rows, columns, QuantFormat(8, -1, symmetric=True))
    # One output of one token may be off by three times what many are on average.
    check(OneDnnInt8Kernel(weight, dtype), weight, dtype, 0.03)


@needs_int8
def test_int8_result_of_a_token_does_not_depend_on_its_batch() -> None:
    kernel = OneDnnInt8Kernel(coded(256, 512, QuantFormat(8, -1, symmetric=True)), torch.float32)
    x = torch.randn(33, 512) * torch.logspace(-2, 2, 33).unsqueeze(1)
    together = kernel(x)
    for i in (0, 16, 32):
        torch.testing.assert_close(kernel(x[i : i + 1])[0], together[i], rtol=1e-5, atol=0)


@needs_int8
def test_int8_takes_extreme_codes() -> None:
    """128 times 127, summed over many columns, saturates anything narrower than 32 bits."""
    codes = torch.zeros(32, 4096, dtype=torch.uint8)
    codes[1] = 255
    weight = QuantizedWeight(
        codes,
        torch.ones(32, 1),
        torch.full((32, 1), 128, dtype=torch.uint8),
        QuantFormat(8, -1, symmetric=True),
    )
    out = OneDnnInt8Kernel(weight, torch.float32)(torch.ones(2, 4096))
    torch.testing.assert_close(out[:, 0], torch.full((2,), -128.0 * 4096))
    torch.testing.assert_close(out[:, 1], torch.full((2,), 127.0 * 4096))


@needs_int8
def test_int8_codes_a_grouped_checkpoint_anew() -> None:
    weight = coded(64, 256, QuantFormat(8, 64))
    check(OneDnnInt8Kernel(weight, torch.float32), weight, torch.float32, 0.015)


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
        (Int4VnniKernel, QuantFormat(4, 48), 64, 96, "no multiple of 32"),
        (Int4VnniKernel, QuantFormat(4, 64), 64, 100, "does not divide its 100 columns"),
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


@pytest.mark.parametrize(
    ("bits", "kernel", "fmt"),
    [
        (2, CHOSEN_INT4, QuantFormat(2, 64)),
        (3, CHOSEN_INT4, QuantFormat(3, 64)),
        (4, CHOSEN_INT4, QuantFormat(4, 64)),
        pytest.param(8, OneDnnInt8Kernel, QuantFormat(8, -1, symmetric=True), marks=needs_int8),
    ],
)
def test_choice_on_the_cpu(
    bits: int,
    kernel: type[SubstituteKernel],
    fmt: QuantFormat,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(choice.logger, "info_once", lambda text, *args: lines.append(text % args))
    assert kernels.choose(bits, None, CPU, torch.bfloat16) == (kernel, fmt)
    assert ("container" in lines[0]) == (bits < kernel.container_bits[0])


@needs_int8
def test_choice_says_that_groups_have_no_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(choice.logger, "info_once", lambda text, *args: lines.append(text % args))
    kernels.choose(8, 64, CPU, torch.bfloat16)
    assert any("group_size 64 has no effect" in line for line in lines)


def test_choice_without_a_kernel_names_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="group_size 16"):
        kernels.choose(4, 16, CPU, torch.bfloat16)
    with pytest.raises(ValueError, match="bits 4: no kernel for this meta"):
        kernels.choose(4, 64, torch.device("meta"), torch.bfloat16)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    with pytest.raises(ValueError, match="bits 8: no kernel .* has: 4"):
        kernels.choose(8, None, CPU, torch.bfloat16)


@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=needs_int8)])
@pytest.mark.parametrize("shape", [(256, 512), (70, 128)])
def test_bytes_held_are_those_planned(bits: int, shape: tuple[int, int]) -> None:
    kernel, fmt = kernels.choose(bits, None, CPU, torch.bfloat16)
    packed = kernel(coded(*shape, fmt), torch.bfloat16)
    assert packed.nbytes == kernels.estimate_nbytes(bits, None, CPU, *shape)
    assert shape[0] * shape[1] * bits / 8 <= packed.nbytes < shape[0] * shape[1] * bits / 8 * 1.4


def test_a_refused_shape_says_which_groups_fit() -> None:
    with pytest.raises(ValueError, match=r'group_size 64 .* 96 columns; set "group_size": 32$'):
        kernels.estimate_nbytes(4, None, CPU, 64, 96)
    with pytest.raises(ValueError, match="does not divide its 100 columns$"):  # none does
        kernels.estimate_nbytes(4, None, CPU, 64, 100)


@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=needs_int8)])
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


@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=needs_int8)])
def test_traces_as_one_graph(bits: int) -> None:
    kernel, fmt = kernels.choose(bits, None, CPU, torch.bfloat16)
    block = _Block(kernel(coded(64, 128, fmt), torch.bfloat16))
    traced = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=True)
    for m in (2, 5):
        x = torch.randn(m, 128).bfloat16()
        assert torch.equal(traced(x), block(x))
