# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""What every committed result carries: versions, hardware, the exact command."""

import importlib.metadata
import json
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

PACKAGES = ("vllm", "torch", "transformers", "compressed-tensors", "vllm-subspec")


def environment() -> dict[str, Any]:
    """Versions, hardware and command line of this run."""
    flags = _cpu("flags").split()
    return {
        "command": shlex.join(["python", *_relative(sys.orig_argv[1:])]),
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "cpu": _cpu("model name"),
        "cpu_flags": [f for f in flags if f.startswith(("avx512_", "amx", "avx512f", "avx2"))],
        "cores": psutil.cpu_count(logical=False),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }


def write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")


def _relative(argv: list[str]) -> list[str]:
    root = str(Path(__file__).resolve().parent.parent)
    return [str(a).replace(root + "/", "") for a in argv]


def _cpu(key: str) -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(key):
            return line.split(":", 1)[1].strip()
    return ""


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip()
