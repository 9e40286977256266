# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""The random numbers behind a sampled request: known before its tokens are.

A token is sampled by the Gumbel-max trick: the argmax of log-probability plus Gumbel noise is a
draw from the distribution. The noise of the k-th token that a request emits is a function of one
number, its *seed*, and the seeds are drawn from the request's own generator one after the other.
So the text is a fixed function of the prompt and the seeds: the draft only tries to predict it, and
it may look at the same seeds while it does, which makes it right nearly as often as for greedy
requests (coupling without communication: Daliri, Musco, Suresh, arXiv 2408.07978). Whatever is
drafted, the k-th token is sampled from the target's distribution with the k-th seed. The emitted
text therefore has exactly the target's distribution, and it does not depend on what was drafted.
"""

import torch
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


class SeedStream:
    """The seeds of one request's coming tokens.

    Args:
        generator: the request's own; nobody else draws from it.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator
        self._ahead: list[int] = []

    def ahead(self, count: int) -> list[int]:
        """The seeds of the next ``count`` tokens; they stay the next ones until `advance`."""
        missing = count - len(self._ahead)
        if missing > 0:
            # As vLLM's CPU sampler draws them, so that a seeded request gets the same text.
            drawn = torch.randint(
                0, 2**31, (missing,), generator=self._generator, device=self._generator.device
            )
            self._ahead += drawn.tolist()
        return self._ahead[:count]

    def advance(self, count: int) -> None:
        """``count`` tokens were emitted."""
        self.ahead(count)
        del self._ahead[:count]


def gumbel(seeds: Tensor, vocab: int) -> Tensor:
    """Standard Gumbel noise, ``[m, vocab]`` float64, of ``[m]`` int64 seeds.

    SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) of seed and token number: the noise that vLLM's
    CPU sampler adds for the same seed.
    """
    tokens = torch.arange(1, vocab + 1, device=seeds.device)
    keys = _finalise(seeds).unsqueeze(1) + tokens * _signed(_GAMMA)
    bits = _shift(_finalise(keys), 11)
    uniform = (bits.double() + 0.5) * 2.0**-53
    return uniform.log_().neg_().log_().neg_()


def _finalise(state: Tensor) -> Tensor:
    for shift, factor in _MIX:
        state = (state ^ _shift(state, shift)) * _signed(factor)
    return state ^ _shift(state, 31)


def _shift(bits: Tensor, places: int) -> Tensor:
    """To the right, filled with zeros: torch's own shift repeats the sign."""
    return (bits >> places) & ((1 << (64 - places)) - 1)


def _signed(bits: int) -> int:
    return bits - (1 << 64) if bits >> 63 else bits
