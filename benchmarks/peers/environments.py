# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Virtual environments below ``build/peers`` for the peers whose packages are not ours.

    python -m benchmarks.peers.environments    # once; compiles llama.cpp

They are kept apart because .venv shall hold what the plugin needs and nothing else: accelerate's
mere presence changes how transformers loads a model.
"""

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
    def _done(self) -> Path:
        return FOLDER / self.name / "requirements.txt"

    @property
    def is_made(self) -> bool:
        """Whether it was installed with these requirements."""
        return self._done.exists() and self._done.read_text() == "\n".join(self.requirements)

    def make(self) -> None:
        """Create it, unless it exists with these requirements.

        Raises:
            CannotRunError: with the last line that pip said; the whole of it is in the log.
        """
        if self.is_made:
            return
        folder = FOLDER / self.name
        folder.mkdir(parents=True, exist_ok=True)
        log = FOLDER / f"{self.name}.install.log"
        commands = (
            [sys.executable, "-m", "venv", str(folder)],
            [str(self.python), "-m", "pip", "install", *self.requirements],
        )
        with log.open("w") as out:
            for command in commands:
                try:
                    subprocess.run(
                        command, stdout=out, stderr=out, check=True, timeout=60 * self.minutes
                    )
                except subprocess.TimeoutExpired:
                    raise CannotRunError(f"installing took over {self.minutes} minutes") from None
                except subprocess.CalledProcessError:
                    last = [line for line in log.read_text().splitlines() if line.strip()][-1]
                    raise CannotRunError(f"could not be installed: {last}") from None
        self._done.write_text("\n".join(self.requirements))


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
