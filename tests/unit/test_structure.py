# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Arrows between the folders of the package go one way, and the core knows no vLLM."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "vllm_subspec"
MAY_USE = {
    "machine": set(),
    "core": set(),
    "config": set(),
    "drafters": {"core"},
    "weights": {"machine", "core", "config"},
    "engine": {"machine", "core", "config", "drafters", "weights"},
    "bench": {"machine", "core", "config", "weights"},
    "cli": {"machine", "core", "config", "weights", "engine", "bench"},
    "plugin": {"engine"},
}
"""Beside itself."""


def imports(room: str) -> set[str]:
    """Everything that a folder or module of the package imports, by its whole name."""
    place, found = PACKAGE / room, set[str]()
    for file in place.rglob("*.py") if place.is_dir() else [place.with_suffix(".py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.module is not None and not node.level, f"{file} imports relatively"
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_all_rooms_are_known() -> None:
    assert {path.stem for path in PACKAGE.iterdir() if path.name[0] != "_"} == MAY_USE.keys()


@pytest.mark.parametrize("room", MAY_USE)
def test_arrows_go_one_way(room: str) -> None:
    used = {name.split(".")[1] for name in imports(room) if name.startswith("vllm_subspec.")}
    assert used - {room, "__version__"} <= MAY_USE[room]


@pytest.mark.parametrize("room", ["machine", "core"])
def test_the_core_knows_no_vllm(room: str) -> None:
    assert not [name for name in imports(room) if name.split(".")[0] == "vllm"]
