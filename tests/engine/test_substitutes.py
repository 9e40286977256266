# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Substitutes saved as a checkpoint: plain vLLM loads it, and it serves as ``substitute``."""

from pathlib import Path

import pytest
import torch
from vllm.model_executor.layers.linear import LinearBase

from tests.engine.helpers import (
    LAYERS,
    MODEL,
    ROUGH,
    Engines,
    generate,
    greedy,
    memory_plan,
    source_prompts,
    worker_of,
)
from vllm_subspec.cli.main import main
from vllm_subspec.weights.kernels import mixed_precision

PROMPTS = source_prompts(8, 4, 60)
PARAMS = [greedy(24)] * len(PROMPTS)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("substitutes") / "pystd-6m-w4"
    assert main(["quantize", str(MODEL), str(out), "--bits", "4", "--quantizer", "rtn"]) == 0
    return out


def test_plain_vllm_serves_the_saved_checkpoint(engines: Engines, saved: Path) -> None:
    if (reason := mixed_precision.no_w4a16()) is not None:
        pytest.skip(reason)
    full = engines.reference(PROMPTS, PARAMS, dtype="bfloat16")
    low_bit = generate(engines.get(None, saved, dtype="bfloat16"), PROMPTS, PARAMS)
    # 4 bits are not the model itself, but they speak alike.
    same = sum(a.tokens[0] == b.tokens[0] for a, b in zip(full, low_bit, strict=True))
    assert same >= len(PROMPTS) - 2


def test_a_saved_checkpoint_is_the_substitute(engines: Engines, saved: Path) -> None:
    reference = engines.reference(PROMPTS, PARAMS)
    base = {k: v for k, v in ROUGH.items() if k not in ("bits", "quantizer")}

    def kernels(options: dict[str, object]) -> list[torch.Tensor]:
        llm = engines.get({**base, **options})
        assert generate(llm, PROMPTS, PARAMS) == reference
        worker = worker_of(llm)
        substitutes = worker.loading.substitutes
        assert len(substitutes) == 4 * LAYERS
        return [
            held
            for module in worker.model_runner.model.modules()
            if isinstance(module, LinearBase) and module in substitutes
            for held in substitutes[module].buffers()
        ]

    from_checkpoint = kernels({"substitute": str(saved)})
    quantized_now = kernels({"bits": 4, "quantizer": "rtn"})
    for loaded, made in zip(from_checkpoint, quantized_now, strict=True):
        assert torch.equal(loaded, made)


def test_a_checkpoint_s_own_width_is_planned(engines: Engines, tmp_path: Path) -> None:
    eight = tmp_path / "w8"
    assert main(["quantize", str(MODEL), str(eight), "--bits", "8"]) == 0
    base = {k: v for k, v in ROUGH.items() if k not in ("bits", "quantizer")}
    llm = engines.get({**base, "substitute": str(eight)})
    made = sum(kernel.nbytes for kernel in worker_of(llm).loading.substitutes.values())
    assert memory_plan(llm).substitute_bytes == made


def test_another_models_checkpoint_is_refused(engines: Engines, tmp_path: Path) -> None:
    other = tmp_path / "pystd-1m-w4"
    assert main(["quantize", str(MODEL.parent / "pystd-1m"), str(other)]) == 0
    with pytest.raises(ValueError, match=r"pystd-1m-w4.*hidden_size"):
        engines.get({"method": "subspec", "substitute": str(other)})
