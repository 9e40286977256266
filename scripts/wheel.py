# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Build a wheel that brings the C++ kernels compiled, so that its users need no compiler.

    python -m scripts.wheel [FOLDER]     # FOLDER: dist

Run from the top of the repository, in an environment with vLLM and a C++ compiler (g++, or $CXX).
What git tracks is copied and built in a temporary folder, so nothing is left in the repository. The
last line says which versions of the C and C++ libraries the kernels need, at least: that depends on
the system that they are compiled on, so an older system makes a wheel for more of them.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from vllm_subspec.weights.kernels import native
from vllm_subspec.weights.kernels.compiler import BuildError

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "vllm_subspec")
# A manylinux tag would name the oldest glibc that works, which is not the same everywhere this is
# built, and would promise that nothing outside the system is linked: torch is.
PLATFORM = "linux_x86_64"


def copy_sources(to: Path) -> None:
    """Copy what git tracks of `SOURCES`, as it is in the working tree."""
    command = ["git", "ls-files", "-z", "--", *SOURCES]
    listed = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    for name in listed.rstrip("\0").split("\0"):
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, to / name)


def compile_libraries(folder: Path) -> None:
    """Compile what `native.SHIPPED` holds in a wheel, without symbols. BuildError if that fails."""
    folder.mkdir()
    with tempfile.TemporaryDirectory() as compiled:
        named = {native.OPERATORS: native.compile_operators(Path(compiled))}
        named |= {level: native.compile_kernels(level, Path(compiled)) for level in native.levels()}
        for name, library in named.items():
            command = ["strip", "--strip-unneeded", "-o", str(folder / f"{name}.so"), str(library)]
            subprocess.run(command, check=True)


def build(folder: Path) -> Path:
    """Build the wheel into ``folder``, without any download. BuildError if a compiler fails."""
    with tempfile.TemporaryDirectory() as temporary:
        sources, made = Path(temporary, "sources"), Path(temporary, "made")
        copy_sources(sources)
        compile_libraries(sources / native.SHIPPED.relative_to(ROOT))
        # The libraries know nothing of Python, so the wheel is py3-none like that of a pure package
        # and only the platform is named. Extension modules would tie it to one interpreter's ABI.
        tag = f"--config-settings=--build-option=--plat-name={PLATFORM}"
        # setuptools is there: vLLM and torch depend on it.
        options = ("-q", "--no-deps", "--no-build-isolation", "--no-index", tag)
        command = [sys.executable, "-m", "pip", "wheel", *options, "-w", str(made), str(sources)]
        subprocess.run(command, check=True)
        (wheel,) = made.iterdir()
        folder.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(wheel, folder))


def needed_versions(libraries: Sequence[Path]) -> dict[str, str]:
    """The newest versions of GLIBC and GLIBCXX (libstdc++) whose symbols are asked for."""
    command = ["objdump", "-T", *map(str, libraries)]
    table = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    newest: dict[str, str] = {}
    for library, version in re.findall(r"\((GLIBC|GLIBCXX)_([\d.]+)\)", table):
        newest[library] = max(newest.get(library, "0"), version, key=_numbers)
    return newest


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build a wheel with compiled kernels.")
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "dist")
    folder = parser.parse_args(arguments).folder
    try:
        wheel = build(folder)
    except BuildError as error:
        print(f"The kernels could not be compiled: {error}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as unpacked:
        shutil.unpack_archive(wheel, unpacked, "zip")
        needed = needed_versions(list(Path(unpacked).rglob("*.so")))
    print(f"{wheel}: {wheel.stat().st_size / 1e6:.2f} MB, kernels for {', '.join(native.levels())}")
    print("They need " + ", ".join(f"{name} {version}" for name, version in needed.items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
