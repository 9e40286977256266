# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""How much memory this process may use, and has used.

It may use what the machine has, or what its control group allows.

In a container the machine's memory is that of the node. Who plans with it is killed at the limit.
"""

import ctypes
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class HostMemory:
    """Bytes."""

    total: int
    available: int


def host_memory(root: Path = Path("/")) -> HostMemory:
    """Of the machine, or of the tightest control group (version 1 or 2) around this process.

    Args:
        root: below which /proc and the mounted groups are looked for.
    """
    machine = psutil.virtual_memory()
    total, available = machine.total, machine.available
    for limit, used in _limits(root):
        total, available = min(total, limit), min(available, max(0, limit - used))
    return HostMemory(total, available)


def release_freed() -> None:
    """Give freed memory back to the system that the allocator, if it is glibc's, has kept: else it
    counts as the process's own when memory is planned."""
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def peak_memory() -> int:
    """Most bytes of host memory that this process has had at once, with pages of mapped files.

    Not getrusage's figure: that one begins with what the parent had when it started this process.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no line VmHWM")


def forget_peak() -> None:
    """What `peak_memory` says begins anew, where the kernel can do that (proc(5), clear_refs)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _limits(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, bytes in use but for page cache that can be given up) of each group with a limit."""
    for group in _groups(root):
        for limit_file, usage_file, cache in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit = _read(group / limit_file).strip()
            if limit.isdecimal():  # version 2 says "max" where there is none
                stat = dict(line.split() for line in _read(group / "memory.stat").splitlines())
                used = int(_read(group / usage_file) or 0) - int(stat.get(cache, 0))
                yield int(limit), used


def _groups(root: Path) -> Iterator[Path]:
    """This process's memory groups, from the innermost outwards.

    Within a container a group's path may be the node's, while only the group itself is mounted:
    then the folder does not exist and the mount stands for it.
    """
    points = {}
    for line in _read(root / "proc/self/mounts").splitlines():
        _, point, kind, options = line.split()[:4]
        if kind == "cgroup2":
            points[""] = point
        elif kind == "cgroup" and "memory" in options.split(","):
            points["memory"] = point
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in {"", "memory"} & set(controllers.split(",")):
            if controller in points:
                mount = root / points[controller].strip("/")
                own = mount / path.strip("/")
                inside = [own, *own.parents]
                yield from (g for g in inside[: inside.index(mount) + 1] if g.is_dir())


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
