# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""C++ kernels, compiled at first use into a cache and shared by all processes."""

import fcntl
import hashlib
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch
from vllm.logger import init_logger

logger = init_logger(__name__)

_FLAGS = (
    "-O3",
    "-std=c++20",
    "-fPIC",
    "-shared",
    "-fopenmp",
    # A product and a sum stay two roundings unless the source says otherwise, so that every variant
    # of a kernel rounds alike.
    "-ffp-contract=off",
)


class BuildError(RuntimeError):
    """A kernel cannot be compiled here, or does not work; the message names the cause."""


def load(source: Path, folder: Path, flags: Sequence[str] = ()) -> None:
    """Build ``source`` and register its operations with torch; BuildError if that fails."""
    library = build(source, folder, flags)
    try:
        torch.ops.load_library(library)
    except OSError as error:
        # torch names the library, its cause says what is wrong with it.
        raise BuildError(f"{library} cannot be loaded: {error.__cause__ or error}") from error


def build(source: Path, folder: Path, flags: Sequence[str] = ()) -> Path:
    """The shared library of a C++ ``source`` that uses torch, compiled unless ``folder`` has it.

    The name holds a digest of everything the library depends on: source, compiler, torch and flags
    (``flags`` name instruction sets, so that it runs wherever those exist). Of several processes
    one compiles and the others wait for it; a library appears complete or not at all.

    Raises BuildError.
    """
    compiler = os.environ.get("CXX", "g++")
    command = [compiler, *_FLAGS, *flags, str(source), *_torch_flags()]
    version = _run([compiler, "--version"]).stdout
    parts = (source.read_text(), version, torch.__version__, *command)
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
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
    logger.info("Compiling %s: once, well below a minute.", library)
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


def _torch_flags() -> list[str]:
    """Where torch's headers and libraries are. No rpath: torch is loaded when the kernel is."""
    home = Path(torch.__file__).parent
    return [
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *("-isystem", str(home / "include")),
        f"-L{home / 'lib'}",
        "-ltorch_cpu",
        "-lc10",
    ]
