# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Engines on the commonest class of CPUs, AVX2 without AVX-512, whatever this machine is.

A selection of the tests, and the demo, in processes whose libraries are all capped.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_subspec.machine import isa

ROOT = Path(__file__).resolve().parents[2]
LEVEL = "avx2"
SELECTION = (
    "test_lossless.py::test_batch_of_mixed_lengths",
    "test_lossless.py::test_chains",
    "test_sampling.py::test_seeded_text_is_that_without_speculation",
    "test_compiled.py::test_16_bits_differ_only_at_near_ties[streamed-bfloat16]",
    "test_compiled.py::test_16_bits_differ_only_at_near_ties[resident-float16]",
    "test_families.py::test_answers_are_the_models_own",
)
LEAST_TESTS = 20
SECONDS = 600

here = isa.level()
pytestmark = pytest.mark.skipif(
    here is None or here.name == LEVEL or LEVEL not in {level.name for level in isa.levels()},
    reason="all tests run at this level, or none does",
)


def run(*arguments: str) -> str:
    """What a Python process prints that is capped to `LEVEL`; it must end well."""
    own = {n: v for n, v in os.environ.items() if not n.startswith(("PYTEST_", "VLLM_ENABLE"))}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**own, isa.VARIABLE: LEVEL},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return done.stdout


def test_answers_are_those_without_speculation() -> None:
    chosen = [f"tests/engine/{name}" for name in SELECTION]
    out = run("-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen)
    passed = re.search(r"^(\d+) passed", out, re.MULTILINE)
    assert passed is not None, out[-2000:]
    assert int(passed[1]) >= LEAST_TESTS
    assert "skipped" not in out.splitlines()[-1]


def test_the_demo_says_the_same_with_and_without_speculation() -> None:
    out = run("-m", "benchmarks.demo", "--gib", "0.1", "--tokens", "16")
    assert re.search(r"identical text +(yes|.*near tie)", out), out[-2000:]
    assert re.search(r"bound with it +(link|drafting|arithmetic) ", out), out[-2000:]
