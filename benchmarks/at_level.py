# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Running a benchmark once for each level of instructions, in a process of its own."""

import json
import os
import subprocess
import sys
from typing import Any

from vllm_subspec.machine import isa


def run(module: str, level: str, *arguments: str) -> Any:
    """What ``python -m module`` prints as JSON in its last line, capped to a level."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env={**os.environ, isa.VARIABLE: level, "VLLM_LOGGING_LEVEL": "ERROR"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])
