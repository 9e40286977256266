# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Print the environment in which vLLM's CPU backend is fastest on this machine, as shell code.

    eval "$(.venv/bin/python scripts/cpu_env.py)"           # one engine rank
    eval "$(.venv/bin/python scripts/cpu_env.py --ranks 2)" # tensor parallel over two ranks

Prints nothing that is already set, and nothing at all where the environment has no Intel OpenMP
(a CUDA installation). Run it with the interpreter of the virtual environment. Where
VLLM_SUBSPEC_MAX_CPU_ISA is set, the libraries' own variables for it are among what it prints: for
programs that use torch before its import has ended.
"""

from __future__ import annotations

import argparse
import ctypes.util
import glob
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from vllm_subspec.machine import isa

TCMALLOC_NAMES = ("tcmalloc_minimal", "tcmalloc")
TCMALLOC_FOLDERS = ("/usr/lib", "/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/local/lib")


def find_tcmalloc() -> str | None:
    """Path (or soname) of a tcmalloc the dynamic loader can preload, or None."""
    for name in TCMALLOC_NAMES:
        for folder in TCMALLOC_FOLDERS:
            if found := sorted(glob.glob(f"{folder}/lib{name}.so*")):
                return found[0]
        if soname := ctypes.util.find_library(name):
            return soname
    return None


def split_cores(cores: Sequence[int], ranks: int) -> list[list[int]]:
    """Consecutive, equal shares of `cores`; a remainder goes unused so that ranks stay in step."""
    if not 1 <= ranks <= len(cores):
        raise ValueError(f"--ranks is {ranks}: give a number from 1 to {len(cores)}, one core each")
    share = len(cores) // ranks
    return [list(cores[rank * share : (rank + 1) * share]) for rank in range(ranks)]


def cpu_environment(
    openmp: Path, tcmalloc: str | None, cores: Sequence[int], ranks: int, current: Mapping[str, str]
) -> dict[str, str]:
    """Variables to set, beside those `current` has.

    Why each: vLLM leaves one core to the front end, which on a small machine halves the threads
    that compute, so the binding names every core; Intel OpenMP wakes its threads sooner than GNU's;
    vLLM allocates small tensors in each step, where tcmalloc beats glibc's malloc; which otherwise
    has an arena for each thread, over which a server's memory is strewn until it looks like a leak.
    """
    shares = split_cores(cores, ranks)
    wanted = {
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(",".join(map(str, s)) for s in shares),
        "OMP_NUM_THREADS": str(len(shares[0])),
        "LD_PRELOAD": ":".join([str(openmp), *([tcmalloc] if tcmalloc else [])]),
    }
    if not tcmalloc:
        wanted["MALLOC_ARENA_MAX"] = "1"
    return {name: value for name, value in wanted.items() if name not in current}


def main() -> int:
    parser = argparse.ArgumentParser(description="Print the fast CPU environment as shell code.")
    parser.add_argument("--ranks", type=int, default=1, help="engine ranks sharing the cores")
    arguments = parser.parse_args()
    openmp = Path(sys.prefix) / "lib" / "libiomp5.so"
    if not openmp.exists():
        return 0
    cores = sorted(os.sched_getaffinity(0))
    try:
        found = cpu_environment(openmp, find_tcmalloc(), cores, arguments.ranks, os.environ)
        if (asked := isa.cap()) is not None:
            found |= isa.environment(asked, os.environ)
    except ValueError as error:
        print(f"cpu_env: {error}", file=sys.stderr)
        return 1
    for name, value in found.items():
        print(f"export {name}={shlex.quote(value)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
