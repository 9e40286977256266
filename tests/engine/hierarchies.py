# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Every drafter under every intermediate model, and directly under the target.

The inner models are so much smaller than the target that they are often wrong.
"""

from typing import Any

from tests.engine.helpers import MODELS, ROUGH

SMALL = str(MODELS / "pystd-1m")
TREES: dict[str, int] = {"depth": 3, "branching": 3, "nodes": 8}
COMMON: dict[str, Any] = {"num_speculative_tokens": 12, "pruning": "none"}
SEQUENCE = {"min_draft_length": 5}


def drafter(name: str, base: str) -> dict[str, Any]:
    """The option ``drafter``; a head is that of the model ``base``."""
    if name == "ngram":
        return {"method": name, **TREES}
    if name == "draft_model":
        return {"method": name, "model": SMALL, **TREES}
    return {"method": name, "model": str(MODELS / f"{base}-{name}"), **TREES}


def ways(name: str) -> dict[str, dict[str, Any]]:
    """The options of every hierarchy with the drafter ``name``."""
    small, large = drafter(name, "pystd-1m"), drafter(name, "pystd-6m")
    return {
        f"target-{name}": {"method": "hierspec", "drafter": large, **COMMON},
        f"small-{name}": {
            "method": "hierspec",
            "intermediate": SMALL,
            "drafter": small,
            **COMMON,
            **SEQUENCE,
        },
        f"substitute-{name}": {**ROUGH, "drafter": large, **COMMON, **SEQUENCE},
    }


WAYS: dict[str, dict[str, Any]] = {
    way: options
    for name in ("ngram", "draft_model", "eagle", "eagle3")
    for way, options in ways(name).items()
}
