# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""`vllm-subspec plan --k8s`: a component that says what the plan says."""

import math
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from vllm_subspec.cli.kubernetes import PROBE_PERIOD, size_pod
from vllm_subspec.cli.main import main
from vllm_subspec.core.plan import GIB, Budget, ModelSizes, plan_memory

ROOT = Path(__file__).resolve().parents[2]
KUSTOMIZE = ROOT / "deploy" / "kustomize"
SMALL = str(ROOT / "tests/unit/configs/qwen2.5-7b")


def patched(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """Patches by the name of what they patch."""
    assert main(["plan", SMALL, *arguments]) == 0
    component = yaml.safe_load(capsys.readouterr().out)
    assert component["kind"] == "Component"
    found = {}
    for patch in component["patches"]:
        value = yaml.safe_load(patch["patch"])
        head = patch["target"] if isinstance(value, list) else {**value["metadata"], **value}
        found[f"{head['kind']} {head['name']}"] = value
    return found


def container(patches: dict[str, Any]) -> dict[str, Any]:
    spec = patches["Deployment vllm-subspec"]["spec"]["template"]["spec"]
    (found,) = spec["containers"]
    return found


def gib(quantity: str) -> int:
    assert quantity.endswith("Gi")
    return int(quantity[:-2])


@pytest.mark.parametrize("overlay", ["gpu-24gb", "cpu-disk", "ray"])
def test_the_committed_plans_are_the_commands(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, overlay: str
) -> None:
    monkeypatch.chdir(ROOT)
    text = (KUSTOMIZE / "overlays" / overlay / "plan" / "kustomization.yaml").read_text()
    command = text.splitlines()[1].removeprefix("# ")
    program, *arguments = shlex.split(command)
    assert program == "vllm-subspec"
    assert main(arguments) == 0
    assert capsys.readouterr().out == text, f"run again: {command}"


def test_the_probe_asks_as_often_as_the_plan_counts() -> None:
    deployment = yaml.safe_load((KUSTOMIZE / "base" / "deployment.yaml").read_text())
    (found,) = deployment["spec"]["template"]["spec"]["containers"]
    assert found["startupProbe"]["periodSeconds"] == PROBE_PERIOD


def sized(target: Any, ranks: int = 1, source: str = "host") -> tuple[Any, Any]:
    sizes = ModelSizes([GIB] * 20, [GIB // 4] * 20, 2 * GIB, 1 << 18, GIB)
    plan = plan_memory(sizes, Budget(12 * GIB, 2048))
    return plan, size_pod(target, plan, ranks, source)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_pinned_weights_fit_into_host_memory(ranks: int) -> None:
    plan, pod = sized("gpu", ranks)
    assert plan.streamed
    assert pod.memory > ranks * plan.store_bytes + pod.shared_memory
    assert pod.gpus == ranks
    assert pod.models > ranks * 22 * GIB


def test_streamed_from_disk_only_a_little_is_pinned() -> None:
    plan, pod = sized("gpu", source="disk")
    assert pod.memory < sized("gpu")[1].memory - plan.store_bytes + 3 * GIB
    assert pod.stores >= 2 * (plan.store_bytes + plan.substitute_bytes)
    assert pod.start["writing the store"] > 0


def test_without_a_gpu_the_plan_is_the_memory() -> None:
    plan, pod = sized("cpu", source="disk")
    assert pod.gpus == 0
    assert pod.memory > plan.total + pod.shared_memory


@pytest.mark.parametrize("memory", ["12GiB", "30GiB"])
def test_without_a_gpu_the_engine_may_use_what_was_planned(
    capsys: pytest.CaptureFixture[str], memory: str
) -> None:
    found = container(patched(capsys, "--device-memory", memory, "--k8s", "cpu"))
    given = dict(zip(found["args"][1::2], found["args"][2::2], strict=True))
    share = float(given["--gpu-memory-utilization"])
    assert share < 1
    main(["plan", SMALL, "--device-memory", memory, "--k8s", "cpu"])
    told = next(line for line in capsys.readouterr().out.splitlines() if "# total " in line)
    assert share * gib(found["resources"]["limits"]["memory"]) > float(told.split()[2])


def test_the_deployment(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device-memory", "8GiB", "--max-model-len", "2048", "--k8s", "gpu"]
    patches = patched(capsys, *arguments, "--tensor-parallel-size", "2", "--model-name", "A/B")
    found = container(patches)
    assert found["args"][0] == "A/B"
    given = dict(zip(found["args"][1::2], found["args"][2::2], strict=True))
    assert given["--tensor-parallel-size"] == "2"
    assert given["--max-model-len"] == "2048"
    # Of Qwen2.5-7B: 28 layers, 4 K/V heads of 128, two bytes, shared by two ranks.
    assert int(given["--kv-cache-memory-bytes"]) >= 2048 * 28 * 2 * 2 * 128 * 2
    assert found["resources"]["limits"] == found["resources"]["requests"]
    assert found["resources"]["limits"]["nvidia.com/gpu"] == "2"
    claim = patches["PersistentVolumeClaim vllm-subspec-models"]["spec"]
    assert gib(claim["resources"]["requests"]["storage"]) > 7.6e9 * 2 / GIB


@pytest.mark.parametrize("target", ["gpu", "cpu"])
def test_requests_may_end_before_the_pod_does(
    capsys: pytest.CaptureFixture[str], target: str
) -> None:
    """vLLM aborts them at once unless told; what is left is for the engine to end in."""
    found = container(patched(capsys, "--device-memory", "12GiB", "--k8s", target))
    given = dict(zip(found["args"][1::2], found["args"][2::2], strict=True))
    timeout = int(given["--shutdown-timeout"])
    deployment = yaml.safe_load((KUSTOMIZE / "base" / "deployment.yaml").read_text())
    pod = deployment["spec"]["template"]["spec"]
    sleep = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert timeout >= 60
    assert sleep + timeout <= pod["terminationGracePeriodSeconds"] - 15


@pytest.mark.parametrize("target", ["gpu", "cpu"])
def test_a_rollout_waits_for_a_slow_start(capsys: pytest.CaptureFixture[str], target: str) -> None:
    patches = patched(capsys, "--device-memory", "12GiB", "--k8s", target)
    start = container(patches)["startupProbe"]["failureThreshold"] * PROBE_PERIOD
    deadline = patches["Deployment vllm-subspec"]["spec"]["progressDeadlineSeconds"]
    assert deadline >= start + 300  # an image of 10 GB is fetched before it


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("target", ["gpu", "cpu", "ray"])
def test_cpus_follow_the_ranks(capsys: pytest.CaptureFixture[str], target: str, ranks: int) -> None:
    arguments = ["--device-memory", "12GiB", "--tensor-parallel-size", str(ranks)]
    patches = patched(capsys, *arguments, "--k8s", target)
    if target == "ray":
        operations = patches["RayService vllm-subspec"]
        values = {each["path"]: each["value"] for each in operations}
        found = [value for path, value in values.items() if path.endswith("/cpu")]
        assert found == [str(4 + 2 * ranks)] * 2
        return
    resources = container(patches)["resources"]
    assert resources["requests"] == resources["limits"]
    cpus = int(resources["limits"]["cpu"])
    if target == "gpu":
        assert cpus == 2 + 2 * ranks
        assert "env" not in container(patches)
    else:
        (threads,) = container(patches)["env"]
        assert threads == {"name": "OMP_NUM_THREADS", "value": str(cpus // ranks)}
        assert cpus == 16 * ranks


def test_more_is_slower_to_start(capsys: pytest.CaptureFixture[str]) -> None:
    _, gpu = sized("gpu")
    _, cpu = sized("cpu", source="disk")
    assert sum(cpu.start.values()) > sum(gpu.start.values())
    patches = patched(capsys, "--device-memory", "12GiB", "--k8s", "cpu")
    failures = container(patches)["startupProbe"]["failureThreshold"]
    assert failures > math.ceil(7.6e9 * 2 / 50e6 / PROBE_PERIOD)  # fetching alone


def test_the_ray_service(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device-memory", "8GiB", "--max-model-len", "2048"]
    operations = patched(capsys, *arguments, "--k8s", "ray")["RayService vllm-subspec"]
    values = {operation["path"]: operation["value"] for operation in operations}
    (application,) = yaml.safe_load(values["/spec/serveConfigV2"])["applications"]
    assert application["args"]["model"] == SMALL
    assert application["args"]["speculative_config"]["method"] == "subspec"
    assert application["args"]["engine"]["max_model_len"] == 2048
    (memory,) = {gib(value) for path, value in values.items() if path.endswith("memory")}
    plain = container(patched(capsys, *arguments, "--k8s", "gpu"))["resources"]["limits"]["memory"]
    assert memory > gib(plain)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--k8s", "gpu"], "--k8s plans for another machine: give its --device-memory"),
        (["--k8s", "cpu", "--device-memory", "1GiB"], "give it more memory"),
    ],
)
def test_refusals(capsys: pytest.CaptureFixture[str], arguments: list[str], says: str) -> None:
    assert main(["plan", SMALL, *arguments]) == 2
    told = capsys.readouterr()
    assert says in told.err
    assert not told.out
