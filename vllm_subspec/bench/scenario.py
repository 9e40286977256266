# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""What a benchmark compares: ways of drafting, on workloads, under settings."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from vllm_subspec.bench.prompts import Prompt


@dataclass(frozen=True)
class Way:
    """A way to generate, to which a running engine can be switched."""

    speculate: bool
    drafting: Mapping[str, Any]
    """Arguments of the workers' ``set_drafting`` but for the depth."""


OFF = "off"
WAYS: dict[str, dict[str, Way]] = {
    "subspec": {
        OFF: Way(False, {}),
        "chain": Way(True, {"branching": 1, "hierarchy": False}),
        "tree": Way(True, {"hierarchy": False}),
        "union": Way(True, {}),
        "full chain": Way(True, {"branching": 1, "hierarchy": False, "pruning": "none"}),
        "full tree": Way(True, {"hierarchy": False, "pruning": "none"}),
    },
    "hierspec": {OFF: Way(False, {}), "hierspec": Way(True, {})},
}
"""By method: without speculation; sequences and trees that the substitute grows alone; what it
makes of a cheaper drafter's guesses, or the intermediate model does. The full ones never stop
early."""
USUAL = {"subspec": (OFF, "chain", "tree", "union"), "hierspec": (OFF, "hierspec")}
"""The ways that are compared unless others are asked for."""


@dataclass(frozen=True)
class Cell:
    """One setting, under which all ways take turns."""

    bits: int | None
    batch: int
    temperature: float
    depth: int | None


@dataclass(frozen=True)
class Scenario:
    """A whole benchmark. The first value of each list is the standard one.

    Every batch size meets every temperature; depths and widths of substitutes are varied at the
    standard workload alone.
    """

    model: str
    options: Mapping[str, Any]
    """The ``--speculative-config``, with its method."""
    engine: Mapping[str, Any]
    """Further arguments of `vllm.LLM`."""
    prompts: tuple[Prompt, ...]
    requests: int
    """Of a cell, or one batch if that is more."""
    tokens: int
    """Of an answer."""
    plain_tokens: int
    """Of an answer without speculation."""
    ways: tuple[str, ...]
    batches: tuple[int, ...] = (1,)
    temperatures: tuple[float, ...] = (0.0,)
    depths: tuple[int | None, ...] = (None,)
    bits: tuple[int | None, ...] = (None,)

    @property
    def method(self) -> str:
        return str(self.options["method"])

    def options_for(self, bits: int | None) -> dict[str, Any]:
        """Of the engine with substitutes of this width."""
        deepest = max((depth for depth in self.depths if depth is not None), default=None)
        added = {"bits": bits, "depth": deepest}
        return {**self.options, **{k: v for k, v in added.items() if v is not None}}

    def cells(self, bits: int | None) -> Iterator[Cell]:
        """Those that the engine with substitutes of this width serves, the standard one first."""
        if bits != self.bits[0]:
            yield Cell(bits, self.batches[0], self.temperatures[0], self.depths[0])
            return
        for batch, temperature in product(self.batches, self.temperatures):
            yield Cell(bits, batch, temperature, self.depths[0])
        for depth in self.depths[1:]:
            yield Cell(bits, self.batches[0], self.temperatures[0], depth)

    def batches_of(self, cell: Cell) -> list[list[Prompt]]:
        """The prompts of a cell, batch by batch."""
        count = max(self.requests, cell.batch) // cell.batch * cell.batch
        chosen = [self.prompts[i % len(self.prompts)] for i in range(count)]
        return [chosen[i : i + cell.batch] for i in range(0, count, cell.batch)]
