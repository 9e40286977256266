# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Configurations for GPUs that are not here: what is chosen, what is refused in one sentence."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
LOOKUPS = {"method": "hierspec", "drafter": {"method": "ngram"}}
EAGER = {"eager": True, "mode": "NONE", "graphs": "NONE", "backend": "FLASH_ATTN"}
COMPILED = {"eager": False, "mode": "VLLM_COMPILE", "graphs": "PIECEWISE", "backend": "FLASH_ATTN"}
TREES = 'method "subspec" drafts token trees'
CHAINS = 'set "branching" to 1'


def subspec(capability: tuple[int, int] = (8, 9), **arguments: Any) -> tuple[Any, dict[str, Any]]:
    return capability, {"speculative_config": {"method": "subspec"}, **arguments}


def graphs(mode: str) -> tuple[Any, dict[str, Any]]:
    return subspec(compilation_config={"cudagraph_mode": mode})


def whole(mode: str) -> str:
    return (
        f'method "subspec" needs CUDA graphs in pieces, but cudagraph_mode is {mode}: set it to '
        "PIECEWISE or NONE"
    )


def unsuited(dtype: str, capability: str, reason: str) -> str:
    return (
        f"{TREES} with FLASH_ATTN, which says of this model ({dtype}, heads of 64) on a GPU of "
        f"capability {capability}: {reason}; change what it names, or {CHAINS}"
    )


CHAIN = {"method": "subspec", "branching": 1}
CASES: dict[str, tuple[tuple[Any, dict[str, Any]], Any]] = {
    "Ada": (subspec(), EAGER),
    "Hopper": (subspec((9, 0)), EAGER),
    "data centre Blackwell, which prefers FlashInfer": (subspec((10, 0)), EAGER),
    "Blackwell": (subspec((12, 0)), EAGER),
    "eager": (subspec(enforce_eager=True), EAGER),
    "compiled": (subspec(compilation_config={"mode": 3}), COMPILED),
    "graphs in pieces": (graphs("PIECEWISE"), COMPILED),
    "both kinds of graphs": (graphs("FULL_AND_PIECEWISE"), COMPILED),
    "no graphs": (graphs("NONE"), COMPILED | {"graphs": "NONE"}),
    "whole graphs": (graphs("FULL"), whole("FULL")),
    "whole decode graphs": (graphs("FULL_DECODE_ONLY"), whole("FULL_DECODE_ONLY")),
    "nothing streams": (((8, 9), {"speculative_config": LOOKUPS}), COMPILED),
    "Turing": (
        subspec((7, 5), dtype="float16"),
        unsuited("float16", "7.5", "compute capability not supported"),
    ),
    "float32": (subspec(dtype="float32"), unsuited("float32", "8.9", "dtype not supported")),
    "chains in float32": (
        subspec(speculative_config=CHAIN, dtype="float32"),
        EAGER | {"backend": None},
    ),
    "FP8 K/V": (
        subspec(kv_cache_dtype="fp8"),
        f"{TREES}, which read no K/V of --kv-cache-dtype fp8: remove it, or {CHAINS}",
    ),
    "our attention by name": (subspec(attention_backend="FLASH_ATTN"), EAGER),
    "another attention": (
        subspec(attention_backend="FLASHINFER"),
        f"{TREES}, but --attention-backend is FLASHINFER: use FLASH_ATTN, or {CHAINS}",
    ),
    "another attention in the mapping": (
        subspec(attention_config={"backend": "TRITON_ATTN"}),
        f"{TREES}, but --attention-backend is TRITON_ATTN: use FLASH_ATTN, or {CHAINS}",
    ),
    "without our methods": (
        ((10, 0), {}),
        {"eager": False, "mode": "VLLM_COMPILE", "graphs": "FULL_AND_PIECEWISE", "backend": None},
    ),
}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.configured_on_cuda"],
        cwd=ROOT,
        input=json.dumps([case for case, _ in CASES.values()]),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(zip(CASES, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_what_is_chosen_and_what_is_refused(outcomes: dict[str, Any], case: str) -> None:
    found, expected = outcomes[case], CASES[case][1]
    if isinstance(found, dict):
        worker = found.pop("worker")
        assert ("vllm_subspec" in worker) == (case != "without our methods")
    assert found == expected
