# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Shared libraries from C++ sources, compiled once into a folder that all processes share."""

import fcntl
import hashlib
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from vllm.logger import init_logger

logger = init_logger(__name__)

_FLAGS = ("-O3", "-std=c++20", "-fPIC", "-shared", "-fvisibility=hidden")


class BuildError(RuntimeError):
    """A library is not to be had here, or computes wrong; the message names the cause."""


def build(source: Path, folder: Path, flags: Sequence[str] = ()) -> Path:
    """The shared library of a C++ ``source``, compiled unless ``folder`` has it.

    The name holds a digest of everything the library depends on: the source and the headers beside
    it, compiler and flags (which name instruction sets, so that it runs wherever those exist). Of
    several processes one compiles and the others wait for it; a library appears complete or not at
    all.

    Raises BuildError.
    """
    compiler = os.environ.get("CXX", "g++")
    # Messages name the source file, not where it was compiled. Libraries come last.
    home = f"-fmacro-prefix-map={source.parent}="
    command = [compiler, *_FLAGS, home, str(source), *flags]
    version = _run([compiler, "--version"]).stdout
    texts = [file.read_text() for file in (source, *sorted(source.parent.glob("*.h")))]
    digest = hashlib.sha256("\0".join((*texts, version, *command)).encode()).hexdigest()[:16]
    library = folder / f"{source.stem}-{digest}.so"
    if library.exists():
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with library.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not library.exists():
                _compile(command, library)
    except OSError as error:
        raise BuildError(f"{folder} cannot hold it ({error.strerror})") from error
    return library


def _compile(command: Sequence[str], library: Path) -> None:
    logger.info("Compiling %s: once, a few seconds.", library)
    partial = library.with_suffix(f".{os.getpid()}.tmp")
    try:
        done = _run([*command, "-o", str(partial)])
        if done.returncode:
            lines = done.stderr.splitlines()
            first = next((line for line in lines if "error" in line), done.stderr.strip())
            raise BuildError(f"{command[0]} failed: {first}")
        partial.replace(library)
    finally:
        partial.unlink(missing_ok=True)


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise BuildError(f"no C++ compiler: {command[0]} ({error.strerror})") from error
