# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
import json
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vllm_subspec import __version__
from vllm_subspec.bench import kernel_rates
from vllm_subspec.cli import doctor
from vllm_subspec.cli.main import main
from vllm_subspec.machine import isa
from vllm_subspec.weights.kernels import native
from vllm_subspec.weights.kernels.compiler import BuildError

CPUINFO = """processor\t: 0
model name\t: Some CPU @ 2.50GHz
flags\t\t: fpu {flags}

processor\t: 1
model name\t: Another
flags\t\t: amx_bf16
"""


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs ``vllm-subspec`` in a process of its own, as a person does."""
    code = "import sys; from vllm_subspec.cli.main import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("doctor") / "not" / "yet"


def test_json_of_this_machine(store: Path) -> None:
    done = command("doctor", "--json", "--store-dir", str(store))
    report = json.loads(done.stdout)  # nothing else is on the standard output
    failures = [f for f in report["findings"] if f["status"] == "FAIL"]
    assert done.returncode == (1 if failures else 0)
    assert report["ok"] == (not failures)
    assert all(f["advice"] for f in failures)
    found = {f["name"]: f for f in report["findings"]}
    assert found["vllm"]["value"].startswith("0.32.")
    assert found["vllm-subspec"]["value"] == __version__
    assert found["CPU cores" if "CPU cores" in found else "cuda:0"]["value"]
    assert found["host memory, read + write"]["value"] > 0.5  # GB/s
    disk = found.get("direct reads") or found["buffered reads"]
    assert disk["value"] > 0.01
    assert {f["status"] for f in report["findings"] if f["section"] == "seams"} == {"ok"}
    assert not store.exists()
    assert list(store.parent.parent.iterdir()) == []  # the probe is gone


def test_each_failure_is_one_line_and_the_status_is_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store_dir that is a file, and a seam that vLLM does not have, are wrong on any machine."""
    from vllm_subspec.engine import seams

    monkeypatch.setitem(seams.SEAMS, "vllm.config:VllmConfig.no_such_seam", None)
    file = tmp_path / "file"
    file.write_text("")
    assert main(["doctor", "--store-dir", str(file)]) == 1
    lines = capsys.readouterr().out.splitlines()
    (store_line,) = [line for line in lines if line.startswith("FAIL store")]
    assert str(file) in store_line
    assert store_line.endswith(": name a directory with --store-dir")
    (seam_line,) = [line for line in lines if line.startswith("FAIL seams")]
    assert "no_such_seam" in seam_line


def test_disk_full_is_a_failure_with_advice(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
        findings = list(doctor.store(str(tmp_path)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert findings[-1].status == "FAIL"
    assert "File too large" in findings[-1].line()
    assert "\n" not in findings[-1].line()
    assert list(tmp_path.iterdir()) == []


def test_cuda_companions_beside_a_cpu_torch() -> None:
    installed = {"torchvision": "0.28.0", "torchaudio": "2.11.0+cpu"}
    findings = list(doctor.torch_companions(None, installed))
    assert [f.status for f in findings] == ["FAIL", "ok"]
    assert findings[0].line().endswith("pip uninstall -y torchvision")
    assert [f.status for f in doctor.torch_companions("13.0", installed)] == ["ok", "ok"]


def test_cpu_flags_that_decide() -> None:
    name, flags = doctor.cpu_flags(CPUINFO.format(flags="avx avx2 avx512_vnni"), "x86_64")
    assert name.value == "Some CPU @ 2.50GHz"
    assert (flags.value, flags.status) == ("avx2 avx512_vnni", "ok")
    assert list(doctor.cpu_flags(CPUINFO.format(flags="avx"), "x86_64"))[1].status == "FAIL"
    assert list(doctor.cpu_flags("processor\t: 0\n", "aarch64"))[1].status == "ok"


def test_a_bad_cap_on_instructions_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> dict[str, doctor.Finding]:
        return {finding.name: finding for finding in doctor.instructions()}

    monkeypatch.setenv(isa.VARIABLE, "nonsense")
    failure = found()["CPU level, at most"]
    assert failure.status == "FAIL"
    assert failure.value == "VLLM_SUBSPEC_MAX_CPU_ISA is 'nonsense', which is no level"
    assert failure.advice.startswith("unset it, or set it to one that this CPU has (")
    monkeypatch.delenv(isa.VARIABLE)
    assert found()["CPU level, at most"].value == "not set"
    assert found()["torch's kernels"].value == torch.backends.cpu.get_cpu_capability()


@pytest.mark.parametrize(
    ("binding", "cores", "threads", "status"),
    [
        (None, 2, 2, "FAIL"),  # vLLM leaves one of them to its front end
        (None, 4, 4, "hint"),
        (None, 1, 1, "ok"),
        (None, 64, 64, "ok"),
        ("0-1", 2, 2, "ok"),
        ("0-1", 2, 1, "FAIL"),
        (None, 64, 1, "FAIL"),
    ],
)
def test_fewer_threads_than_cores_are_told(
    binding: str | None, cores: int, threads: int, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    if binding:
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", binding)
    found = next(iter(doctor.thread_hints(cores, threads)))
    assert found.status == status
    if status != "ok":
        assert (
            f"VLLM_CPU_OMP_THREADS_BIND=0-{cores - 1} and OMP_NUM_THREADS={cores}" in found.advice
        )


def test_kernels_are_shown_with_their_shares() -> None:
    found = {finding.name: finding for finding in doctor.kernels()}
    assert found["own kernels"].value in native.levels()
    for what in ("4 bits", "8 bits", "full precision"):
        for tokens in ("1 token", "8 tokens", "32 tokens"):
            (one,) = [f for n, f in found.items() if n.startswith(what) and n.endswith(tokens)]
            assert isinstance(one.value, float)
            assert one.value > 0
            assert re.fullmatch(r"GB/s, \d+% of memory, \d+% of float32", one.unit)


def test_missing_kernels_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise BuildError("no C++ compiler: g++ (No such file or directory)")

    monkeypatch.setattr(native, "load", missing)
    monkeypatch.setattr(kernel_rates, "chosen", dict)
    first = next(iter(doctor.kernels()))
    assert (first.status, first.name) == ("FAIL", "own kernels")
    assert str(first.value).startswith("no C++ compiler")
    assert "install g++" in first.advice


def test_plugin_switched_off_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    plugin = [f for f in doctor.versions() if f.name == "vLLM plugin"]
    assert [f.status for f in plugin] == ["FAIL"]


def test_help_and_version_import_no_engine(capsys: pytest.CaptureFixture[str]) -> None:
    done = command("--version")
    assert (done.returncode, done.stdout.strip()) == (0, __version__)
    code = (
        "import sys; from vllm_subspec.cli.main import main\n"
        "try: main(['--help'])\n"
        "finally: assert not {'torch', 'vllm'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "quantize" in done.stdout
    assert "doctor" in done.stdout
    with pytest.raises(SystemExit) as caught:
        main(["cure"])
    assert caught.value.code == 2
    assert "cure" in capsys.readouterr().err
