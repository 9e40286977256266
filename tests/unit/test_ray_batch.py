# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""examples/ray_batch.py before Ray: who may answer into a folder. The rest is tests/engine's."""

import errno
import fcntl
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="the ray extra is not installed")

from examples import ray_batch  # noqa: E402


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    # A run that is not refused finds no cluster, and ends.
    monkeypatch.setenv("RAY_ADDRESS", "nowhere://")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"id": "1", "prompt": "def"}\n')
    return [str(prompts), str(tmp_path / "answers"), "--model", "m"]


def test_a_second_run_is_refused(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = tmp_path / "answers"
    answers.mkdir()
    with ray_batch.alone(answers):
        assert ray_batch.main(arguments) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith(f"ray_batch: another run answers into {answers}:")


def test_one_after_the_other(tmp_path: Path) -> None:
    for _ in range(2):
        with ray_batch.alone(tmp_path):
            pass
    # Whoever reads the answers skips it.
    assert all(path.name.startswith("_") for path in tmp_path.iterdir())


def test_a_folder_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As some mounts answer. No file system here does, so the answer is made."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    ran = False
    with ray_batch.alone(tmp_path):
        ran = True
    assert ran
    (told,) = capsys.readouterr().err.splitlines()
    assert "cannot be locked (Function not implemented)" in told
