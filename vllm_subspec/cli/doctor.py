# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""``vllm-subspec doctor``: what this machine has, how fast it is, and what is wrong with it.

The exit status is 1 when something is wrong; each such thing is one line, ``FAIL ...: what to do``.
A hint costs speed or memory only and leaves the status at 0.
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch
from packaging.specifiers import SpecifierSet

from vllm_subspec import __version__
from vllm_subspec.bench.bandwidth import PROBE_BYTES, direct_read_rate, memory_rates
from vllm_subspec.config import METHODS, SubspecOptions
from vllm_subspec.machine import isa, rates
from vllm_subspec.weights.store_format import StoreReadError

SUPPORTED_VLLM = SpecifierSet(">=0.32,<0.33")
CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


@dataclass(frozen=True)
class Finding:
    section: str
    name: str
    value: str | float
    unit: str = ""
    status: Literal["ok", "hint", "FAIL"] = "ok"
    advice: str = ""  # what to do, of a hint or a failure

    def line(self) -> str:
        value = f"{self.value:.2f}" if isinstance(self.value, float) else self.value
        if self.status == "FAIL":
            return f"FAIL {self.section}: {self.name}: {value}: {self.advice}"
        line = f"  {self.name:<38} {value} {self.unit}".rstrip()
        return f"{line}\n  {'hint:':<38} {self.advice}" if self.status == "hint" else line


def fail(section: str, name: str, value: str, advice: str) -> Finding:
    return Finding(section, name, value, status="FAIL", advice=advice)


def versions() -> Iterator[Finding]:
    section = "versions"
    yield Finding(section, "python", platform.python_version())
    yield Finding(section, "vllm-subspec", __version__)
    yield Finding(section, "torch", torch.__version__)
    try:
        version = metadata.version("vllm")
    except metadata.PackageNotFoundError:
        advice = f"install vllm{SUPPORTED_VLLM}, or on a CPU run `make setup` in the repository"
        yield fail(section, "vllm", "not installed", advice)
    else:
        if SUPPORTED_VLLM.contains(version, prereleases=True):
            yield Finding(section, "vllm", version)
        else:
            advice = f"install vllm{SUPPORTED_VLLM}; the hooks of this release fit no other"
            yield fail(section, "vllm", version, advice)

    plugins = metadata.entry_points(group="vllm.general_plugins")
    names = [plugin.name for plugin in plugins if plugin.value.startswith("vllm_subspec.")]
    allowed = os.environ.get("VLLM_PLUGINS")
    if not names:
        advice = "install vllm-subspec with pip into the environment that runs vLLM"
        yield fail(section, "vLLM plugin", "not registered", advice)
    elif allowed is not None and names[0] not in allowed.split(","):
        advice = f"add {names[0]} to VLLM_PLUGINS or unset it"
        value = f"switched off by VLLM_PLUGINS={allowed}"
        yield fail(section, "vLLM plugin", value, advice)
    else:
        yield Finding(section, "vLLM plugin", names[0])


def torch_companions(torch_cuda: str | None, installed: dict[str, str]) -> Iterator[Finding]:
    """CUDA builds of torch's companion packages beside a CPU build of torch fail when imported.

    Args:
        torch_cuda: ``torch.version.cuda``; None for a CPU build.
        installed: versions of the companions that are installed.
    """
    for name, version in installed.items():
        if torch_cuda is None and not version.endswith("+cpu"):
            value = f"{version} is not a CPU build, torch is"
            advice = f"pip uninstall -y {name}"
            yield fail("versions", name, value, advice)
        else:
            yield Finding("versions", name, version)


def _installed(*names: str) -> dict[str, str]:
    found = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def seams() -> Iterator[Finding]:
    from vllm.platforms import current_platform

    from vllm_subspec.engine.seams import PLATFORMS, check_seams

    platform = current_platform.device_type
    if platform not in PLATFORMS:
        yield fail("seams", "platform", platform, "use a machine on which vLLM runs on CPU or CUDA")
        return
    reports = {seam.name: seam for method in METHODS for seam in check_seams(method, platform)}
    for report in reports.values():
        if report.ok:
            yield Finding("seams", report.name, report.detail or "found")
        else:
            advice = "the installed vLLM differs from the one supported; reinstall it"
            yield fail("seams", report.name, report.detail, advice)


def device() -> Iterator[Finding]:
    section = "device"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0))
    yield Finding(section, "host memory", memory, "GiB")
    yield Finding(section, "CPU cores", str(cores))
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            value = f"{gpu.name}, {gpu.total_memory / 2**30:.1f} GiB, sm_{gpu.major}{gpu.minor}"
            yield Finding(section, f"cuda:{index}", value)
        return
    if os.path.exists("/dev/nvidia0"):
        value = f"not usable by torch {torch.__version__}"
        advice = f"install vllm{SUPPORTED_VLLM}, which brings a CUDA torch, and check the driver"
        yield fail(section, "NVIDIA GPU", value, advice)
    yield from cpu_flags(Path("/proc/cpuinfo").read_text(), platform.machine())
    yield from instructions()
    yield from thread_hints(cores, torch.get_num_threads())
    yield from kernels()


def kernels() -> Iterator[Finding]:
    """The kernels that an engine takes on this CPU, and their rates with all threads."""
    section = "kernels"
    from vllm_subspec.bench import kernel_rates  # imports vLLM
    from vllm_subspec.weights.kernels import native
    from vllm_subspec.weights.kernels.compiler import BuildError

    try:
        yield Finding(section, "own kernels", native.load())
    except BuildError as error:
        advice = (
            "install g++ (or set CXX), or a wheel that has them; until then drafting and streamed "
            "layers are several times slower"
        )
        yield fail(section, "own kernels", str(error), advice)
    with torch.inference_mode():
        found, float32 = kernel_rates.chosen(), rates.float32_rate()
    yield Finding(section, "float32 product", float32 / 1e9, "GFLOP/s")
    for what, several in found.items():
        for rate in several:
            unit = (
                f"GB/s, {rate.share_of_reading:.0%} of memory, "
                f"{rate.share_of_arithmetic(float32):.0%} of float32"
            )
            name = f"{what}, {rate.tokens} token{'s' if rate.tokens > 1 else ''}"
            yield Finding(section, name, rate.nbytes / rate.median / 1e9, unit)


def cpu_flags(cpuinfo: str, machine: str) -> Iterator[Finding]:
    """Instruction sets that decide which of vLLM's CPU kernels run."""
    first = cpuinfo.split("\n\n")[0].splitlines()
    fields = {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first)
    }
    flags = set(fields.get("flags", "").split())
    present = " ".join(flag for flag in CPU_FLAGS if flag in flags)
    yield Finding("device", "CPU", fields.get("model name", machine))
    if machine == "x86_64" and "avx2" not in flags:
        advice = "vLLM's CPU kernels need at least AVX2; use another machine"
        yield fail("device", "CPU flags", "no avx2", advice)
    else:
        yield Finding("device", "CPU flags", present or "none of those looked for")


def instructions() -> Iterator[Finding]:
    """The level of this CPU, the cap on it, and what the libraries make of both."""
    section, machine = "device", isa.machine_level()
    yield Finding(section, "CPU level", "none" if machine is None else machine.name)
    try:
        isa.check()
    except ValueError as error:
        problem, _, advice = str(error).partition(": ")
        yield fail(section, "CPU level, at most", problem, advice)
    else:
        yield Finding(section, "CPU level, at most", os.environ.get(isa.VARIABLE) or "not set")
    yield Finding(section, "torch's kernels", torch.backends.cpu.get_cpu_capability())
    yield Finding(section, "vLLM's library", isa.loaded_vllm_library() or "none loaded")
    for name in isa.VALUES:
        if name in os.environ:
            yield Finding(section, name, os.environ[name])


def thread_hints(cores: int, threads: int) -> Iterator[Finding]:
    """Whether an engine computes with all cores.

    Args:
        threads: of torch in this process.
    """
    binding = os.environ.get("VLLM_CPU_OMP_THREADS_BIND")
    variables = f"VLLM_CPU_OMP_THREADS_BIND=0-{cores - 1} and OMP_NUM_THREADS={cores}"
    if threads == 1 < cores:
        advice = f"passes take up to {cores} times as long as need be; set {variables}"
        yield fail("device", "threads", f"1 on {cores} cores", advice)
    elif binding is None and cores == 2:
        advice = f"vLLM leaves one of two cores to its front end; set {variables}"
        yield fail("device", "thread binding", "automatic", advice)
    elif binding is None and 2 < cores <= 4:
        advice = f"vLLM leaves one core to its front end; with few cores set {variables}"
        yield Finding("device", "thread binding", "automatic", status="hint", advice=advice)
    else:
        yield Finding("device", "thread binding", binding or "automatic")
    library = Path(sys.prefix) / "lib" / "libiomp5.so"
    preload = os.environ.get("LD_PRELOAD", "")
    if library.exists() and "libiomp5" not in preload:
        advice = f"LD_PRELOAD={library} is a little faster than the OpenMP that vLLM preloads"
        yield Finding("device", "LD_PRELOAD", preload or "unset", status="hint", advice=advice)
    else:
        yield Finding("device", "LD_PRELOAD", preload or "unset")


def bandwidths() -> Iterator[Finding]:
    for name, rate in memory_rates().items():
        yield Finding("bandwidth", name, rate / 1e9, "GB/s")


def store(store_dir: str | None) -> Iterator[Finding]:
    """The directory of the weight stores, and how fast it is read."""
    try:
        folder = path = SubspecOptions.parse({"store_dir": store_dir}).store_path()
    except ValueError as error:
        yield fail("store", "directory", str(error), "name a directory with --store-dir")
        return
    while not folder.exists():
        folder = folder.parent
    yield Finding("store", "directory", str(path))
    yield Finding("store", "free", shutil.disk_usage(folder).free / 2**30, "GiB")
    try:
        rate, direct = direct_read_rate(folder)
    except (OSError, StoreReadError) as error:
        value = f"no probe of {PROBE_BYTES >> 20} MiB in {folder}: {error}"
        yield fail("store", "reads", value, "name a writable directory with space as store_dir")
        return
    if direct:
        yield Finding("store", "direct reads", rate / 1e9, "GB/s")
    else:
        advice = "this file system has no O_DIRECT; put store_dir on a local disk"
        yield Finding("store", "buffered reads", rate / 1e9, "GB/s", "hint", advice)


def examine(store_dir: str | None) -> Iterator[Finding]:
    yield from versions()
    yield from torch_companions(
        torch.version.cuda, _installed("torchvision", "torchaudio", "torchcodec")
    )
    yield from seams()
    yield from device()
    yield from bandwidths()
    yield from store(store_dir)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--store-dir", help="directory of the weight store (default: vLLM's cache)")


def run(args: argparse.Namespace) -> int:
    """Prints the findings; 0 when nothing is wrong, else 1."""
    # vLLM logs to the standard output that it finds when it is imported.
    with contextlib.redirect_stdout(sys.stderr):
        findings = list(examine(args.store_dir))
    healthy = all(finding.status != "FAIL" for finding in findings)
    if args.json:
        print(json.dumps({"ok": healthy, "findings": [asdict(f) for f in findings]}, indent=2))
        return 0 if healthy else 1
    section = ""
    for finding in (f for f in findings if f.status != "FAIL"):
        if finding.section != section:
            section = finding.section
            print(section)
        print(finding.line())
    for finding in (f for f in findings if f.status == "FAIL"):
        print(finding.line())
    if healthy:
        print("all is well")
    return 0 if healthy else 1
