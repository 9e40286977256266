# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Tests side by side (`pytest -n auto`), each process on cores of its own."""

import os
import shutil

from hypothesis import settings

from scripts.cpu_env import split_cores

# Before torch is imported: a process computes on its share of the cores.
if (name := os.environ.get("PYTEST_XDIST_WORKER")) is not None:
    shares = split_cores(
        sorted(os.sched_getaffinity(0)), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    )
    cores = shares[int(name.removeprefix("gw"))]
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
    os.environ["OMP_NUM_THREADS"] = str(len(cores))

MOST_WORKERS = 2
"""Engines that live at once: each takes gigabytes."""

# How long an example takes says how busy the machine is.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


def pytest_xdist_auto_num_workers() -> int:
    """With a GPU one after the other: an engine takes all of it."""
    if shutil.which("nvidia-smi"):
        return 0
    return min(MOST_WORKERS, len(os.sched_getaffinity(0)))
