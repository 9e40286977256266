# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""deploy/kustomize passes its check, and the check finds what is wrong, also without kubectl."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("kubernetes_validate", reason="the test extra is not installed")

from scripts.manifests import kustomize  # noqa: E402
from scripts.manifests.__main__ import ROOT, check  # noqa: E402
from scripts.manifests.schemas import parse  # noqa: E402

MANIFESTS = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.yaml"))
DEPTHS = (1, 2, 4, 7)
needs_kubectl = pytest.mark.skipif(kustomize.kubectl() is None, reason="no kubectl here")


@pytest.fixture
def manifests(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ROOT, tmp_path / "kustomize"))


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text, f"{path} says no {old}"
    path.write_text(text.replace(old, new))


def test_all_is_well() -> None:
    assert check(rendering=False) == []


@needs_kubectl
def test_what_is_rendered_is_well(manifests: Path) -> None:
    assert check(rendering=True) == []
    # Each file is right, but what is left is not.
    patch = "apiVersion: v1\nkind: Service\nmetadata:\n  name: vllm-subspec\n$patch: delete\n"
    (manifests / "overlays/cpu-disk/cpu.yaml").write_text(patch)
    assert check(manifests, rendering=False) == []
    found = check(manifests, rendering=True)
    assert any("ServiceMonitor vllm-subspec: selects nothing" in problem for problem in found)


def objects(value: Any, depth: int) -> Iterator[dict[Any, Any]]:
    """Objects ``depth`` levels below ``value`` whose keys a schema names."""
    if depth == 0 and isinstance(value, dict):
        yield value
    elif isinstance(value, dict):
        for key, child in value.items():
            if key not in FREE:
                yield from objects(child, depth - 1)
    elif isinstance(value, list):
        for child in value:
            yield from objects(child, depth)


# Their keys are the author's, or another program's.
FREE = {"labels", "matchLabels", "requests", "limits", "rayStartParams", "annotations"}


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("name", MANIFESTS, ids=str)
def test_a_misspelt_key(manifests: Path, name: Path, depth: int) -> None:
    """In the last object at that depth of each document, without kubectl's help."""
    documents = parse((manifests / name).read_text())
    count = len(documents)
    for index in range(count):
        changed = parse((ROOT / name).read_text())
        places = list(objects(changed[index], depth - 1))
        if not places or not places[-1]:
            continue
        place = places[-1]
        key = next(reversed(place))
        place[f"{key}z"] = place.pop(key)
        (manifests / name).write_text(yaml.safe_dump_all(changed, sort_keys=False))
        assert check(manifests, rendering=False), f"{key}z in document {index} of {name}"


DEPLOYMENT = "base/deployment.yaml"
RAY = "overlays/ray/service.yaml"
WRONG: dict[str, tuple[str, str, str, str]] = {
    "type": (DEPLOYMENT, "periodSeconds: 5", "periodSeconds: often", "integer"),
    "type in a custom resource": (RAY, "minReplicas: 1", "minReplicas: one", "integer"),
    "type in a pod of a custom resource": (RAY, "runAsUser: 10001", "runAsUser: me", "integer"),
    "label of a custom resource's pod": (RAY, "          labels:", "          lables:", "lables"),
    "type in a patch": ("overlays/cpu-disk/cpu.yaml", "replicas: 1", "replicas: one", "integer"),
    "unknown kind": ("base/service.yaml", "kind: Service", "kind: Servise", "unknown kind"),
    "kind's case": ("base/service.yaml", "kind: Service", "kind: service", "service"),
    "unknown version": (DEPLOYMENT, "apps/v1", "apps/v1beta9", "unknown kind"),
    "group": (DEPLOYMENT, "apps/v1", "apps.example.com/v1", "apps.example.com"),
    "unknown custom kind": (RAY, "kind: RayService", "kind: RayServise", "unknown kind"),
    "missing file": ("base/kustomization.yaml", "service.yaml", "services.yaml", "No such file"),
    "forgotten file": ("base/kustomization.yaml", "  - service.yaml\n", "", "names this file"),
    "key given twice": (DEPLOYMENT, "kind: Deployment", "kind: Deployment\nkind: Pod", "twice"),
    "no YAML": (DEPLOYMENT, "kind: Deployment", "kind: [", "no YAML"),
    "autoscaler's target": (
        *("base/autoscaler.yaml", "    name: vllm-subspec\n  min"),
        *("    name: vllm-subspek\n  min", "vllm-subspek, which is not there"),
    ),
    "service's labels": (
        *("base/service.yaml", "component: server\n  ports"),
        *("component: servers\n  ports", "selects nothing"),
    ),
    "service's port": ("base/service.yaml", "targetPort: http", "targetPort: web", "port web"),
    "monitor's port": ("base/monitor.yaml", "port: http", "port: web", "port web"),
    "monitor's labels": (
        *("base/monitor.yaml", "component: server"),
        *("component: servers", "selects nothing"),
    ),
    "policy's port": ("base/network.yaml", "port: http", "port: web", "port web"),
    "policy's pods": (
        *("base/network.yaml", "component: server"),
        *("component: servers", "selects nothing"),
    ),
    "budget's labels": (
        *("base/disruption.yaml", "component: server"),
        *("component: servers", "selects nothing"),
    ),
    "peer": (
        *("overlays/ray/network.yaml", "component: ray\n    # Names"),
        *("component: rays\n    # Names", "of which there are none"),
    ),
    "pod monitor's port": ("overlays/ray/monitor.yaml", "port: metrics", "port: metric", "metric"),
    "deployment's labels": (
        *(DEPLOYMENT, "component: server\n  strategy"),
        *("component: servers\n  strategy", "other labels"),
    ),
    "probe's port": (DEPLOYMENT, "port: http\n            periodSeconds: 10", "port: web", "web"),
    "mount": (
        *(DEPLOYMENT, "name: shm\n              mountPath"),
        *("name: shn\n              mountPath", "no volume"),
    ),
    "claim": (DEPLOYMENT, "claimName: vllm-subspec-models", "claimName: models", "not there"),
    "claim of a custom resource": (RAY, "claimName: vllm-subspec-m", "claimName: m", "claims m"),
    "secret": (DEPLOYMENT, "key: api-key", "key: api_key", "no secret"),
    "image without a tag": (RAY, "vllm-subspec:0.1.0-ray", "vllm-subspec", "no fixed tag"),
    "latest image": (RAY, "vllm-subspec:0.1.0-ray", "vllm-subspec:latest", "no fixed tag"),
    "latest tag": ("overlays/gpu-24gb/kustomization.yaml", "0.1.0-gpu", "latest", "latest"),
    "other image": ("overlays/gpu-24gb/kustomization.yaml", "- name: vllm", "- name: wllm", "tag"),
    "patch's target": (
        *("overlays/gpu-24gb/gpu.yaml", "name: vllm-subspec"),
        *("name: vllm", "0 objects are Deployment vllm"),
    ),
    "pointer to nothing": (
        *("overlays/ray/plan/kustomization.yaml", "requests/memory"),
        *("requests/memori", "points to nothing"),
    ),
    "value at a pointer": (
        *("overlays/ray/plan/kustomization.yaml", "value: 2Gi"),
        *("value: [2Gi]", "sizeLimit"),
    ),
    "argument of the application": (
        *("overlays/ray/plan/kustomization.yaml", "model: Qwen"),
        *("modell: Qwen", "modell"),
    ),
    "application": ("overlays/ray/plan/kustomization.yaml", "ray_serve:app", "ray_serve:ap", "app"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_found(manifests: Path, what: str) -> None:
    name, old, new, says = WRONG[what]
    replace(manifests / name, old, new)
    found = check(manifests, rendering=False)
    assert any(says in problem for problem in found), found


def test_a_folder_without_overlays(tmp_path: Path) -> None:
    assert "no overlays" in check(tmp_path)[0]


def rendered(overlay: str) -> list[dict[str, Any]]:
    if kustomize.kubectl() is None:
        pytest.skip("no kubectl here")
    return kustomize.render(ROOT / "overlays" / overlay)


def of_kind(documents: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = [document for document in documents if document["kind"] == kind]
    return found


def containers(documents: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Pod specs with their containers."""
    for document in documents:
        if document["kind"] == "Deployment":
            templates = [document["spec"]["template"]]
        elif document["kind"] == "RayService":
            cluster = document["spec"]["rayClusterConfig"]
            groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
            templates = [group["template"] for group in groups]
        else:
            continue
        for template in templates:
            for container in template["spec"]["containers"]:
                yield template["spec"], container


OVERLAYS = [path.name for path in sorted((ROOT / "overlays").iterdir())]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_are_restricted(overlay: str) -> None:
    """The "restricted" pod security standard, and a root file system that nothing can write."""
    for spec, container in containers(rendered(overlay)):
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["requests"] == container["resources"]["limits"]
        shm = next(volume for volume in spec["volumes"] if volume["name"] == "shm")
        assert shm["emptyDir"]["medium"] == "Memory"
        memory = container["resources"]["limits"]["memory"]
        assert int(shm["emptyDir"]["sizeLimit"][:-2]) < int(memory[:-2])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_variables_are_read_by_someone(overlay: str) -> None:
    from vllm import envs

    elsewhere = {"HF_HOME", "HF_TOKEN", "TRITON_CACHE_DIR", "RAY_USAGE_STATS_ENABLED"}
    # Intel's OpenMP, which computes on a CPU.
    elsewhere |= {"OMP_NUM_THREADS", "KMP_BLOCKTIME"}
    known = envs.environment_variables.keys() | elsewhere
    for _, container in containers(rendered(overlay)):
        assert {variable["name"] for variable in container["env"]} <= known


def test_threads_take_no_more_than_the_cpus() -> None:
    """Each rank's are its share, and those that wait sleep: spinning counts, too."""
    ((_, container),) = containers(rendered("cpu-disk"))
    values = {variable["name"]: variable.get("value") for variable in container["env"]}
    given = dict(zip(container["args"][1::2], container["args"][2::2], strict=True))
    ranks = int(given.get("--tensor-parallel-size", 1))
    # vLLM sees to both only where it binds threads.
    assert values["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert values["KMP_BLOCKTIME"] == "5"
    assert container["resources"]["limits"]["cpu"] == str(ranks * int(values["OMP_NUM_THREADS"]))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_volumes_can_be_mounted_by_all_pods(overlay: str) -> None:
    """A disk of a node binds to nothing but ReadWriteOnce, which one pod at a time has."""
    documents = rendered(overlay)
    claims = [each for each in documents if each["kind"] == "PersistentVolumeClaim"]
    assert len(claims) == 2
    modes = {mode for claim in claims for mode in claim["spec"]["accessModes"]}
    if overlay != "cpu-disk":
        assert modes == {"ReadWriteMany"}
        return
    assert modes == {"ReadWriteOnce"}
    deployment = of_kind(documents, "Deployment")["spec"]
    assert deployment["replicas"] == 1
    assert deployment["strategy"]["rollingUpdate"]["maxSurge"] == 0
    assert not any(each["kind"] == "HorizontalPodAutoscaler" for each in documents)


@pytest.mark.parametrize("overlay", ["gpu-24gb", "cpu-disk"])
def test_a_rollout_waits_for_a_slow_start(overlay: str) -> None:
    deployment = of_kind(rendered(overlay), "Deployment")["spec"]
    probe = deployment["template"]["spec"]["containers"][0]["startupProbe"]
    start = probe["failureThreshold"] * probe["periodSeconds"]
    assert deployment["progressDeadlineSeconds"] > start


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_names_are_asked_for_anywhere(overlay: str) -> None:
    """A cache in the node's own network is no pod: no selector lets it through."""
    policy = of_kind(rendered(overlay), "NetworkPolicy")
    anywhere = [rule for rule in policy["spec"]["egress"] if "to" not in rule]
    open_ports = [(port["port"], port["protocol"]) for rule in anywhere for port in rule["ports"]]
    assert sorted(open_ports) == [(53, "TCP"), (53, "UDP"), (443, "TCP")]


def test_what_the_api_key_guards_is_told() -> None:
    from vllm.entrypoints.serve.middleware.authenticate import GUARDED_PREFIX

    before, _, _ = (ROOT / DEPLOYMENT).read_text().partition("- name: VLLM_API_KEY")
    comment = before.rpartition("env:")[2]
    guarded, _, left_open = comment.partition("All else")
    assert sorted(re.findall(r"/\w+", guarded)) == sorted(GUARDED_PREFIX)
    assert re.search(r"/invocations\b", left_open)


@pytest.mark.parametrize("overlay", ["gpu-24gb", "cpu-disk"])
def test_the_server_understands_its_arguments(overlay: str) -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_subspec.config import SubspecOptions

    deployment = of_kind(rendered(overlay), "Deployment")
    model, *arguments = deployment["spec"]["template"]["spec"]["containers"][0]["args"]
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(["--model", model, *arguments])
    options = dict(parsed.speculative_config)
    assert options.pop("method") == "subspec"
    SubspecOptions.parse(options)
    assert parsed.kv_cache_memory_bytes > 0


def test_the_ray_service_understands_its_arguments() -> None:
    from dataclasses import fields

    from vllm.engine.arg_utils import EngineArgs

    from vllm_subspec.config import SubspecOptions

    service = of_kind(rendered("ray"), "RayService")
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    options = dict(application["args"]["speculative_config"])
    assert options.pop("method") == "subspec"
    SubspecOptions.parse(options)
    assert application["args"]["engine"].keys() <= {field.name for field in fields(EngineArgs)}
