# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Processes whose parent is killed, and what they do; run as a script, this file is the parent."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from vllm_subspec.engine.orphan import end_with_parent

ROOT = Path(__file__).parents[2]


def child(kind: str) -> None:
    """Tidies up when it is told to end, or hangs."""

    def told(*_: object) -> None:
        if kind == "orderly":
            print("tidied up", flush=True)
            sys.exit()

    signal.signal(signal.SIGTERM, told)
    end_with_parent(grace=0.5)
    print(os.getpid(), flush=True)
    while True:
        time.sleep(60)


def lives(pid: int) -> bool:
    """Whether it has not ended. (Where nobody asks for orphans, they stay zombies.)"""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("kind", ["orderly", "hanging"])
def test_an_orphan_ends(kind: str) -> None:
    parent = subprocess.Popen(
        [sys.executable, __file__, kind],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    with parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
        deadline = time.monotonic() + 60
        try:
            while lives(pid):
                assert time.monotonic() < deadline, "it outlives its parent"
                time.sleep(0.05)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        said = parent.stdout.read()
    assert said == ("tidied up\n" if kind == "orderly" else "")


def test_a_process_that_nobody_started_watches_nobody() -> None:
    before = threading.active_count()
    end_with_parent()
    assert threading.active_count() == before


if __name__ == "__main__":
    process = multiprocessing.get_context("spawn").Process(target=child, args=sys.argv[1:])
    process.start()
    process.join()
