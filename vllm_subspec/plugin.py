# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Entry point ``vllm.general_plugins``: vLLM calls `register` in the front end, the engine core and
every worker, possibly more than once. Nothing heavy happens here.
"""

import importlib.metadata
import logging
import os

SUPPORTED_VLLM = ("0.32.0", "0.33")
SKIP_VERSION_CHECK = "VLLM_SUBSPEC_SKIP_VERSION_CHECK"


def register() -> None:
    """Check that this vLLM is one we know, and install the hooks.

    Raises:
        RuntimeError: vLLM's version is outside the supported range, or a symbol of it that this
            package builds on has moved.
    """
    _check_version()
    from vllm_subspec.engine import compat, method, metrics, seams

    _log_like_vllm()
    seams.require()
    compat.apply()
    method.install()
    metrics.install()


def _log_like_vllm() -> None:
    """vLLM configures its own loggers only; without this nobody would see what ours say."""
    theirs, ours = logging.getLogger("vllm"), logging.getLogger("vllm_subspec")
    if not ours.handlers:
        ours.handlers = list(theirs.handlers)
        ours.propagate = theirs.propagate
        ours.setLevel(theirs.level)


def _check_version() -> None:
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
