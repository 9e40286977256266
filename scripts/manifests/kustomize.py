# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""The files that kustomizations name, and what `kubectl kustomize` makes of them.

Without kubectl the files are checked one by one: every reference is followed, every patch finds its
target, and patches by JSON pointers are applied.
"""

import copy
import functools
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.manifests.schemas import Document, errors, parse

KUSTOMIZATION = "kustomization.yaml"


@dataclass(frozen=True)
class Kustomization:
    """One folder: the resources that it names, directly or through other folders, and patches."""

    folder: Path
    files: frozenset[Path]
    resources: list[tuple[Path, Document]]
    patches: list[tuple[Path, Document | None, Any]]  # file, target, patch
    images: frozenset[str]  # names that get a tag
    problems: list[str]


def read(folder: Path) -> Kustomization:
    """Everything below ``folder``'s kustomization; what is wrong becomes a problem."""
    path = folder / KUSTOMIZATION
    found = Kustomization(folder, frozenset(), [], [], frozenset(), [])
    documents = _documents(path, found.problems)
    if len(documents) != 1:
        found.problems.append(f"{path}: has {len(documents)} documents, needs one")
        return found
    content = documents[0]
    wrong = [f"{path}: {error}" for error in errors(content)]
    found.problems.extend(wrong)
    if wrong:
        return found
    files, images = {path}, {image["name"] for image in content.get("images", [])}
    for name in content.get("resources", []) + content.get("components", []):
        child = (folder / name).resolve()
        if child.is_dir():
            inner = read(child)
            files |= inner.files
            images |= inner.images
            found.resources.extend(inner.resources)
            found.patches.extend(inner.patches)
            found.problems.extend(inner.problems)
        else:
            files.add(child)
            for document in _documents(child, found.problems):
                found.problems.extend(f"{child}: {error}" for error in errors(document))
                found.resources.append((child, document))
    for generator in content.get("configMapGenerator", []):
        children = [(folder / name).resolve() for name in generator["files"]]
        files.update(children)
        document = _config_map(generator, children, found.problems)
        found.problems.extend(f"{path}: {error}" for error in errors(document))
        found.resources.append((path, document))
    for patch in content.get("patches", []):
        if "path" in patch:
            child = (folder / patch["path"]).resolve()
            files.add(child)
            parts = _documents(child, found.problems)
        else:
            child, parts = path, _parsed(path, patch["patch"], found.problems)
        found.patches.extend((child, patch.get("target"), part) for part in parts)
    return Kustomization(
        folder,
        frozenset(files),
        found.resources,
        found.patches,
        frozenset(images),
        found.problems,
    )


def patch_problems(found: Kustomization) -> Iterator[str]:
    for path, target, patch in found.patches:
        pointers = isinstance(patch, list)
        if not pointers:
            wrong = [f"{path}: patch: {error}" for error in errors(patch, partial=True)]
            yield from wrong
            if wrong:
                continue
        wanted = target if pointers else patch
        if wanted is None:
            yield f"{path}: patch: JSON pointers without a target"
            continue
        patched = [document for _, document in found.resources if _is_target(wanted, document)]
        if len(patched) != 1:
            yield f"{path}: patch: {len(patched)} objects are {_named(wanted)}"
        elif pointers:
            try:
                result = _replaced(patched[0], patch)
            except ValueError as error:
                yield f"{path}: patch: {error}"
            else:
                yield from (f"{path}: patched: {error}" for error in errors(result))


def unreferenced(root: Path, used: frozenset[Path]) -> Iterator[str]:
    """Files that no kustomization names."""
    for path in sorted(root.rglob("*")):
        if path.suffix in {".yaml", ".yml", ".json"} and path.resolve() not in used:
            yield f"{path}: no kustomization names this file"


@functools.cache
def kubectl() -> str | None:
    return shutil.which("kubectl")


def render(folder: Path) -> list[Document]:
    """What would be applied.

    Raises:
        ValueError: kubectl says what is wrong.
    """
    program = kubectl()
    assert program is not None
    done = subprocess.run([program, "kustomize", str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(done.stderr.strip())
    return parse(done.stdout)


def _config_map(generator: Document, paths: list[Path], problems: list[str]) -> Document:
    """What kustomize generates: each file by its name."""
    data = {}
    for path in paths:
        try:
            data[path.name] = path.read_text()
        except OSError as error:
            problems.append(f"{path}: {error.strerror}")
    labels = generator["options"].get("labels", {})
    metadata = {"name": generator["name"], "labels": labels}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}


def _documents(path: Path, problems: list[str]) -> list[Any]:
    try:
        return _parsed(path, path.read_text(), problems)
    except OSError as error:
        problems.append(f"{path}: {error.strerror}")
        return []


def _parsed(path: Path, text: str, problems: list[str]) -> list[Any]:
    try:
        return parse(text)
    except ValueError as error:
        problems.append(f"{path}: {error}")
        return []


def _is_target(wanted: Document, document: Document) -> bool:
    """``wanted`` is a kustomize target or an object's own head."""
    name = wanted.get("name") or wanted.get("metadata", {}).get("name")
    version = wanted.get("apiVersion") or "/".join(
        wanted[key] for key in ("group", "version") if key in wanted
    )
    head = document.get("apiVersion"), document.get("kind"), document["metadata"].get("name")
    return (version, wanted.get("kind"), name) == head


def _named(wanted: Document) -> str:
    return f"{wanted.get('kind')} {wanted.get('name') or wanted.get('metadata', {}).get('name')}"


def _replaced(document: Document, operations: list[Any]) -> Document:
    """RFC 6902, of which only "replace" is used here.

    Raises:
        ValueError: another operation, or a pointer to nothing.
    """
    result = copy.deepcopy(document)
    for operation in operations:
        if operation.keys() != {"op", "path", "value"} or operation["op"] != "replace":
            raise ValueError(f"{operation} is no replacement")
        *way, last = [
            part.replace("~1", "/").replace("~0", "~")
            for part in operation["path"].removeprefix("/").split("/")
        ]
        try:
            place: Any = result
            for part in way:
                place = place[int(part)] if isinstance(place, list) else place[part]
            key: Any = int(last) if isinstance(place, list) else last
            place[key]  # noqa: B018 - "replace" needs something that is there
            place[key] = operation["value"]
        except (KeyError, IndexError, ValueError, TypeError):
            raise ValueError(f"{operation['path']} points to nothing") from None
    return result
