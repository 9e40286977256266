# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Files that others made are data: nothing in them is run, unless the user said so to vLLM."""

import ast
import json
import logging
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import EngineArgs
from vllm.config import ParallelConfig

import vllm_subspec
from vllm_subspec.plugin import register
from vllm_subspec.weights.checkpoint import SubstituteCheckpoint
from vllm_subspec.weights.store import BlockLayout, StoreWriter, TensorSpec, open_or_create

MODEL = Path(__file__).resolve().parents[2] / "models" / "pystd-1m"
MODULES = sorted(Path(vllm_subspec.__file__).parent.rglob("*.py"))
UNSAFE_MODULES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {"torch.load", "numpy.load", "np.load", "eval", "exec", "__import__"}


def uses(source: str) -> set[str]:
    """What of the above a module imports or calls."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names} & UNSAFE_MODULES
        elif isinstance(node, ast.ImportFrom):
            found |= {(node.module or "").split(".")[0]} & UNSAFE_MODULES
            found |= {f"{node.module}.{alias.name}" for alias in node.names} & UNSAFE_CALLS
        elif isinstance(node, ast.Call):
            found |= {ast.unparse(node.func)} & UNSAFE_CALLS
    return found


def test_nothing_here_can_unpickle() -> None:
    assert len(MODULES) > 50
    assert {str(path): uses(path.read_text()) for path in MODULES if uses(path.read_text())} == {}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import pickle.x", "pickle"),
        ("from dill import y", "dill"),
        ("torch.load(f)", "torch.load"),
        ("from torch import load", "torch.load"),
        ("from torch import load as read", "torch.load"),
        ("from numpy import array, load", "numpy.load"),
        ("eval(text)", "eval"),
    ],
)
def test_what_is_found(source: str, found: str) -> None:
    assert uses(source) == {found}


def test_what_is_not_found() -> None:
    source = "from torch import save\nfrom json import load\nload(f)\nmodel.load(f)"
    assert uses(source) == set()


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return Path.touch, (self._mark,)  # type: ignore[return-value]


def test_a_substitute_of_pickles_is_not_opened(tmp_path: Path) -> None:
    mark = tmp_path / "sprung"
    folder = tmp_path / "substitute"
    folder.mkdir()
    config = json.loads((MODEL / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 64}
    (folder / "config.json").write_text(json.dumps(config))
    torch.save({"model.layers.0.mlp.up_proj.qweight": Trap(mark)}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="safetensors"):
        SubstituteCheckpoint.open(folder)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Trap(mark)))
    assert mark.exists()  # so it is a trap


@pytest.mark.parametrize("trust", [False, True])
def test_remote_code_is_the_users_choice(tmp_path: Path, trust: bool) -> None:
    """A drafting model brings code of its own; the option of vLLM decides for it, too."""
    register()
    mark = tmp_path / "ran"
    folder = tmp_path / "brings_code"
    shutil.copytree(MODEL, folder)
    config = json.loads((MODEL / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration_own.py").write_text(
        "from pathlib import Path\n"
        "from transformers import LlamaConfig\n"
        f"Path({str(mark)!r}).touch()\n"
        "class OwnConfig(LlamaConfig):\n"
        "    model_type = 'own'\n"
    )
    args = EngineArgs(str(MODEL), max_model_len=128, trust_remote_code=trust)
    target = args.create_model_config()
    assert not mark.exists()
    drafter = {"method": "draft_model", "model": str(folder)}
    args.speculative_config = {"method": "hierspec", "drafter": drafter}
    if trust:
        args.create_speculative_config(target, ParallelConfig())
    else:
        with pytest.raises(ValueError, match='"drafter.model" is .*--trust-remote-code') as caught:
            args.create_speculative_config(target, ParallelConfig())
        assert "\n" not in str(caught.value)
    assert mark.exists() == trust


BLOCKS = (BlockLayout("layers.0", (TensorSpec("w", (8,), torch.uint8),)),)


@pytest.mark.parametrize("shared", ["folder", "file", None])
def test_a_store_that_strangers_can_write_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, shared: str | None
) -> None:
    """By everyone, not by a group: a volume that several servers share belongs to one."""
    path = tmp_path / "stores" / "w.store"
    with StoreWriter(str(path), {}, BLOCKS) as writer:
        writer.write_block(0, {"w": torch.arange(8, dtype=torch.uint8)})
    path.parent.chmod(0o777 if shared == "folder" else 0o770)
    path.chmod(0o666 if shared == "file" else 0o660)
    with caplog.at_level(logging.WARNING):
        opened = open_or_create(str(path), {}, BLOCKS)
    assert not isinstance(opened, StoreWriter)
    opened.close()
    warned = [record.getMessage() for record in caplog.records]
    if shared is None:
        assert warned == []
    else:
        (message,) = warned
        place = path if shared == "file" else path.parent
        assert f"can write {place}," in message and "chmod o-w" in message
