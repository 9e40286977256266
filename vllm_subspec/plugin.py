# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Entry point ``vllm.general_plugins``: vLLM calls `register` in the front end, the engine core and
every worker, possibly more than once, also where nobody asks for our methods. There it must be
cheap, and change nothing.
"""

import logging


def register() -> None:
    """Make our methods known; everything else waits until one of them is used (`in_use`)."""
    from vllm_subspec.engine import in_use

    _log_like_vllm()
    in_use.register()


def _log_like_vllm() -> None:
    """vLLM configures its own loggers only; without this nobody would see what ours say."""
    theirs, ours = logging.getLogger("vllm"), logging.getLogger("vllm_subspec")
    if not ours.handlers:
        ours.handlers = list(theirs.handlers)
        ours.propagate = theirs.propagate
        ours.setLevel(theirs.level)
