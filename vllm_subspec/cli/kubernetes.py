# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""A memory plan as a Kustomize component: the sizes that a pod and its volumes need.

It patches the objects of deploy/kustomize: a Deployment or a RayService, and two volume claims.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from vllm_subspec.core.plan import GIB, MemoryPlan

Target = Literal["gpu", "cpu", "ray"]
NAME = "vllm-subspec"  # of the Deployment or RayService, and where the claims' names begin

# Host memory of a process that has imported vLLM, beside weights and KV cache. Measured without
# CUDA: 0.6 GiB. For CUDA's libraries and contexts an estimate: not measured.
_PROCESS = {"gpu": 4 * GIB, "cpu": GIB, "ray": 4 * GIB}
_RAY = 3 * GIB  # raylet, agents and proxy
_OBJECT_STORE = GIB  # of Ray, in /dev/shm: "object-store-memory" of the RayService
_CACHES = 8 * GIB  # compiled kernels and graphs, beside the weight stores
# CPUs: of a pod's own processes, and of each rank. With a GPU a rank only issues its work.
_CPUS = {"gpu": (2, 2), "cpu": (0, 16), "ray": (4, 2)}
# Seconds for requests to end in before the engine does. With the sleep of base/deployment.yaml
# before them they stay below its grace period, and leave it some to free the memory in.
_DRAIN = 90
# The plan is fixed by the arguments; the share only has to be large enough for it. A card of
# 24 GiB names 23.6, and the driver holds back some of them.
_DEVICE_SHARE = 0.97

# A first start may be this slow, and slower means that something hangs. Bytes/s, weights/s. A CPU
# core was measured to quantize 10e6 weights/s; a GPU was not measured.
_FETCH_RATE = 50e6  # a hub or a network volume
_STORE_RATE = 100e6  # a weight store is written, and read once
_QUANTIZE_RATE = {"gpu": 100e6, "cpu": 2e6, "ray": 100e6}
_SETTLE = 600  # seconds: compiling, warming up
_BEFORE = 600  # seconds: the pod before it has ended, volumes are bound, the image is fetched
PROBE_PERIOD = 10  # seconds, of the start-up probe


@dataclass(frozen=True)
class Pod:
    """What one replica needs. Sizes are bytes."""

    memory: int
    shared_memory: int  # /dev/shm, which counts as memory too
    gpus: int
    cpus: int
    threads: int  # of each rank, which computes with them; 0 where GPUs compute
    models: int  # volume of the checkpoint
    stores: int  # volume of the weight stores and caches
    start: Mapping[str, float]  # seconds of a slow first start, by what takes them


def size_pod(target: Target, plan: MemoryPlan, ranks: int, source: str) -> Pod:
    """Args:
    plan: of one rank.
    source: "host" or "disk", where the streamed weights rest.
    """
    streamed = ranks * plan.store_bytes
    stored = streamed + ranks * plan.substitute_bytes  # weight stores, and substitutes beside them
    checkpoint = ranks * (plan.resident_bytes + plan.store_bytes + plan.other_bytes)
    shared = GIB * ranks + (_OBJECT_STORE if target == "ray" else 0)
    # The front end, the engine, and with several ranks a worker for each.
    processes = 2 if ranks == 1 else 2 + ranks
    memory = processes * _PROCESS[target] + shared + (_RAY if target == "ray" else 0)
    if target == "cpu":
        memory += ranks * plan.total
    elif source == "host":
        memory += streamed
    else:  # two page-locked layers between disk and device
        memory += 2 * ranks * plan.store_bytes // max(1, len(plan.streamed))
    own_cpus, rank_cpus = _CPUS[target]
    start = {
        "fetching": checkpoint / _FETCH_RATE,
        "quantizing": streamed / 2 / _QUANTIZE_RATE[target],  # two bytes a weight
        "writing the store": 2 * streamed / _STORE_RATE if source == "disk" else 0,
        "compiling": _SETTLE,
    }
    return Pod(
        memory=memory,
        shared_memory=shared,
        gpus=0 if target == "cpu" else ranks,
        cpus=own_cpus + ranks * rank_cpus,
        threads=rank_cpus if target == "cpu" else 0,
        models=int(1.1 * checkpoint),
        # The store of another version or another rank count is written beside the one in use.
        stores=_CACHES + (2 * stored if source == "disk" else 0),
        start=start,
    )


def component(
    target: Target,
    plan: MemoryPlan,
    *,
    model: str,
    arguments: Mapping[str, Any],
    source: str,
    command: str,
) -> str:
    """YAML of the component.

    Args:
        plan: of one rank.
        model: as the server is to be given it.
        arguments: the engine's, by the names of ``vllm.EngineArgs``.
        source: "host" or "disk".
        command: that printed this.
    """
    ranks = arguments.get("tensor_parallel_size", 1)
    pod = size_pod(target, plan, ranks, source)
    arguments = dict(arguments)
    if target == "cpu":  # of the pod's memory: its ranks' plans, and a little to be off by
        arguments["gpu_memory_utilization"] = round((ranks * plan.total + GIB) / pod.memory, 4)
    else:
        arguments["gpu_memory_utilization"] = _DEVICE_SHARE
    if target == "ray":
        patches = [_ray_service(pod, model, arguments)]
    else:
        patches = [_deployment(pod, model, arguments | {"shutdown_timeout": _DRAIN})]
    patches += [_claim("models", pod.models), _claim("stores", pod.stores)]
    body = {
        "apiVersion": "kustomize.config.k8s.io/v1alpha1",
        "kind": "Component",
        "patches": patches,
    }
    head = [
        "Written by the next line; do not edit, run it again.",
        command,
        "",
        *_told(target, plan, pod, ranks),
    ]
    return "".join(f"# {line}".rstrip() + "\n" for line in head) + _yaml(body)


def options(arguments: Mapping[str, Any]) -> Iterator[str]:
    """The engine's arguments as `vllm serve` takes them."""
    for name, value in arguments.items():
        yield f"--{name.replace('_', '-')}"
        yield json.dumps(value) if isinstance(value, dict) else str(value)


def _told(target: Target, plan: MemoryPlan, pod: Pod, ranks: int) -> Iterator[str]:
    where = "Host memory" if target == "cpu" else "Device"
    yield f"{where}, each of {ranks} rank(s):" if ranks > 1 else f"{where}:"
    yield from plan.describe().splitlines()
    steps = " + ".join(f"{name} {seconds:.0f} s" for name, seconds in pod.start.items() if seconds)
    yield f"A slow first start: {steps} = {sum(pod.start.values()):.0f} s"


def _deployment(pod: Pod, model: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    resources = {"cpu": str(pod.cpus), "memory": _quantity(pod.memory)}
    if pod.gpus:
        resources["nvidia.com/gpu"] = str(pod.gpus)
    failures = math.ceil(sum(pod.start.values()) / PROBE_PERIOD)
    container: dict[str, Any] = {
        "name": "vllm",
        "args": [model, *options(arguments)],
        "resources": {"requests": resources, "limits": dict(resources)},
        "startupProbe": {"failureThreshold": failures},
    }
    if pod.threads:  # of the pod's CPUs each rank's share
        container["env"] = [{"name": "OMP_NUM_THREADS", "value": str(pod.threads)}]
    volume = {"medium": "Memory", "sizeLimit": _quantity(pod.shared_memory)}
    spec = {"containers": [container], "volumes": [{"name": "shm", "emptyDir": volume}]}
    # By default a rollout has failed after 600 s, while its pod still starts.
    deadline = failures * PROBE_PERIOD + _BEFORE
    rollout = {"progressDeadlineSeconds": deadline, "template": {"spec": spec}}
    return _merge("apps/v1", "Deployment", NAME, rollout)


def _ray_service(pod: Pod, model: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """By JSON pointers: merging would replace the lists of a custom resource whole.

    The worker group is the first one, its container and its volume for /dev/shm too.
    """
    engine = {key: value for key, value in arguments.items() if key != "speculative_config"}
    served = {
        "model": model,
        "speculative_config": arguments["speculative_config"],
        "engine": engine,
    }
    application = {"name": NAME, "import_path": "examples.ray_serve:app", "args": served}
    worker = "/spec/rayClusterConfig/workerGroupSpecs/0/template/spec"
    values = {
        "/spec/serveConfigV2": _yaml({"applications": [application]}),
        f"{worker}/volumes/0/emptyDir/sizeLimit": _quantity(pod.shared_memory),
    }
    for kind in ("requests", "limits"):
        resources = f"{worker}/containers/0/resources/{kind}"
        values[f"{resources}/cpu"] = str(pod.cpus)
        values[f"{resources}/memory"] = _quantity(pod.memory)
        values[f"{resources}/nvidia.com~1gpu"] = str(pod.gpus)
    operations = [{"op": "replace", "path": path, "value": value} for path, value in values.items()]
    target = {"group": "ray.io", "version": "v1", "kind": "RayService", "name": NAME}
    return {"target": target, "patch": _yaml(operations)}


def _claim(role: str, size: int) -> dict[str, Any]:
    storage = {"resources": {"requests": {"storage": _quantity(size)}}}
    return _merge("v1", "PersistentVolumeClaim", f"{NAME}-{role}", storage)


def _merge(version: str, kind: str, name: str, spec: dict[str, Any]) -> dict[str, Any]:
    whole = {"apiVersion": version, "kind": kind, "metadata": {"name": name}, "spec": spec}
    return {"patch": _yaml(whole)}


def _quantity(size: int) -> str:
    return f"{math.ceil(size / GIB)}Gi"


def _yaml(value: Any) -> str:
    import yaml  # vLLM depends on it

    class Dumper(yaml.SafeDumper):
        """Texts of several lines stay readable."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        style = "|" if "\n" in value else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    Dumper.add_representer(str, text)
    dumped: str = yaml.dump(value, Dumper=Dumper, sort_keys=False, width=1000)
    return dumped
