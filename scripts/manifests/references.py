# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Do objects that name each other exist, and agree? A schema cannot tell."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from scripts.manifests.schemas import Document

SECRET = "vllm-subspec"
SECRET_KEYS = {"api-key", "hf-token"}  # made by hand, as deploy/README.md says

Labels = Mapping[str, str]


@dataclass(frozen=True)
class Pods:
    """A pod template, and the object that it is in."""

    owner: str
    labels: Labels
    spec: Document

    def ports(self) -> set[str | int]:
        """Names and numbers."""
        return {
            value
            for container in self.spec["containers"]
            for port in container.get("ports", [])
            for value in (port.get("name"), port["containerPort"])
            if value is not None
        }


def problems(documents: list[Document]) -> Iterator[str]:
    """Of everything that would be applied together, each valid for itself."""
    named = Counter((document["kind"], document["metadata"]["name"]) for document in documents)
    for (kind, name), times in named.items():
        if times > 1:
            yield f"{kind} {name} is there {times} times"
    pods = [found for document in documents for found in pods_of(document)]
    claims = {name for kind, name in named if kind == "PersistentVolumeClaim"}
    services = [document for document in documents if document["kind"] == "Service"]
    for found in pods:
        yield from _pod_problems(found, claims)
    for document in documents:
        where = f"{document['kind']} {document['metadata']['name']}"
        for problem in _object_problems(document, documents, pods, services):
            yield f"{where}: {problem}"


def pods_of(document: Document) -> Iterator[Pods]:
    owner, spec = f"{document['kind']} {document['metadata']['name']}", document.get("spec", {})
    templates = []
    if document["kind"] == "Deployment":
        templates = [spec["template"]]
    elif document["kind"] == "RayService":
        cluster = spec["rayClusterConfig"]
        groups = [cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])]
        templates = [group["template"] for group in groups]
    for template in templates:
        yield Pods(owner, template.get("metadata", {}).get("labels", {}), template["spec"])


def _pod_problems(pods: Pods, claims: set[str]) -> Iterator[str]:
    volumes = {volume["name"]: volume for volume in pods.spec.get("volumes", [])}
    mounted = set()
    for container in pods.spec["containers"]:
        where = f"{pods.owner}, container {container['name']}"
        for mount in container.get("volumeMounts", []):
            mounted.add(mount["name"])
            if mount["name"] not in volumes:
                yield f"{where}: mounts {mount['name']}, which is no volume"
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            port = container.get(kind, {}).get("httpGet", {}).get("port")
            if port is not None and port not in pods.ports():
                yield f"{where}: {kind} asks port {port}, which the pod has not"
        for variable in container.get("env", []):
            secret = variable.get("valueFrom", {}).get("secretKeyRef")
            if secret and (secret["name"] != SECRET or secret["key"] not in SECRET_KEYS):
                yield f"{where}: {secret['name']}/{secret['key']} is no secret of deploy/README.md"
    for name, volume in volumes.items():
        claim = volume.get("persistentVolumeClaim", {}).get("claimName")
        if claim is not None and claim not in claims:
            yield f"{pods.owner}: volume {name} claims {claim}, which is not there"
        if name not in mounted:
            yield f"{pods.owner}: volume {name} is not mounted"


def _object_problems(
    document: Document, documents: list[Document], pods: list[Pods], services: list[Document]
) -> Iterator[str]:
    spec = document.get("spec", {})
    match document["kind"]:
        case "Deployment":
            wanted = spec["selector"].get("matchLabels", {})
            if not _matches(wanted, spec["template"]["metadata"].get("labels", {})):
                yield "selects other labels than its pods have"
        case "Service":
            chosen = _chosen(spec["selector"], pods)
            yield from _none_chosen(chosen)
            targets = [port.get("targetPort", port["port"]) for port in spec["ports"]]
            yield from _missing_ports(targets, chosen)
        case "PodDisruptionBudget":
            yield from _none_chosen(_chosen(spec["selector"]["matchLabels"], pods))
        case "NetworkPolicy":
            chosen = _chosen(spec["podSelector"].get("matchLabels", {}), pods)
            yield from _none_chosen(chosen)
            for rule in spec.get("ingress", []):
                yield from _missing_ports([port["port"] for port in rule.get("ports", [])], chosen)
            yield from _unknown_peers(spec, pods)
        case "HorizontalPodAutoscaler":
            target = spec["scaleTargetRef"]
            if not any(
                (target.get("apiVersion"), target["kind"], target["name"])
                == (other["apiVersion"], other["kind"], other["metadata"]["name"])
                for other in documents
            ):
                yield f"scales {target['kind']} {target['name']}, which is not there"
        case "ServiceMonitor":
            wanted = spec["selector"].get("matchLabels", {})
            found = [one for one in services if _matches(wanted, one["metadata"].get("labels", {}))]
            yield from _none_chosen(found)
            ports = {port.get("name") for one in found for port in one["spec"]["ports"]}
            for endpoint in spec["endpoints"]:
                if found and endpoint["port"] not in ports:
                    yield f"scrapes port {endpoint['port']}, which the service has not"
        case "PodMonitor":
            chosen = _chosen(spec["selector"].get("matchLabels", {}), pods)
            yield from _none_chosen(chosen)
            endpoints = spec["podMetricsEndpoints"]
            yield from _missing_ports([endpoint["port"] for endpoint in endpoints], chosen)


def _unknown_peers(spec: Document, pods: list[Pods]) -> Iterator[str]:
    """Peers of the policy's own namespace are pods of these manifests."""
    for rule in spec.get("ingress", []) + spec.get("egress", []):
        for peer in rule.get("from", []) + rule.get("to", []):
            labels = peer.get("podSelector", {}).get("matchLabels", {})
            if "namespaceSelector" not in peer and not _chosen(labels, pods):
                yield f"lets pods {dict(labels)} through, of which there are none"


def _chosen(labels: Labels, pods: Iterable[Pods]) -> list[Pods]:
    return [found for found in pods if _matches(labels, found.labels)]


def _matches(wanted: Labels, labels: Labels) -> bool:
    return wanted.items() <= labels.items()


def _none_chosen(chosen: list[Any]) -> Iterator[str]:
    if not chosen:
        yield "selects nothing"


def _missing_ports(ports: list[str | int], chosen: list[Pods]) -> Iterator[str]:
    """Ports that none of the pods has."""
    known = {port for found in chosen for port in found.ports()}
    for port in ports:
        if chosen and port not in known:
            yield f"names port {port}, which its pods have not"
