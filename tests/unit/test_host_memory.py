# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from vllm_subspec.weights.host_memory import forget_peak, host_memory, peak_memory

MIB = 1 << 20


def machine(root: Path, mounts: str, cgroup: str, files: dict[str, str]) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/mounts").write_text(mounts)
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


V2 = "cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid 0 0\n"
V1 = "cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\n"
KUBERNETES = {
    "sys/fs/cgroup/memory.max": str(900 * MIB),
    "sys/fs/cgroup/memory.current": str(500 * MIB),
    "sys/fs/cgroup/memory.stat": f"anon 1\ninactive_file {300 * MIB}",
}


def test_without_groups_the_machine_counts(tmp_path: Path) -> None:
    found = host_memory(machine(tmp_path, "", "", {}))
    assert found.total == psutil.virtual_memory().total


def test_a_container_counts_its_limit_and_what_is_left_of_it(tmp_path: Path) -> None:
    found = host_memory(machine(tmp_path, V2, "0::/\n", KUBERNETES))
    assert (found.total, found.available) == (900 * MIB, 700 * MIB)


def test_the_tightest_of_nested_groups_counts(tmp_path: Path) -> None:
    files = {
        "sys/fs/cgroup/a/memory.max": str(400 * MIB),
        "sys/fs/cgroup/a/memory.current": str(100 * MIB),
        "sys/fs/cgroup/a/b/memory.max": "max",
        "sys/fs/cgroup/a/b/memory.current": "0",
    }
    found = host_memory(machine(tmp_path, V2, "0::/a/b\n", files))
    assert (found.total, found.available) == (400 * MIB, 300 * MIB)


@pytest.mark.parametrize("path", ["/", "/docker/0123"])  # the node's path, where none is mounted
def test_version_1(tmp_path: Path, path: str) -> None:
    files = {
        "sys/fs/cgroup/memory/memory.limit_in_bytes": str(800 * MIB),
        "sys/fs/cgroup/memory/memory.usage_in_bytes": str(600 * MIB),
        "sys/fs/cgroup/memory/memory.stat": f"cache 5\ntotal_inactive_file {100 * MIB}",
    }
    cgroup = f"5:cpu,cpuacct:{path}\n3:memory:{path}\n0::/\n"
    found = host_memory(machine(tmp_path, V1, cgroup, files))
    assert (found.total, found.available) == (800 * MIB, 300 * MIB)


def test_no_limit_of_version_1_is_a_large_number(tmp_path: Path) -> None:
    files = {
        "sys/fs/cgroup/memory/memory.limit_in_bytes": str(2**63 - 4096),
        "sys/fs/cgroup/memory/memory.usage_in_bytes": str(600 * MIB),
    }
    found = host_memory(machine(tmp_path, V1, "3:memory:/\n", files))
    assert found.total == psutil.virtual_memory().total


def test_this_process() -> None:
    found = host_memory()
    assert 0 < found.available <= found.total <= psutil.virtual_memory().total


def test_the_peak_is_of_this_process_alone() -> None:
    """A parent's is carried over into what getrusage says of its children."""
    held = np.ones(300 * MIB, np.uint8)
    forget_peak()  # what tests before this one had
    before = peak_memory()
    assert before > held.size
    ask = "from vllm_subspec.weights.host_memory import peak_memory; print(peak_memory())"
    found = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    assert 4 * MIB < int(found.stdout) < held.size
    more = np.ones(100 * MIB, np.uint8)
    assert peak_memory() > before + 0.5 * more.size
    del held, more
    forget_peak()
    assert peak_memory() < before
