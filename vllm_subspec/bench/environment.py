# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""What every result carries: versions, hardware, the exact command."""

import importlib.metadata
import json
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

PACKAGES = ("vllm", "torch", "transformers", "compressed-tensors", "vllm-subspec")
_TOP = Path(__file__).resolve().parents[2]


def describe() -> dict[str, Any]:
    """Versions, hardware and command line of this run."""
    flags = _cpu("flags").split()
    return {
        "command": command(sys.orig_argv),
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "cpu": _cpu("model name"),
        "cpu_flags": [f for f in flags if f.startswith(("avx512_", "amx", "avx512f", "avx2"))],
        "cores": psutil.cpu_count(logical=False),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": _gpu(),
    }


def write(path: Path, result: dict[str, Any]) -> None:
    """As JSON; lists of numbers stand on one line each, and paths begin at the checkout."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1)
    numbers = r"\[\n([-\d.,e+\s]+)\]"  # no string holds an unescaped line break
    text = re.sub(numbers, lambda found: f"[{' '.join(found[1].split())}]", text)
    path.write_text(text.replace(f"{_TOP}/", "") + "\n")


def command(argv: list[str]) -> str:
    """A command line as one would type it in the checkout: without folders of this machine.

    Args:
        argv: as `sys.orig_argv`: an interpreter, and a script or a module with its arguments.
    """
    words = [str(word).replace(f"{_TOP}/", "") for word in argv[1:]]
    if Path(argv[1]).name == "vllm-subspec":
        return shlex.join(["vllm-subspec", *words[1:]])
    return shlex.join(["python", *words])


def _cpu(key: str) -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(key):
            return line.split(":", 1)[1].strip()
    return ""


def _gpu() -> str | None:
    import torch  # heavy, and not needed to write a command down

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _commit() -> str | None:
    """Of the checkout that this package is run from, if it is one."""
    asked = ["git", "-C", str(_TOP), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None
