# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Code that was compiled for one memory plan is not taken for another."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from vllm.engine.arg_utils import EngineArgs

from vllm_subspec import plugin
from vllm_subspec.config import SubspecOptions
from vllm_subspec.engine import compat, loading
from vllm_subspec.engine.method import options_of

MODEL = Path(__file__).parents[2] / "models" / "pystd-6m"


def key(patch: pytest.MonkeyPatch, streamed: tuple[int, ...], slots: int) -> str:
    """vLLM's key of an engine whose plan streams these layers."""
    args = EngineArgs(model=str(MODEL), max_model_len=128, speculative_config={"method": "subspec"})
    config = args.create_engine_config()
    plan = SimpleNamespace(streamed=streamed, ring_layers=slots, describe=lambda: "")
    patch.setattr(loading, "plan_residency", lambda *_: plan)
    options = options_of(config)
    assert isinstance(options, SubspecOptions)
    made = loading.Loading(config, options, 0, torch.device("cpu"))
    assert made._choose(nn.Identity()) == streamed
    found: str = config.compute_hash()
    return found


def test_the_plan_is_in_the_key_of_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin.register()
    plans = [((0, 1, 2), 2), ((0, 1, 3), 2), ((0, 1, 2), 3), ((0, 1, 2, 3), 2)]
    keys = [key(monkeypatch, *plan) for plan in plans]
    assert len(set(keys)) == len(plans)
    assert key(monkeypatch, *plans[0]) == keys[0]
    compat.undo()
