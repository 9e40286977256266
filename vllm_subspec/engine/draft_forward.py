# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Forwards of the draft on the target's own KV pages.

A draft step computes the next level's logits at the frontier of every drafting row, all rows in one
batch. Each node that is expanded gets the next free slot of its row, the root the first one, at or
above the root's position: in the slots that the scheduler reserved behind the committed tokens (the
lookahead). The verification that follows writes the target's K/V over what it needs of them.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_subspec.core.growth import Nodes
from vllm_subspec.core.tree_attention import TreeRows
from vllm_subspec.engine import attention

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner


class DraftForward:
    """The rows of one round and the forwards over their frontiers.

    Args:
        runner: the target's model runner, after `initialize_kv_cache`.
        draft: the draft's module tree (`weights.substitute.build_draft`).
        rows: ``[n]`` indices into the runner's batch of the rows that draft.
        positions: ``[n]`` position of each row's root, the newest token, whose K/V does not
            exist yet.
        slots: ``[n]`` nodes that each row may expand, the root included.
    """

    def __init__(
        self,
        runner: "GPUModelRunner",
        draft: nn.Module,
        rows: np.ndarray,
        positions: np.ndarray,
        slots: np.ndarray,
    ) -> None:
        self._runner = runner
        self._draft: Any = draft  # a vLLM model: its interface is not a class's
        self._roots = positions
        table = runner.input_batch.block_table[0]
        self._block_size = table.block_size
        self._blocks = table.get_numpy_array()[rows]
        index = torch.as_tensor(rows, dtype=torch.int64, device=runner.device)
        self._block_table = table.get_device_tensor(runner.input_batch.num_reqs)[index]
        most = int(slots.max())
        self._used = np.zeros(len(rows), np.int64)
        # What each expanded node, by its slot behind the committed tokens, attends to there.
        self._seen = np.zeros((len(rows), most, most), np.bool_)
        # The slot of the nodes expanded last, by index; the root's own is the last entry.
        self._slot_of = np.zeros((len(rows), 1), np.int64)
        self._depth = 0

    def step(self, nodes: Nodes) -> torch.Tensor:
        """Expand ``nodes``, the whole frontier: logits ``[m, vocab]`` of the tokens after them.

        The frontiers of a round follow each other, level by level.
        """
        rows, counts = np.unique(nodes.rows, return_counts=True)
        starts = np.append(0, np.cumsum(counts))
        slots = self._take_slots(nodes, np.arange(nodes.rows.size) - starts[:-1].repeat(counts))
        places = self._roots[nodes.rows] + slots
        blocks = self._blocks[nodes.rows, places // self._block_size].astype(np.int64)
        slot_mapping = blocks * self._block_size + places % self._block_size
        logits = self._forward(
            nodes.tokens, self._roots[nodes.rows] + self._depth, slot_mapping, rows, starts, slots
        )
        self._depth += 1
        return logits

    def _take_slots(self, nodes: Nodes, rank: np.ndarray) -> np.ndarray:
        """[m] the slots of ``nodes``, the ``rank``-th of their row in this step."""
        rows = nodes.rows
        slots = self._used[rows] + rank
        if self._depth:
            parents = self._slot_of[rows, nodes.parents]
            self._seen[rows, slots] = self._seen[rows, parents]
        self._seen[rows, slots, slots] = True
        self._used += np.bincount(rows, minlength=self._used.size)
        self._slot_of = np.zeros((self._used.size, int(nodes.indices.max()) + 2), np.int64)
        self._slot_of[rows, nodes.indices] = slots
        return slots

    def _trees(self, rows: np.ndarray, starts: np.ndarray, slots: np.ndarray) -> TreeRows:
        """Those of ``rows`` whose queries are no plain sequence: not a single query that attends
        to everything before it."""
        found = []
        for i, row in enumerate(rows):
            own = slots[starts[i] : starts[i + 1]]
            mask = self._seen[row, own, : self._used[row]]
            if not mask.all():
                found.append((i, int(self._roots[row]), torch.from_numpy(mask)))
        indices, prefixes, masks = zip(*found, strict=True) if found else ((), (), ())
        return TreeRows(indices, prefixes, masks)

    def _forward(
        self,
        tokens: np.ndarray,
        positions: np.ndarray,
        slot_mapping: np.ndarray,
        rows: np.ndarray,
        starts: np.ndarray,
        slots: np.ndarray,
    ) -> torch.Tensor:
        runner, device = self._runner, self._runner.device
        n = tokens.size
        host_starts = torch.as_tensor(starts, dtype=torch.int32)
        host_lens = torch.as_tensor(self._roots[rows] + self._used[rows], dtype=torch.int32)
        where = torch.as_tensor(positions, device=device)
        mapping = torch.as_tensor(slot_mapping, device=device)
        chosen = torch.as_tensor(rows, device=device)
        metadata = CommonAttentionMetadata(
            query_start_loc=host_starts.to(device, non_blocking=True),
            query_start_loc_cpu=host_starts,
            seq_lens=host_lens.to(device, non_blocking=True),
            num_reqs=rows.size,
            num_actual_tokens=n,
            max_query_len=int(np.diff(starts).max()),
            max_seq_len=int(host_lens.max()),
            block_table_tensor=self._block_table[chosen],
            slot_mapping=mapping,
            causal=True,
            positions=where,
            is_prefilling=torch.zeros(rows.size, dtype=torch.bool),
            seq_lens_cpu_upper_bound=host_lens,
        )
        per_layer = {}
        for group in runner.attn_groups[0]:
            built = group.get_metadata_builder(0).build(0, metadata)
            per_layer.update(dict.fromkeys(group.layer_names, built))
        trees = self._trees(rows, starts, slots)
        attention.attach(runner.attn_groups[0], per_layer, trees, starts.tolist())
        with set_forward_context(
            per_layer,
            runner.vllm_config,
            num_tokens=n,
            slot_mapping=dict.fromkeys(per_layer, mapping),
            skip_compiled=True,
        ):
            hidden = self._draft(input_ids=torch.as_tensor(tokens, device=device), positions=where)
        logits: torch.Tensor = self._draft.compute_logits(hidden)
        return logits
