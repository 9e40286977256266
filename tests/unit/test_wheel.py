# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""The wheel of `make wheel`: what it holds, and that its kernels run where there is no compiler."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from scripts import wheel
from vllm_subspec.machine import isa
from vllm_subspec.weights.kernels import native

pytestmark = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="this machine has no C++ compiler"
)
VERSION = tomllib.loads((wheel.ROOT / "pyproject.toml").read_text())["project"]["version"]
NAME = f"vllm_subspec-{VERSION}"
LIBRARIES = {f"{name}.so" for name in (native.OPERATORS, *native.levels())}
USE_EVERY_LEVEL = """
import json, torch
from vllm.platforms import current_platform
from vllm_subspec.weights import kernels
from vllm_subspec.weights.kernels import native
current_platform.import_kernels()
found = {"best": native.load(), "right": {}}
x = torch.arange(3 * 64).view(3, 64) % 7 - 3.0
w = torch.arange(20 * 64).view(20, 64) % 5 - 2.0
for level in LEVELS:
    native.use(level)
    found["right"][level] = torch.equal(torch.ops.vllm_subspec.linear(x, w, None), x @ w.T)
found["kernel"] = kernels.choose(4, None, torch.device("cpu"), torch.bfloat16)[0].__name__
found["maps"] = open("/proc/self/maps").read().split()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the wheel was built into."""
    folder = tmp_path_factory.mktemp("dist")
    before = set(wheel.ROOT.glob("*.egg-info"))  # an editable install has one
    assert wheel.main([str(folder)]) == 0
    assert set(wheel.ROOT.glob("*.egg-info")) == before
    return folder


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the wheel's files and nothing else."""
    folder = tmp_path_factory.mktemp("installed")
    (file,) = built.iterdir()
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
    subprocess.run([*command, "--target", str(folder), str(file)], check=True)
    return folder


def libraries(installed: Path) -> Path:
    return installed / native.SHIPPED.relative_to(wheel.ROOT)


def test_it_is_for_any_python_on_this_platform(built: Path) -> None:
    (file,) = built.iterdir()
    assert file.name == f"{NAME}-py3-none-linux_x86_64.whl"
    with zipfile.ZipFile(file) as archive:
        tags = archive.read(f"{NAME}.dist-info/WHEEL").decode()
    assert tags.count("Tag: ") == 1
    assert "\nTag: py3-none-linux_x86_64\n" in tags


def test_it_holds_what_is_tracked_and_the_libraries(installed: Path) -> None:
    assert {file.name for file in libraries(installed).iterdir()} == LIBRARIES
    listed = subprocess.check_output(["git", "ls-files", "vllm_subspec"], cwd=wheel.ROOT, text=True)
    packed = (installed / "vllm_subspec").rglob("*")
    files = {str(f.relative_to(installed)) for f in packed if f.is_file() and f.suffix != ".pyc"}
    shipped = {str(f.relative_to(installed)) for f in libraries(installed).iterdir()}
    assert files - shipped == set(listed.splitlines())


@pytest.mark.usefixtures("built")
def test_it_leaves_no_library_in_the_repository() -> None:
    assert not native.SHIPPED.exists()


def test_libraries_do_not_say_where_they_were_compiled(installed: Path) -> None:
    for library in libraries(installed).iterdir():
        content = library.read_bytes()
        for folder in (wheel.ROOT, sys.prefix, Path.home()):
            assert f"{folder}/".encode() not in content, (library.name, folder)


def test_kernels_need_only_the_c_library(installed: Path) -> None:
    levels = [libraries(installed) / f"{level}.so" for level in native.levels()]
    assert wheel.needed_versions(levels).keys() == {"GLIBC"}
    operators = libraries(installed) / f"{native.OPERATORS}.so"
    assert wheel.needed_versions([operators]).keys() == {"GLIBC", "GLIBCXX"}


@pytest.mark.skipif(not isa.levels(), reason="this CPU has no AVX2")
def test_every_level_runs_without_a_compiler(installed: Path, tmp_path: Path) -> None:
    levels = [level.name for level in isa.levels() if level.name in native.levels()]
    (tmp_path / "bin").mkdir()
    environment = os.environ | {
        "PYTHONPATH": str(installed),
        "PATH": str(tmp_path / "bin"),
        "CXX": "/nonexistent",
        "VLLM_CACHE_ROOT": str(tmp_path / "cache"),
    }
    code = USE_EVERY_LEVEL.replace("LEVELS", repr(levels))
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["best"] == levels[-1]
    assert found["right"] == dict.fromkeys(levels, True)
    assert found["kernel"] == "OwnInt4Kernel"
    used = {f"{name}.so" for name in (native.OPERATORS, *levels)}
    assert {str(libraries(installed) / name) for name in used} <= set(found["maps"])
    assert not list((tmp_path / "cache").rglob("*.so"))
