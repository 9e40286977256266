# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""A cap on the instructions that every library uses, so that one CPU can stand for older ones.

``VLLM_SUBSPEC_MAX_CPU_ISA`` names a level. Each library has a variable of its own, which it reads
once: torch at its first dispatch, oneDNN (torch and vLLM's library have one each) and MKL at their
first product, torch.compile when it is first imported. vLLM has none: it asks
``torch.cpu.get_capabilities`` which of its libraries to load and which kernels to run. All of that
comes after the end of ``import torch``, where `obey` is called: by an entry point of the
distribution that names vLLM's CPU build (``packaging/vllm-cpu-shim``).
"""

import functools
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

VARIABLE = "VLLM_SUBSPEC_MAX_CPU_ISA"

_AVX2 = frozenset({"avx2", "fma", "f16c"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
_VNNI = _AVX512 | {"avx512_vnni"}
_BF16 = _VNNI | {"avx512_bf16"}
_AMX = _BF16 | {"amx_tile", "amx_int8", "amx_bf16"}

VALUES = {
    "ATEN_CPU_CAPABILITY": ("default", "avx2", "avx512"),
    "ONEDNN_MAX_CPU_ISA": (
        *("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2"),
        *("AVX512_CORE", "AVX512_CORE_VNNI", "AVX512_CORE_BF16", "AVX512_CORE_FP16"),
        "AVX512_CORE_AMX",
    ),
    "MKL_ENABLE_INSTRUCTIONS": (
        *("SSE4_2", "AVX", "AVX2", "AVX512", "AVX512_E1", "AVX512_E2", "AVX512_E3", "AVX512_E4"),
    ),
    # Of the code that torch.compile generates, which is for the machine otherwise. Part of the key
    # of its cache, too: code for vectors of 512 bits would else be compiled again for 256.
    "TORCHINDUCTOR_CPP_MARCH": ("", "x86-64", "x86-64-v2", "x86-64-v3", "x86-64-v4"),
}
"""Of the libraries' variables, each one's values from the least to the most."""

VLLM_LIBRARIES = ("_C_AVX2", "_C_AVX512", "_C")
"""Of vLLM's CPU build, from the least to the most."""


@dataclass(frozen=True)
class Level:
    """A class of x86-64 CPUs."""

    name: str
    flags: frozenset[str]
    """What /proc/cpuinfo must list."""
    onednn: str
    mkl: str
    vllm_library: str

    @property
    def variables(self) -> dict[str, str]:
        """Values of the libraries' variables."""
        wide = "avx512f" in self.flags
        return {
            "ATEN_CPU_CAPABILITY": "avx512" if wide else "avx2",
            "ONEDNN_MAX_CPU_ISA": self.onednn,
            "MKL_ENABLE_INSTRUCTIONS": self.mkl,
            "TORCHINDUCTOR_CPP_MARCH": "x86-64-v4" if wide else "x86-64-v3",
        }

    @property
    def capabilities(self) -> frozenset[str]:
        """Its flags, as ``torch.cpu.get_capabilities`` spells them."""
        return frozenset(re.sub("^avx512(?!_)", "avx512_", flag) for flag in self.flags)


LEVELS = (
    Level("avx2", _AVX2, "AVX2", "AVX2", "_C_AVX2"),
    # A branch of its own: a CPU of the levels above may lack it.
    Level("avx2_vnni", _AVX2 | {"avx_vnni"}, "AVX2_VNNI", "AVX2", "_C_AVX2"),
    Level("avx512", _AVX512, "AVX512_CORE", "AVX512", "_C_AVX512"),
    Level("avx512_vnni", _VNNI, "AVX512_CORE_VNNI", "AVX512_E1", "_C_AVX512"),
    Level("avx512_bf16", _BF16, "AVX512_CORE_BF16", "AVX512_E3", "_C"),
    Level("amx", _AMX, "AVX512_CORE_AMX", "AVX512_E4", "_C"),
)
"""The lowest first."""

_ABOVE_AVX2 = ("avx512", "avx10", "avx_vnni", "avx_ne_convert", "amx")
"""How the names of torch's capabilities begin that AVX2 alone does not bring."""

_MARK = "_vllm_subspec_level"
_EXPORT = 'run eval "$(python scripts/cpu_env.py)" in the repository before Python starts'


def levels_of(cpuinfo: str) -> tuple[Level, ...]:
    """The levels that a CPU has, the lowest first; none of one that is not x86-64.

    Args:
        cpuinfo: the text of /proc/cpuinfo.
    """
    lines = (line.partition(":") for line in cpuinfo.splitlines())
    flags = next((set(text.split()) for key, _, text in lines if key.strip() == "flags"), set())
    return tuple(level for level in LEVELS if level.flags <= flags)


@functools.cache
def machine_levels() -> tuple[Level, ...]:
    """The levels that this CPU has, the lowest first, whatever the cap."""
    return levels_of(Path("/proc/cpuinfo").read_text())


def machine_level() -> Level | None:
    """The highest level that this CPU has, whatever the cap; None where it has none."""
    return machine_levels()[-1] if machine_levels() else None


def cap() -> Level | None:
    """The level that the environment asks for, or None.

    Raises:
        ValueError: there is no such level, or this CPU lacks it.
    """
    name = os.environ.get(VARIABLE)
    if not name:
        return None
    for level in machine_levels():
        if level.name == name:
            return level
    known = name in {level.name for level in LEVELS}
    problem = "this CPU lacks" if known else "is no level"
    has = ", ".join(level.name for level in machine_levels()) or "no level at all"
    raise ValueError(
        f"{VARIABLE} is {name!r}, which {problem}: unset it, or set it to one that this CPU has "
        f"({has})"
    )


def level() -> Level | None:
    """The level in use: the cap, or else the machine's. ValueError as `cap`."""
    return cap() or machine_level()


def levels() -> tuple[Level, ...]:
    """The levels that can be asked for here: the machine's, up to the cap. ValueError as `cap`."""
    had, highest = machine_levels(), level()
    return () if highest is None else had[: had.index(highest) + 1]


def environment(asked: Level, current: Mapping[str, str]) -> dict[str, str]:
    """The libraries' variables at a level; what ``current`` has below it stays."""
    return {
        name: value
        for name, value in asked.variables.items()
        if not _within(name, current.get(name), value)
    }


def _within(name: str, value: str | None, highest: str) -> bool:
    """Whether a library's variable is set, and to no more than ``highest``."""
    order = [text.lower() for text in VALUES[name]]
    given = None if value is None else value.lower()
    return given in order and order.index(given) <= order.index(highest.lower())


def obey() -> None:
    """Put the cap in force; torch has just been imported.

    Nothing happens without a cap, or with a bad one: an error in the middle of ``import torch``
    would be a traceback. `check` has the sentence.
    """
    try:
        asked = cap()
    except ValueError:
        return
    if asked is None:
        return
    import torch

    os.environ.update(environment(asked, os.environ))
    original = torch.cpu.get_capabilities
    allowed = asked.capabilities

    # torch's other questions (_is_avx512_supported, ...) ask this one.
    @functools.cache
    def get_capabilities() -> Mapping[str, Any]:
        return MappingProxyType(
            {
                name: False if name.startswith(_ABOVE_AVX2) and name not in allowed else value
                for name, value in original().items()
            }
        )

    setattr(get_capabilities, _MARK, asked.name)
    torch.cpu.get_capabilities = get_capabilities


def loaded_vllm_library() -> str | None:
    """Which of `VLLM_LIBRARIES` is in this process; None before any is."""
    maps = Path("/proc/self/maps").read_text()
    return next((name for name in VLLM_LIBRARIES if f"/vllm/{name}.abi3.so" in maps), None)


def check() -> None:
    """Whether the cap is in force, as far as this process can tell.

    Raises:
        ValueError: the cap is bad (see `cap`), or a library may use more: which, and what to do.
    """
    asked = cap()
    if asked is not None and (problem := _escape(asked)) is not None:
        raise ValueError(f"{VARIABLE} is {asked.name!r}, but {problem}")


def _escape(asked: Level) -> str | None:
    import torch

    used = torch.backends.cpu.get_cpu_capability()
    library = loaded_vllm_library()
    raised = next(iter(environment(asked, os.environ)), None)
    if getattr(torch.cpu.get_capabilities, _MARK, None) != asked.name:
        return (
            "nothing has put that in force: set it before Python starts, leave "
            "TORCH_DEVICE_BACKEND_AUTOLOAD unset, and install packaging/vllm-cpu-shim of the "
            "repository with pip"
        )
    if not _within("ATEN_CPU_CAPABILITY", used, asked.variables["ATEN_CPU_CAPABILITY"]):
        return f"torch was first used before that and takes {used}: {_EXPORT}"
    if library and VLLM_LIBRARIES.index(library) > VLLM_LIBRARIES.index(asked.vllm_library):
        return f"vLLM has loaded its library {library}: import torch before vllm._C"
    if raised is not None:
        return f"{raised} is {os.environ.get(raised)!r}, which allows more: {_EXPORT}"
    if "zentorch" in sys.modules:
        return "zentorch chooses its instructions itself: uninstall zentorch"
    return None
