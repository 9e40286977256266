# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Set-up fails with a named step, pins agree with each other, and the wheel holds the plugin."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

import vllm_subspec
from vllm_subspec.machine import isa

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SHIM = tomllib.loads((ROOT / "packaging/vllm-cpu-shim/pyproject.toml").read_text())["project"]
SHIM_MODULE, _, _ = SHIM["entry-points"]["torch.backends"]["vllm_cpu_isa"].partition(":")
CPU_ENV = ROOT / "scripts" / "cpu_env.py"
SET_BY_CPU_ENV = (
    *("LD_PRELOAD", "MALLOC_ARENA_MAX", "OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND"),
    *(isa.VARIABLE, *isa.VALUES),
)


def load_setup(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("project_setup", root / "scripts" / "setup.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def installed(name: str) -> bool:
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


needs_cpu_build = pytest.mark.skipif(
    not installed("vllm-cpu"), reason="vLLM's CPU build is not installed"
)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The files set-up reads, without a virtual environment."""
    for name in ("scripts", "packaging", "vllm_subspec"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    return tmp_path


def run_setup(checkout: Path) -> subprocess.CompletedProcess[str]:
    """Run set-up where pip may use no package index and no folder of wheels."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    environment |= {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull}
    command = [sys.executable, str(checkout / "scripts" / "setup.py")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_versions_agree() -> None:
    setup = load_setup(ROOT)
    assert PROJECT["version"] == vllm_subspec.__version__
    needs = {(r := Requirement(text)).name: r for text in PROJECT["dependencies"]}
    assert SHIM["name"] == "vllm"
    assert needs["vllm"].specifier.contains(SHIM["version"])
    assert needs["vllm"].specifier.contains("0.32.1")
    assert not needs["vllm"].specifier.contains("0.33.0")
    assert SHIM["dependencies"] == [setup.VLLM_CPU]


@needs_cpu_build
def test_set_up_installs_the_torch_that_vllm_was_built_with() -> None:
    setup = load_setup(ROOT)
    wanted = [r for text in requires("vllm-cpu") or [] if (r := Requirement(text)).name == "torch"]
    pinned = Requirement(setup.TORCH)
    chosen = [r for r in wanted if r.marker is None or r.marker.evaluate()]
    assert [str(r.specifier) for r in chosen] == [str(pinned.specifier)]


@needs_cpu_build
def test_the_shim_names_the_cpu_build() -> None:
    assert version("vllm") == SHIM["version"]
    for name in load_setup(ROOT).UNWANTED:
        assert not installed(name), f"{name} cannot be loaded beside a CPU torch"


def test_failed_set_up_names_the_step(checkout: Path) -> None:
    done = run_setup(checkout)
    assert done.returncode == 1
    assert "set-up failed in step 3 (" in done.stdout
    assert "No matching distribution found" in done.stdout
    assert "run `make setup` again" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert "digest" not in json.loads((checkout / ".venv" / "setup.json").read_text())


def test_set_up_is_skipped_until_an_input_changes(checkout: Path) -> None:
    setup = load_setup(checkout)
    target = setup.find_target()
    setup.PYTHON.parent.mkdir(parents=True)
    setup.PYTHON.symlink_to(sys.executable)
    before = setup.inputs_digest(target)
    setup.STATE.write_text(json.dumps({"target": target, "digest": before}))
    done = run_setup(checkout)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    with (checkout / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    assert setup.inputs_digest(target) != before
    assert setup.inputs_digest("another target") != setup.inputs_digest(target)


def cpu_env(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {n: v for n, v in os.environ.items() if n not in SET_BY_CPU_ENV} | variables
    return subprocess.run(
        [sys.executable, str(CPU_ENV), *arguments], env=environment, capture_output=True, text=True
    )


@needs_cpu_build
def test_cpu_environment_preloads_openmp_and_uses_every_core() -> None:
    printed = cpu_env().stdout
    look = "import os, torch; print(torch.get_num_threads(), open('/proc/self/maps').read())"
    shell = f'{printed}\nexec "{sys.executable}" -c "{look}"'
    environment = {n: v for n, v in os.environ.items() if n not in SET_BY_CPU_ENV}
    seen = subprocess.run(["bash", "-c", shell], env=environment, capture_output=True, text=True)
    cores = os.sched_getaffinity(0)
    assert seen.stdout.split()[0] == str(len(cores)), seen.stderr
    assert "libiomp5.so" in seen.stdout
    assert f"VLLM_CPU_OMP_THREADS_BIND={','.join(map(str, sorted(cores)))}" in printed
    assert f"OMP_NUM_THREADS={len(cores)}\n" in printed


@needs_cpu_build
def test_cpu_environment_keeps_what_is_set_and_refuses_too_many_ranks() -> None:
    kept = cpu_env(OMP_NUM_THREADS="1", LD_PRELOAD="").stdout
    assert "OMP_NUM_THREADS" not in kept
    assert "LD_PRELOAD" not in kept
    refused = cpu_env("--ranks", "100000")
    assert refused.returncode == 1
    assert "--ranks is 100000: give a number from 1 to" in refused.stderr


@needs_cpu_build
@pytest.mark.parametrize("level", isa.machine_levels()[:1], ids=lambda level: level.name)
def test_cpu_environment_has_the_libraries_caps(level: isa.Level) -> None:
    printed = cpu_env(**{isa.VARIABLE: level.name}).stdout
    assert {f"export {name}={value}" for name, value in level.variables.items()} <= set(
        printed.splitlines()
    )
    refused = cpu_env(**{isa.VARIABLE: "nonsense"})
    assert refused.returncode == 1
    assert "VLLM_SUBSPEC_MAX_CPU_ISA is 'nonsense', which is no level" in refused.stderr


def test_a_change_of_the_shims_module_installs_it_again(checkout: Path) -> None:
    setup = load_setup(checkout)
    before = setup.inputs_digest("cpu")
    module = checkout / "packaging" / "vllm-cpu-shim" / f"{SHIM_MODULE}.py"
    module.write_text(module.read_text() + "\n")
    assert setup.inputs_digest("cpu") != before


def test_cores_are_split_evenly() -> None:
    spec = importlib.util.spec_from_file_location("cpu_env", CPU_ENV)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.split_cores([0, 1, 4, 5, 6], 2) == [[0, 1], [4, 5]]
    found = module.cpu_environment(Path("/x/libiomp5.so"), None, [0, 1, 4, 5], 2, {})
    assert found == {
        "VLLM_CPU_OMP_THREADS_BIND": "0,1|4,5",
        "OMP_NUM_THREADS": "2",
        "LD_PRELOAD": "/x/libiomp5.so",
        "MALLOC_ARENA_MAX": "1",
    }
    found = module.cpu_environment(Path("/x/libiomp5.so"), "/x/tcmalloc.so", [0], 1, {})
    assert found["LD_PRELOAD"] == "/x/libiomp5.so:/x/tcmalloc.so"
    assert "MALLOC_ARENA_MAX" not in found


def test_wheel_holds_the_package_and_its_entry_points(checkout: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", str(checkout / "dist"), str(checkout)], check=True)
    (wheel,) = (checkout / "dist").glob("vllm_subspec-0.1.0-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        entry_points = archive.read("vllm_subspec-0.1.0.dist-info/entry_points.txt").decode()
    assert {name.split("/")[0] for name in names} == {
        "vllm_subspec",
        "vllm_subspec-0.1.0.dist-info",
    }
    package = checkout / "vllm_subspec"
    sources = [file for end in ("py", "cpp", "h") for file in package.rglob(f"*.{end}")]
    assert {str(p.relative_to(checkout)) for p in sources} <= set(names)
    assert "[vllm.general_plugins]\nsubspec = vllm_subspec.plugin:register" in entry_points
    assert "vllm-subspec = vllm_subspec.cli.main:main" in entry_points
