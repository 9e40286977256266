# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""The versions of vLLM that our methods fit."""

import importlib.metadata
import os

SUPPORTED_VLLM = ("0.32.0", "0.33")
SKIP_VERSION_CHECK = "VLLM_SUBSPEC_SKIP_VERSION_CHECK"


def check() -> None:
    """Raises RuntimeError, in one sentence, if the installed vLLM is none of them."""
    from packaging.specifiers import SpecifierSet

    if os.environ.get(SKIP_VERSION_CHECK) == "1":
        return
    version = importlib.metadata.version("vllm")
    low, high = SUPPORTED_VLLM
    if not SpecifierSet(f">={low},<{high}").contains(version, prereleases=True):
        raise RuntimeError(
            f"vllm-subspec supports vLLM >= {low}, < {high}, but {version} is installed: "
            f"run pip install 'vllm>={low},<{high}', or set {SKIP_VERSION_CHECK}=1 to try anyway"
        )
