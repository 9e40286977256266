# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Is a document of a known kind, and has it only keys of that kind?

Built-in kinds are known to `kubernetes-validate`, whose own command lets unknown kinds pass with a
warning. The others have a schema in deploy/schemas/.
"""

import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator
from jsonschema.protocols import Validator
from kubernetes_validate import utils
from referencing import Registry, Resource

SCHEMAS = Path(__file__).resolve().parents[2] / "deploy" / "schemas"
KUBERNETES = "1.31"  # the oldest release that the manifests are for: pods sleep before they stop
SERVE_CONFIG = "serve_config"
DASHBOARD = "grafana_dashboard"

Document = dict[str, Any]


class StrictLoader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        found = super().construct_mapping(node, deep)
        if len(found) < len(node.value):
            raise yaml.constructor.ConstructorError(
                problem="a key is given twice", problem_mark=node.start_mark
            )
        return found


def parse(text: str) -> list[Any]:
    """The documents of a YAML file.

    Raises:
        ValueError: it is no YAML.
    """
    try:
        return [found for found in yaml.load_all(text, StrictLoader) if found is not None]
    except yaml.YAMLError as error:
        raise ValueError(f"no YAML: {' '.join(str(error).split())}") from None


def errors(document: Any, *, partial: bool = False) -> Iterator[str]:
    """What is wrong with a manifest, each with the path to it.

    Args:
        partial: a patch, which may lack keys that its kind requires.
    """
    if not isinstance(document, dict):
        yield f"is no object but {document!r}"
        return
    version, kind = document.get("apiVersion"), document.get("kind")
    checker = _validator(str(version), str(kind))
    if checker is None:
        yield f"unknown kind {kind} of {version}: add its schema to deploy/schemas"
        return
    if partial and "$patch" in document:
        if document.keys() - {"apiVersion", "kind", "metadata", "$patch"}:
            yield "deletes an object and patches it"
        document = {key: value for key, value in document.items() if key != "$patch"}
    yield from _told(checker, document, partial)
    if kind == "RayService" and (text := document.get("spec", {}).get("serveConfigV2")):
        yield from serve_config_errors(text)


def serve_config_errors(text: str) -> Iterator[str]:
    """Of the YAML within a RayService."""
    try:
        documents = parse(text)
    except ValueError as error:
        yield f"spec.serveConfigV2: {error}"
        return
    for document in documents:
        for problem in _told(Draft202012Validator(_vendored(SERVE_CONFIG)), document, False):
            yield f"spec.serveConfigV2: {problem}"


def dashboard_errors(dashboard: Any) -> Iterator[str]:
    """Of Grafana's JSON within a ConfigMap."""
    yield from _told(Draft202012Validator(_vendored(DASHBOARD)), dashboard, False)


def _told(checker: Validator, document: Any, partial: bool) -> Iterator[str]:
    for error in checker.iter_errors(document):
        if not (partial and error.validator == "required"):
            yield f"{error.json_path.removeprefix('$.')}: {error.message}"


@functools.cache
def _validator(version: str, kind: str) -> Validator | None:
    """None where the kind is unknown."""
    group, _, number = version.rpartition("/")
    name = f"{group}_{number}_{kind}"
    if (SCHEMAS / f"{name}.json").exists():
        return Draft202012Validator(_vendored(name))
    # The package's file names: deployment-apps-v1.json, service-v1.json
    short = f"{group.split('.')[0]}-{number}" if group else number
    if not re.fullmatch(r"[\w-]+", f"{kind}{short}"):
        return None
    folder = f"kubernetes-json-schema/v{_release()}-local-strict"
    try:
        schema = utils.schema_contents(f"{folder}/{kind.lower()}-{short}.json", KUBERNETES)
    except FileNotFoundError:
        return None
    return Draft202012Validator(schema, registry=_definitions(folder))


@functools.cache
def _release() -> str:
    return next(found for found in utils.all_versions() if utils.major_minor(found) == KUBERNETES)


@functools.cache
def _definitions(folder: str) -> "Registry[Any]":
    contents = utils.schema_contents(f"{folder}/_definitions.json", KUBERNETES)
    found: Registry[Any] = Resource.from_contents(contents) @ Registry()
    return found


@functools.cache
def _vendored(name: str) -> Any:
    return json.loads((SCHEMAS / f"{name}.json").read_text())
