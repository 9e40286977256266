# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""A drafting model's passes on the engine's KV blocks.

vLLM allocates blocks per request, and every attention layer has pages of its own for each of them.
So a drafting model with layers of its own finds its K/V at the same slots as the target, and
the target's substitutes share the target's pages as well.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_subspec.core.tree_attention import TreeRows
from vllm_subspec.drafters.base import ComputedRow
from vllm_subspec.engine import attention
from vllm_subspec.engine.coverage import Coverage
from vllm_subspec.engine.features import Tap

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Queries:
    """The tokens of a pass, request by request."""

    rows: Ints
    """[r] the requests' numbers in the engine's batch."""
    starts: Ints
    """[r + 1] first token of each, and the end."""
    tokens: Ints
    """[n]"""
    positions: Ints
    """[n] of each token in its text, for the rotary embedding."""
    places: Ints
    """[n] where in its request's slots the K/V of each token goes."""
    lengths: Ints
    """[r] slots of each request that hold K/V once these are written."""
    trees: TreeRows
    """The requests that are no plain sequence; by their number here, not in the batch."""

    @classmethod
    def of_sequences(
        cls, rows: Sequence[int], parts: Sequence[npt.NDArray[np.integer]], begins: Sequence[int]
    ) -> "Queries":
        """Of each request a piece of its text.

        Args:
            rows: [r] the requests' numbers in the engine's batch.
            parts: [r] tokens of each, at least one.
            begins: [r] position of the first of them.
        """
        sizes = np.array([part.size for part in parts])
        positions = np.concatenate(
            [np.arange(b, b + n) for b, n in zip(begins, sizes, strict=True)]
        )
        return cls(
            rows=np.array(rows),
            starts=np.append(0, np.cumsum(sizes)),
            tokens=np.concatenate(parts).astype(np.int64),
            positions=positions,
            places=positions.copy(),
            lengths=np.array(begins) + sizes,
            trees=TreeRows((), (), ()),
        )

    def split(self, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """``values`` ``[n, ..]`` of the tokens, by request."""
        return values.split(np.diff(self.starts).tolist())


class PagedModel:
    """A module tree that vLLM's attention layers connect with pages.

    Args:
        runner: the target's model runner.
        module: a vLLM model.
        layers: names of its attention layers; those of the target if it shares them.
    """

    def __init__(self, runner: "GPUModelRunner", module: nn.Module, layers: frozenset[str]) -> None:
        self.layers = layers
        self._runner = runner
        self._module: Any = module  # a vLLM model: its interface is not a class's

    def run(self, queries: Queries, **inputs: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """The hidden states ``[n, hidden]`` of a pass, and what else the module returns.

        Args:
            inputs: of the module beside tokens and positions.
        """
        runner, device = self._runner, self._runner.device
        table = runner.input_batch.block_table[0]
        counts = np.diff(queries.starts)
        owners = queries.rows.repeat(counts)
        blocks = table.get_numpy_array()[owners, queries.places // table.block_size]
        slots = blocks.astype(np.int64) * table.block_size + queries.places % table.block_size
        mapping = torch.as_tensor(slots, device=device)
        where = torch.as_tensor(queries.positions, device=device)
        host_starts = torch.as_tensor(queries.starts, dtype=torch.int32)
        host_lens = torch.as_tensor(queries.lengths, dtype=torch.int32)
        index = torch.as_tensor(queries.rows, device=device)
        metadata = CommonAttentionMetadata(
            query_start_loc=host_starts.to(device, non_blocking=True),
            query_start_loc_cpu=host_starts,
            seq_lens=host_lens.to(device, non_blocking=True),
            num_reqs=queries.rows.size,
            num_actual_tokens=queries.tokens.size,
            max_query_len=int(counts.max()),
            max_seq_len=int(host_lens.max()),
            block_table_tensor=table.get_device_tensor(runner.input_batch.num_reqs)[index],
            slot_mapping=mapping,
            causal=True,
            positions=where,
            is_prefilling=torch.zeros(queries.rows.size, dtype=torch.bool),
            seq_lens_cpu_upper_bound=host_lens,
        )
        groups = [g for g in runner.attn_groups[0] if not self.layers.isdisjoint(g.layer_names)]
        per_layer = {}
        for group in groups:
            built = group.get_metadata_builder(0).build(0, metadata)
            per_layer.update(dict.fromkeys(group.layer_names, built))
        attention.attach(groups, per_layer, queries.trees, queries.starts.tolist())
        with set_forward_context(
            per_layer,
            runner.vllm_config,
            num_tokens=queries.tokens.size,
            slot_mapping=dict.fromkeys(per_layer, mapping),
            skip_compiled=True,
        ):
            tokens = torch.as_tensor(queries.tokens, device=device)
            output = self._module(input_ids=tokens, positions=where, **inputs)
        return output if isinstance(output, tuple) else (output, None)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[m, vocab]`` of hidden states ``[m, hidden]``."""
        logits: torch.Tensor = self._module.compute_logits(hidden)
        return logits

    def follow(self, coverage: Coverage, rows: list[ComputedRow], tap: Tap | None = None) -> None:
        """Compute what K/V is missing of the rows' text, in one pass.

        Args:
            coverage: of the model's pages.
            tap: takes the features of what is computed.
        """
        begins = [coverage.of(row.request_id, row.end) for row in rows]
        behind = [(row, b) for row, b in zip(rows, begins, strict=True) if b < row.end]
        if not behind:
            return
        parts = [row.history[begin : row.end] for row, begin in behind]
        queries = Queries.of_sequences(
            [row.index for row, _ in behind], parts, [begin for _, begin in behind]
        )
        output = self.run(queries)
        for row, _ in behind:
            coverage.reach(row.request_id, row.end)
        if tap is not None:
            for (row, begin), own in zip(behind, queries.split(tap.of(*output)), strict=True):
                tap.features.add(row.request_id, begin, own)
