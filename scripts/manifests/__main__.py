# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Check every manifest in deploy/kustomize; exit status 1 and a line for each problem.

    python -m scripts.manifests [FOLDER]

Overlays are rendered with `kubectl kustomize` where there is a kubectl.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

from scripts.manifests import kustomize, metrics, references
from scripts.manifests.schemas import Document, errors

ROOT = Path(__file__).resolve().parents[2] / "deploy" / "kustomize"


def check(root: Path = ROOT, rendering: bool | None = None) -> list[str]:
    """The problems of all overlays below ``root``.

    Args:
        rendering: whether to ask kubectl; None asks it where there is one.
    """
    overlays = sorted(path.parent for path in (root / "overlays").glob("*/kustomization.yaml"))
    if not overlays:
        return [f"{root}: no overlays"]
    rendering = kustomize.kubectl() is not None if rendering is None else rendering
    found: list[str] = []
    used: frozenset[Path] = frozenset()
    for overlay in overlays:
        content = kustomize.read(overlay.resolve())
        used |= content.files
        found += content.problems
        if content.problems:
            continue
        found += kustomize.patch_problems(content)
        documents = [document for _, document in content.resources]
        for problems in (
            references.problems(documents),
            metrics.problems(documents),
            _untagged(documents, content.images),
        ):
            found += (f"{overlay}: {problem}" for problem in problems)
        if rendering:
            found += (f"{overlay}, rendered: {problem}" for problem in _rendered(overlay))
    return sorted({*found, *kustomize.unreferenced(root, used)})


def _rendered(overlay: Path) -> Iterator[str]:
    try:
        documents = kustomize.render(overlay)
    except ValueError as error:
        yield str(error)
        return
    wrong = [
        f"{document.get('kind')}: {error}" for document in documents for error in errors(document)
    ]
    yield from wrong
    if not wrong:
        yield from references.problems(documents)
        yield from metrics.problems(documents)
        yield from _untagged(documents, frozenset())


def _untagged(documents: list[Document], tagged: frozenset[str]) -> Iterator[str]:
    """Images that may be another one tomorrow; ``tagged`` get their tag from a kustomization."""
    for found in (pods for document in documents for pods in references.pods_of(document)):
        for container in found.spec["containers"]:
            image = container.get("image", "")
            _, colon, tag = image.rpartition("/")[2].partition(":")
            if image not in tagged and (not colon or tag == "latest"):
                yield f"{found.owner}: image {image!r} has no fixed tag"


def main(arguments: list[str]) -> int:
    found = check(Path(arguments[0]) if arguments else ROOT)
    print("\n".join(found) or "manifests: all is well", file=sys.stderr if found else sys.stdout)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
