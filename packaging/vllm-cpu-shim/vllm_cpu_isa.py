# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Entry point ``torch.backends``, which torch calls at the end of its import in every process."""

import contextlib
import os


def obey() -> None:
    """Put vllm-subspec's cap on CPU instructions in force, where its variable is set."""
    if os.environ.get("VLLM_SUBSPEC_MAX_CPU_ISA"):
        # Where vllm-subspec is not installed, `import torch` must work all the same.
        with contextlib.suppress(ImportError):
            from vllm_subspec.machine import isa

            isa.obey()
