# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Cut CustomResourceDefinitions down to strict JSON schemas in deploy/schemas/.

    python -m scripts.manifests.vendor CRD.yaml ...

A cluster accepts unknown keys of these kinds silently. Here only the keys that a definition names
are allowed. Descriptions, the status and what no JSON schema validator reads are dropped, and a
part that occurs several times (the pod templates of a RayService) is kept once.
"""

import hashlib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

SCHEMAS = Path(__file__).resolve().parents[2] / "deploy" / "schemas"
KEPT = {
    *("type", "properties", "additionalProperties", "items", "required", "enum", "pattern"),
    *("anyOf", "oneOf", "allOf", "not", "minimum", "maximum", "minItems", "maxItems"),
    *("minLength", "maxLength", "minProperties", "maxProperties"),
}
LABELS = {"type": "object", "additionalProperties": {"type": "string"}}
# Definitions leave metadata to the API server, which knows these keys among others.
METADATA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "namespace": {"type": "string"},
        "labels": LABELS,
        "annotations": LABELS,
    },
    "additionalProperties": False,
}
SHARED_FROM = 500  # characters: shorter parts are repeated


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """``schema`` with nothing allowed but what it names."""
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    found = {key: value for key, value in schema.items() if key in KEPT}
    if "properties" in found:
        found["properties"] = {
            name: METADATA if name == "metadata" and set(part) <= {"type"} else strict(part)
            for name, part in found["properties"].items()
        }
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            found["additionalProperties"] = False
    elif isinstance(found.get("additionalProperties"), dict):
        found["additionalProperties"] = strict(found["additionalProperties"])
    if "items" in found:
        found["items"] = strict(found["items"])
    if schema.get("nullable") and isinstance(found.get("type"), str):
        found["type"] = [found["type"], "null"]
    return found


def share(schema: dict[str, Any]) -> dict[str, Any]:
    """The same schema with its repeated parts in ``$defs``."""
    times: Counter[str] = Counter()

    def count(part: Any) -> None:
        if isinstance(part, dict):
            times[_text(part)] += 1
        for child in _children(part):
            count(child)

    def replaced(part: Any, root: bool = False) -> Any:
        if isinstance(part, list):
            return [replaced(child) for child in part]
        if not isinstance(part, dict):
            return part
        text = _text(part)
        body = {key: replaced(value) for key, value in part.items()}
        if root or times[text] == 1 or len(text) < SHARED_FROM or "type" not in part:
            return body
        name = hashlib.sha256(text.encode()).hexdigest()[:8]
        definitions[name] = body
        return {"$ref": f"#/$defs/{name}"}

    definitions: dict[str, Any] = {}
    count(schema)
    return {**replaced(schema, root=True), "$defs": dict(sorted(definitions.items()))}


def _children(part: Any) -> list[Any]:
    return list(part.values()) if isinstance(part, dict) else part if isinstance(part, list) else []


def _text(part: Any) -> str:
    return json.dumps(part, sort_keys=True, separators=(",", ":"))


def cut_down(definition: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """File name and schema of the stored version of a CustomResourceDefinition."""
    spec = definition["spec"]
    version = next(version for version in spec["versions"] if version["storage"])
    kind, group = spec["names"]["kind"], spec["group"]
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"].pop("status", None)
    schema["properties"]["apiVersion"] = {"const": f"{group}/{version['name']}"}
    schema["properties"]["kind"] = {"const": kind}
    schema["required"] = ["apiVersion", "kind", "metadata", "spec"]
    return f"{group}_{version['name']}_{kind}.json", share(schema)


def main(paths: list[str]) -> int:
    for path in paths:
        for definition in yaml.safe_load_all(Path(path).read_text()):
            if definition:
                name, schema = cut_down(definition)
                (SCHEMAS / name).write_text(_text(schema) + "\n")
                print(f"wrote {SCHEMAS / name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
