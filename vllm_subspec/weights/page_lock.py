# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Host memory that a GPU copies from by itself: locked where it lies, as torch's own pinned memory
rounds up to powers of two."""

import contextlib

import torch


def page_lock(buffer: torch.Tensor) -> torch.Tensor:
    """Lock ``buffer``, and return it. Whoever lets its memory go calls `page_unlock` before.

    Raises:
        MemoryError: one sentence: the system does not lock so much.
    """
    status = torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.numel(), 0)
    if int(status) != 0:
        # The runtime keeps the error for whoever asks next, which is the next launch of a kernel.
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device="cuda")
        raise MemoryError(
            f"cannot page-lock {buffer.numel()} bytes of host memory (CUDA error {int(status)}): "
            "free host memory, raise the memory limit"
        )
    return buffer


def page_unlock(buffer: torch.Tensor) -> None:
    """Nothing happens to a buffer that is not locked."""
    if buffer.is_pinned():
        torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())
