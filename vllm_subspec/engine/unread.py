# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""What a weight store holds already is not read from the checkpoint.

vLLM reads every tensor of a checkpoint and hands it to the model. Those that nobody will look at
come without their data instead: of the right shape, on torch's "meta" device.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.model_loader import weight_utils

from vllm_subspec.weights.streamable import Streamable
from vllm_subspec.weights.substitute_source import FUSED


def holds(parts: Iterable[Streamable]) -> Callable[[str], bool]:
    """Whether a checkpoint's tensor, by its name, is a weight of ``parts``.

    Where a family's checkpoints have names of their own, which only vLLM's model knows, none is.
    """
    linears: set[str] = set()
    experts: tuple[str, ...] = ()
    for part in parts:
        if isinstance(part.module, LinearBase):
            parent, _, leaf = part.module.prefix.rpartition(".")
            linears |= {f"{parent}.{name}.weight" for name in (leaf, *FUSED.get(leaf, ()))}
        else:
            experts += (f"{part.module.layer_name}.",)
    return lambda name: name in linears or (name.startswith(experts) and name.endswith(".weight"))


@contextlib.contextmanager
def unread(left_out: Callable[[str], bool]) -> Iterator[None]:
    """While vLLM reads safetensors, tensors come without data whose names are ``left_out``."""
    original = weight_utils.safe_open

    @contextlib.contextmanager
    def opened(*args: Any, **kwargs: Any) -> Iterator[_File]:
        with original(*args, **kwargs) as file:
            yield _File(file, left_out)

    weight_utils.safe_open = opened
    try:
        yield
    finally:
        weight_utils.safe_open = original


class _File:
    """An open safetensors file."""

    def __init__(self, file: Any, left_out: Callable[[str], bool]) -> None:
        self._file = file
        self._left_out = left_out

    def get_tensor(self, name: str) -> torch.Tensor:
        if self._left_out(name):
            return torch.empty(self._file.get_slice(name).get_shape(), device="meta")
        tensor: torch.Tensor = self._file.get_tensor(name)
        return tensor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
