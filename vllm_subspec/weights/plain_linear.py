# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Full-precision linears over a plain weight: one that lies in a buffer which will be refilled.

The fast kernels of libraries repack a weight into memory of their own and cannot be pointed at a
ring slot. On a CPU our own (csrc/full_linear.h) reads the weight as a checkpoint has it, at the
speed of memory; a token's result does not depend on its batch. Libraries have products over a plain
weight, too: which of them is faster from how many tokens on is measured.
"""

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional
from vllm.logger import init_logger
from vllm.utils.torch_utils import direct_register_custom_op

from vllm_subspec.weights.kernels import measured, native
from vllm_subspec.weights.kernels.compiler import BuildError

logger = init_logger(__name__)

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""``x`` [M, K], weight [N, K] and bias [N] or None, to [M, N], all of one dtype."""

OWN, ONEDNN, TORCH = "own", "oneDNN", "torch"

_CLEARLY = 1.3
"""How many times as fast another must be than our own, whose results do not depend on the batch: a
pass that verifies then computes what single tokens would have."""


def _own(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.vllm_subspec.linear.default(x, weight, bias)
    return out


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


_LINEARS: dict[str, Linear] = {OWN: _own, ONEDNN: _onednn, TORCH: functional.linear}


def own_linear(dtype: torch.dtype) -> Linear | None:
    """Our own linear on this CPU; None where there is none, or one that computes wrong."""
    return _own if _own_is_right(dtype) else None


def plain_linear(device: torch.device, dtype: torch.dtype) -> Linear:
    """The linear for weights of ``dtype`` that lie on ``device``."""
    if device.type != "cpu":
        return functional.linear
    told = ", ".join(f"from {tokens} tokens on {name}" for tokens, name in choice(dtype))
    logger.info_once("Streamed linears of %s: %s.", dtype, told)
    only_own = {name for _, name in choice(dtype)} == {OWN}
    linear: Linear = _own if only_own else torch.ops.vllm.subspec_plain_linear
    return linear


@functools.cache
def choice(dtype: torch.dtype) -> tuple[tuple[int, str], ...]:
    """Which linear computes from how many tokens on, the fewest first."""
    return steps(measure(dtype))


def steps(found: Mapping[str, measured.Seconds]) -> tuple[tuple[int, str], ...]:
    """The fastest by tokens; our own unless another is clearly faster."""
    chosen: list[tuple[int, str]] = []
    for tokens in measured.TOKENS:
        best = min(found, key=lambda name: found[name][tokens])
        if OWN in found and found[OWN][tokens] < _CLEARLY * found[best][tokens]:
            best = OWN
        if not chosen or chosen[-1][1] != best:
            chosen.append((tokens, best))
    return tuple(chosen)


@functools.cache
def measure(dtype: torch.dtype) -> dict[str, measured.Seconds]:
    """Seconds of a product with each linear that this CPU has, by name and tokens."""
    family = f"full precision, {str(dtype).removeprefix('torch.')}"
    return measured.seconds(family, candidates(dtype))


def candidates(
    dtype: torch.dtype, shape: tuple[int, int] = measured.SHAPE
) -> dict[str, measured.Candidate]:
    """The linears that this CPU may have, by name.

    Args:
        shape: rows and columns of the weights that they are to be measured with.
    """
    names = [OWN, ONEDNN, TORCH] if _own_is_right(dtype) else [ONEDNN, TORCH]

    def candidate(linear: Linear) -> measured.Candidate:
        def make() -> measured.Product:
            weight = torch.full(shape, 1 / shape[1], dtype=dtype)
            return lambda x: linear(x, weight, None)

        return measured.Candidate(make, shape[0] * shape[1] * dtype.itemsize)

    return {name: candidate(_LINEARS[name]) for name in names}


@functools.cache
def _own_is_right(dtype: torch.dtype) -> bool:
    """Load and check our own linear once per process; log why if that fails."""
    try:
        native.load()
        _check(dtype)
    except BuildError as error:
        logger.warning("No %r linear for %s, so slower ones are used: %s", OWN, dtype, error)
        return False
    return True


def _check(dtype: torch.dtype) -> None:
    """Compare with float64 on small whole numbers, which every dtype has; BuildError if it
    differs."""
    generator = torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randint, -2, 3, generator=generator)
    for rows, columns in ((40, 64), (70, 1100)):
        weight, bias = draw((rows, columns)).to(dtype), draw((rows,)).to(dtype)
        for tokens in (1, 2, 5, 17):
            x = draw((tokens, columns)).to(dtype)
            exact = x.double() @ weight.double().T + bias.double()
            if not torch.equal(_own(x, weight, bias), exact.to(dtype)):
                raise BuildError("it computes wrong results on this CPU")


def _dispatch(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    chosen = choice(x.dtype)
    few = chosen[0][1]
    name = next((name for tokens, name in reversed(chosen) if x.shape[0] >= tokens), few)
    return _LINEARS[name](x, weight, bias)


def _dispatch_shape(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


direct_register_custom_op(
    "subspec_plain_linear", _dispatch, mutates_args=[], fake_impl=_dispatch_shape
)
