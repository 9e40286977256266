# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest

from vllm_subspec.machine import isa
from vllm_subspec.weights.kernels import native
from vllm_subspec.weights.kernels.compiler import BuildError, build

COMPILER = shutil.which(os.environ.get("CXX", "g++"))
pytestmark = pytest.mark.skipif(COMPILER is None, reason="this machine has no C++ compiler")


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


def test_a_library_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(counting_compiler(tmp_path)))
    source, folder = tmp_path / "answer.cpp", tmp_path / "cache"
    source.write_text("int answer() { return 42; }")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=build, args=(source, folder)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    library = build(source, folder)
    assert list(folder.glob("*.so")) == [library]
    assert not list(folder.glob("*.tmp"))
    assert (tmp_path / "compiled").read_text() == "made\n"


def test_another_library_is_compiled_of_another_source_header_or_flag(tmp_path: Path) -> None:
    source, header = tmp_path / "answer.cpp", tmp_path / "answer.h"
    folder = tmp_path / "cache"
    source.write_text('#include "answer.h"\nint answer() { return ANSWER; }')
    header.write_text("#define ANSWER 42")
    made = {build(source, folder), build(source, folder, ["-O0"])}
    header.write_text("#define ANSWER 43")
    made.add(build(source, folder))
    source.write_text("int answer() { return 44; }")
    made.add(build(source, folder))
    assert len(made) == 4


def test_a_failed_build_leaves_nothing_and_names_the_error(tmp_path: Path) -> None:
    source, folder = tmp_path / "broken.cpp", tmp_path / "cache"
    source.write_text("int answer() { return nothing; }")
    with pytest.raises(BuildError, match="failed: .*broken.cpp:1.* error: .*nothing"):
        build(source, folder)
    assert not [*folder.glob("*.so"), *folder.glob("*.tmp")]
    source.write_text("int answer() { return 42; }")
    (tmp_path / "file").touch()
    with pytest.raises(BuildError, match="file cannot hold it"):
        build(source, tmp_path / "file")


def test_a_library_that_is_none_of_kernels_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    level = native.load()
    monkeypatch.setattr(native, "SHIPPED", tmp_path)
    source = tmp_path / "other.cpp"
    source.write_text("int absent(); int answer() { return absent(); }")
    build(source, tmp_path).rename(tmp_path / f"{level}.so")
    with pytest.raises(BuildError, match="cannot be loaded: .*absent"):
        native.use(level)
    source.write_text("int answer() { return 42; }")
    build(source, tmp_path).rename(tmp_path / f"{level}.so")
    with pytest.raises(BuildError, match="is not a library of kernels"):
        native.use(level)


def test_all_levels_can_be_compiled(tmp_path: Path) -> None:
    """Also those that this CPU lacks."""
    libraries = {native.compile_kernels(level, tmp_path) for level in native.levels()}
    assert len(libraries) == len(native.levels()) == len(isa.LEVELS) - 1  # they use no AMX


def test_an_old_compiler_gives_the_kernels_of_a_lower_level(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that does not know the newest instructions."""
    levels = [level.name for level in isa.levels() if level.name in native.levels()]
    if len(levels) < 2:
        pytest.skip("this CPU has only the lowest level")
    script = tmp_path / "compiler"
    script.write_text(
        f'''#!/bin/sh
case "$*" in *{native._FLAGS[_newest_flag(levels[-1], levels[-2])]}*)
echo "error: unrecognized option" >&2; exit 1;; esac
exec "{COMPILER}" "$@"
'''
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setattr(native, "_cache", lambda: tmp_path / "cache")
    lines: list[str] = []
    monkeypatch.setattr(native.logger, "warning", lambda text, *args: lines.append(text % args))
    try:
        assert native.load.__wrapped__() == levels[-2]
    finally:
        monkeypatch.undo()
        native.use(native.load())
    assert len(lines) == 1
    assert f"{levels[-2]} are used, not for {levels[-1]}: " in lines[0]


def _newest_flag(higher: str, lower: str) -> str:
    flags = {level.name: level.flags for level in isa.LEVELS}
    return min(flags[higher] - flags[lower])
