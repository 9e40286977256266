# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""One memory limit for all: a control group that counts a process's page cache too.

Without it, "offloaded to disk" means "kept in the page cache", and a model that is larger than
memory is measured on a machine where it is not.

The kernel charges a page of a file to the group that read it first. `forget` drops a model's pages,
so that no process finds what another one has been charged for.
"""

import os
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


class NoMemoryLimitError(Exception):
    """No memory control group can be made here; one sentence on what to do."""


@dataclass(frozen=True)
class Files:
    """What the two versions of control groups call the same things."""

    limit: str
    peak: str
    swap: str
    """Limit of memory and swap together (version 1), of swap alone (version 2)."""
    events: str
    """Holds a line ``oom_kill N``."""


V1 = Files(
    "memory.limit_in_bytes",
    "memory.max_usage_in_bytes",
    "memory.memsw.limit_in_bytes",
    "memory.oom_control",
)
V2 = Files("memory.max", "memory.peak", "memory.swap.max", "memory.events")


def own_group(cgroup: str, mounts: str) -> tuple[Files, Path, Path]:
    """Where this process's memory is accounted: the files, the mount, the group below it.

    Args:
        cgroup: text of ``/proc/self/cgroup``; lines ``number:controllers:path``.
        mounts: text of ``/proc/self/mounts``; lines ``device point type options 0 0``.

    Raises:
        NoMemoryLimitError: neither version accounts for memory here.
    """
    groups = [line.split(":", 2)[1:] for line in cgroup.splitlines()]
    points = [line.split()[1:4] for line in mounts.splitlines()]
    # Version 1 first: beside it, version 2 may be mounted without the memory controller.
    for controllers, group in groups:
        if "memory" in controllers.split(","):
            for point, kind, options in points:
                if kind == "cgroup" and "memory" in options.split(","):
                    return V1, Path(point), Path(point) / group.strip("/")
    for controllers, group in groups:
        for point, kind, _ in points:
            if not controllers and kind == "cgroup2":
                return V2, Path(point), Path(point) / group.strip("/")
    raise NoMemoryLimitError("no control group that accounts for memory is mounted here")


def parent_for_groups(files: Files, mount: Path, own: Path) -> Path:
    """The nearest group, from one's own upwards, below which a limited group can be made.

    Version 2 allows it only where the parent passes the controller on, which a group with processes
    of its own cannot.

    Raises:
        NoMemoryLimitError: none can; says which folder was not writable.
    """
    for folder in [own, *own.parents]:
        passed_on = files is V1 or "memory" in _read(folder / "cgroup.subtree_control").split()
        if passed_on and os.access(folder, os.W_OK):
            return folder
        if folder == mount:
            break
    raise NoMemoryLimitError(
        f"no memory group can be made in {own} or above it: run as root, or under "
        "`systemd-run --user --scope -p Delegate=yes`, or mount the control groups writable"
    )


class MemoryGroup:
    """A group of processes that may use ``limit`` bytes together, page cache included, no swap."""

    def __init__(self, name: str, limit: int) -> None:
        self.files, mount, own = own_group(
            _read(Path("/proc/self/cgroup")), _read(Path("/proc/self/mounts"))
        )
        self.folder = parent_for_groups(self.files, mount, own) / f"peer-{os.getpid()}-{name}"
        try:
            self.folder.mkdir()
            (self.folder / self.files.limit).write_text(str(limit))
        except OSError as error:
            raise NoMemoryLimitError(f"no memory limit can be set here: {error}") from None
        swap = self.folder / self.files.swap
        if swap.exists():
            swap.write_text(str(limit if self.files is V1 else 0))

    def command(self, command: Iterable[str]) -> list[str]:
        """``command``, started by a shell that first moves itself into the group."""
        enter = 'echo $$ > "$0" && exec "$@"'
        return ["sh", "-c", enter, str(self.folder / "cgroup.procs"), *command]

    @property
    def peak(self) -> int:
        """Most bytes charged so far."""
        return int(_read(self.folder / self.files.peak) or 0)

    @property
    def kills(self) -> int:
        """Processes that the limit has killed."""
        words = _read(self.folder / self.files.events).split()
        return int(words[words.index("oom_kill") + 1]) if "oom_kill" in words else 0

    def close(self) -> None:
        """Kill what is left in the group and remove it."""
        for _ in range(100):
            pids = _read(self.folder / "cgroup.procs").split()
            if not pids:
                break
            for pid in pids:
                os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.05)
        self.folder.rmdir()


def forget(folders: Iterable[Path]) -> None:
    """Drop the files below ``folders`` from the page cache, but for pages that a process maps."""
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""
