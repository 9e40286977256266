# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""With the plugin installed and our methods not asked for, vLLM answers, samples and fails as
without it. That it serves what it could not is an option."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vllm_subspec.engine.in_use import REPAIR

ROOT = Path(__file__).resolve().parents[2]


def engines(plugins: str, **environment: str) -> dict[str, Any]:
    """What `tests.engine.unused_engines` prints.

    Memory that vLLM forgets to write holds the same in each process, as glibc gives it out.
    """
    given = {"VLLM_PLUGINS": plugins, "MALLOC_PERTURB_": "1", "LD_PRELOAD": "", **environment}
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.unused_engines"],
        cwd=ROOT,
        env=os.environ | given,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


@pytest.fixture(scope="module")
def without() -> dict[str, Any]:
    return engines("")


def test_engines_without_our_methods_are_vllm_s(without: dict[str, Any]) -> None:
    installed = engines("subspec")
    assert (without["registered"], installed["registered"]) == (False, True)
    assert installed["answers"] == without["answers"]
    plain, lookups = without["answers"]["plain"], without["answers"]["ngram"]
    assert plain["greedy"] == lookups["greedy"]
    for fault in (plain["seeded and chunked"], lookups["top k"]):
        assert fault.startswith("RuntimeError"), "vLLM has mended it: so can our patch go"


def test_repairs_can_be_shared(without: dict[str, Any]) -> None:
    repaired = engines("subspec", **{REPAIR: "1"})["answers"]
    plain, lookups = without["answers"]["plain"], without["answers"]["ngram"]
    mended = {"seeded and chunked"}
    assert {k: v for k, v in repaired["plain"].items() if k not in mended} == {
        k: v for k, v in plain.items() if k not in mended
    }
    assert isinstance(repaired["plain"]["seeded and chunked"], list)
    assert isinstance(repaired["ngram"]["top k"], list)
    assert repaired["ngram"]["greedy"] == lookups["greedy"]
    assert repaired["ngram"]["sampled"] != lookups["sampled"]
