# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""A platform that says it is CUDA, in a process of its own: nothing can be computed on it, but vLLM
and our code choose, import and configure as on a GPU.

Import it first: vLLM asks once where it runs.
"""

import importlib.machinery
import os
import sys
import types
from collections.abc import Callable
from typing import Any
from unittest.mock import MagicMock

import torch


class _Operator:
    """And each of its overloads."""

    def __call__(self, *args: Any, **kwargs: Any) -> bool:
        return False

    def __getattr__(self, name: str) -> "_Operator":
        return self


def _extensions() -> None:
    """What only the CUDA wheel brings: operators, and their fake forms."""
    of_namespace = torch._ops._OpNamespace.__getattr__

    def operator(self: Any, name: str) -> Any:
        try:
            return of_namespace(self, name)
        except AttributeError:
            if not self.name.startswith(("_C", "_moe_C", "_vllm_fa")):
                raise
            return _Operator()

    register_fake = torch.library.register_fake

    def fake(op: Any, func: Any = None, /, **kwargs: Any) -> Any:
        def put(function: Callable[..., Any]) -> Any:
            try:
                return register_fake(op, **kwargs)(function)
            except RuntimeError:
                return function

        return put if func is None else put(func)

    setattr(torch._ops._OpNamespace, "__getattr__", operator)  # noqa: B010 - mypy allows no other
    torch.library.register_fake = fake
    for name in ("_C_stable_libtorch", "_moe_C_stable_libtorch"):
        module = types.ModuleType(f"vllm.{name}")
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
        sys.modules[module.__name__] = module
    for name in ("vllm.vllm_flash_attn", "vllm.vllm_flash_attn.flash_attn_interface"):
        sys.modules[name] = MagicMock()


_capability = (8, 9)


def set_capability(capability: tuple[int, int]) -> None:
    """Of the GPU from now on; at first it is 8.9."""
    global _capability
    _capability = capability


def install() -> None:
    """Have vLLM run on a GPU with 24 GiB."""
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    _extensions()
    import vllm.platforms
    from vllm.platforms.cuda import CudaPlatformBase
    from vllm.platforms.interface import DeviceCapability

    class Faked(CudaPlatformBase):
        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(*_capability)

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return "none"

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            return 24 << 30

        @classmethod
        def is_fully_connected(cls, physical_device_ids: list[int]) -> bool:
            return False

    vllm.platforms._current_platform = Faked()
