# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Virtual environments below ``build/peers`` for the peers whose packages are not ours.

    python -m benchmarks.peers.environments    # once; compiles llama.cpp

They are kept apart because .venv shall hold what the plugin needs and nothing else.
"""

import contextlib
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.serving import CannotRunError

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "peers"


@dataclass(frozen=True)
class Environment:
    """Requirements are exact, so that a figure belongs to versions that are known."""

    name: str
    requirements: tuple[str, ...]
    minutes: int
    """After which installing has failed."""

    @property
    def python(self) -> Path:
        return FOLDER / self.name / "bin" / "python"

    @property
    def _state(self) -> Path:
        """What the last `make` came to: {"requirements": [...], "failure": sentence or null}."""
        return FOLDER / f"{self.name}.json"

    def require(self) -> None:
        """Raises:
        CannotRunError: it is not there, or not with these requirements; why, if that is known.
        """
        state = json.loads(self._state.read_text()) if self._state.exists() else {}
        if state.get("requirements") != list(self.requirements):
            raise CannotRunError("not installed: run `python -m benchmarks.peers.environments`")
        if state["failure"]:
            raise CannotRunError(state["failure"])

    def make(self) -> None:
        """Create it, if it is not there with these requirements.

        Raises:
            CannotRunError: pip's last line; all that it said is in the log.
        """
        with contextlib.suppress(CannotRunError):
            self.require()
            return
        failure = self._install(FOLDER / self.name, FOLDER / f"{self.name}.install.log")
        state = {"requirements": self.requirements, "failure": failure}
        self._state.write_text(json.dumps(state))
        self.require()

    def _install(self, folder: Path, log: Path) -> str | None:
        """Why it failed, or None."""
        folder.mkdir(parents=True, exist_ok=True)
        pip = [str(self.python), "-m", "pip", "install", *self.requirements]
        with log.open("w") as out:
            for command in ([sys.executable, "-m", "venv", str(folder)], pip):
                try:
                    code = subprocess.call(
                        command, stdout=out, stderr=out, timeout=60 * self.minutes
                    )
                except subprocess.TimeoutExpired:
                    return f"could not be installed within {self.minutes} minutes"
                if code:
                    last = [line for line in log.read_text().splitlines() if line.strip()][-1]
                    return f"could not be installed: {last}"
        return None


# The torch and transformers that vLLM runs with here, so that only the way differs; AirLLM accepts
# them. Without torchvision: transformers imports it where it is, and it has no CPU build to pin.
TRANSFORMERS = Environment(
    "transformers",
    ("torch==2.13.0", "transformers==5.19.0", "accelerate==1.15.0", "airllm==4.0.0"),
    minutes=10,
)
# Newest of both when this was written. There is no wheel of llama-cpp-python: it needs a C++
# compiler and cmake.
LLAMA_CPP = Environment("llama_cpp", ("llama-cpp-python==0.3.36", "gguf==0.19.0"), minutes=40)


def main() -> int:
    failed = 0
    for environment in (TRANSFORMERS, LLAMA_CPP):
        try:
            environment.make()
            print(f"{environment.name}: {environment.python}")
        except CannotRunError as reason:
            print(f"{environment.name}: {reason}", file=sys.stderr)
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
