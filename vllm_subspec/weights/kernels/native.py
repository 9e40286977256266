# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Our own CPU kernels: C++ operators of torch over one library for each level of instruction sets.

A wheel brings the libraries; a source checkout compiles those that it needs at first use. The level
is that of this CPU, up to the cap (`machine.isa`).
"""

import functools
from pathlib import Path

import torch
from vllm import envs
from vllm.logger import init_logger

from vllm_subspec.machine import isa
from vllm_subspec.weights.kernels.compiler import BuildError, build

logger = init_logger(__name__)

SOURCES = Path(__file__).parent / "csrc"
SHIPPED = Path(__file__).parent / "lib"
"""Libraries of a wheel, by `name_of`: absent in a source checkout."""

_FLAGS = {
    "avx2": "-mavx2",
    "fma": "-mfma",
    "f16c": "-mf16c",
    "avx_vnni": "-mavxvnni",
    "avx512f": "-mavx512f",
    "avx512bw": "-mavx512bw",
    "avx512dq": "-mavx512dq",
    "avx512vl": "-mavx512vl",
    "avx512_vnni": "-mavx512vnni",
    "avx512_bf16": "-mavx512bf16",
}
"""The compiler's flag for each flag of a level that the kernels use; they use no AMX."""

OPERATORS = "operators"
# The first torch whose stable interface has all that operators.cpp uses.
_TORCH = "-DTORCH_TARGET_VERSION=0x020a000000000000ULL"


def levels() -> tuple[str, ...]:
    """The levels that the kernels are compiled for, the lowest first."""
    return tuple(level.name for level in isa.LEVELS if level.flags <= _FLAGS.keys())


def compile_operators(folder: Path) -> Path:
    """torch's operators, which find their kernels in another library. BuildError if that fails."""
    home = Path(torch.__file__).parent
    include = home / "include"
    # Messages name torch's headers, not where torch is installed.
    headers = (f"-fmacro-prefix-map={include}/=", "-isystem", f"{include}")
    # No rpath: torch is loaded when they are.
    flags = (_TORCH, *headers, f"-L{home / 'lib'}", "-ltorch_cpu", "-ldl")
    return build(SOURCES / "operators.cpp", folder, flags)


def compile_kernels(level: str, folder: Path) -> Path:
    """The kernels of one of `levels`. BuildError if that fails."""
    (found,) = (one for one in isa.LEVELS if one.name == level)
    # A product and a sum stay two roundings unless the source says otherwise, so that all levels
    # round alike.
    flags = ("-ffp-contract=off", *(_FLAGS[flag] for flag in sorted(found.flags)))
    return build(SOURCES / "level.cpp", folder, flags)


def use(level: str) -> None:
    """Compute with the kernels of one of `levels` from now on. BuildError if there are none."""
    _load_operators()
    library = _library(level)
    try:
        torch.ops.vllm_subspec.use_kernels(str(library))
    except RuntimeError as error:
        raise BuildError(f"{library} cannot be loaded: {error}") from error


@functools.cache
def load() -> str:
    """Make the operators usable, once per process, at the highest level that this CPU has.

    Returns the level. Raises BuildError: there are none, because of the CPU or of the compiler.
    """
    wanted = [level.name for level in isa.levels() if level.name in levels()]
    if not wanted:
        raise BuildError("this CPU has no AVX2")
    problem: BuildError | None = None
    for level in reversed(wanted):  # an old compiler may not know the newest instructions
        try:
            use(level)
        except BuildError as error:
            problem = problem or error
        else:
            if problem is not None:
                logger.warning(
                    "Kernels for %s are used, not for %s: %s", level, wanted[-1], problem
                )
            return level
    assert problem is not None
    raise problem


@functools.cache
def _load_operators() -> None:
    library = SHIPPED / f"{OPERATORS}.so"
    if not library.exists():
        library = compile_operators(_cache())
    try:
        torch.ops.load_library(library)
    except OSError as error:
        # torch names the library, its cause says what is wrong with it.
        raise BuildError(f"{library} cannot be loaded: {error.__cause__ or error}") from error
    torch.library.register_fake("vllm_subspec::linear", _linear_shape)
    torch.library.register_fake("vllm_subspec::low_bit_linear", _low_bit_linear_shape)


def _library(level: str) -> Path:
    shipped = SHIPPED / f"{level}.so"
    return shipped if shipped.exists() else compile_kernels(level, _cache())


def _cache() -> Path:
    return Path(envs.VLLM_CACHE_ROOT) / "subspec" / "kernels"


def _linear_shape(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(x.shape[0], w.shape[0])


def _low_bit_linear_shape(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    rows: int,
    bits: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], rows, dtype=dtype)
