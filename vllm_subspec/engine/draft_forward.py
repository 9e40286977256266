# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Forwards of the draft on the target's own KV pages.

A draft step computes one token per row at its next position. Its K/V goes into the slots that the
scheduler reserved behind the committed tokens (the lookahead), at or above the root's slot; the
verification that follows writes the target's K/V over every one of them.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner


class DraftForward:
    """The rows of one round and the forwards over them.

    Args:
        runner: the target's model runner, after `initialize_kv_cache`.
        draft: the draft's module tree (`weights.substitute.build_draft`).
        rows: ``[n]`` indices into the runner's batch of the rows that draft.
        positions: ``[n]`` position of each row's root, the newest token, whose K/V does not
            exist yet.
    """

    def __init__(
        self, runner: "GPUModelRunner", draft: nn.Module, rows: np.ndarray, positions: np.ndarray
    ) -> None:
        self._runner = runner
        self._draft: Any = draft  # a vLLM model: its interface is not a class's
        table = runner.input_batch.block_table[0]
        self._block_size = table.block_size
        device = runner.device
        self._positions = torch.as_tensor(positions, dtype=torch.int64, device=device)
        self._last_position = int(positions.max())
        index = torch.as_tensor(rows, dtype=torch.int64, device=device)
        self._block_table = table.get_device_tensor(runner.input_batch.num_reqs)[index]

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with some of the rows only; ``rows`` are their indices, ``[m]`` int64."""
        self._positions = self._positions[rows]
        self._block_table = self._block_table[rows]

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Feed one token per row, advance, and return the next token's logits ``[n, vocab]``."""
        runner = self._runner
        n = tokens.shape[0]
        blocks = (self._positions // self._block_size).unsqueeze(1)
        slots = (
            self._block_table.gather(1, blocks).squeeze(1).to(torch.int64) * self._block_size
            + self._positions % self._block_size
        )
        starts = torch.arange(n + 1, dtype=torch.int32)
        seq_lens = (self._positions + 1).to(torch.int32)
        # Only backends that plan on the host look at these, and there an upper bound is enough.
        host_seq_lens = seq_lens.cpu()
        metadata = CommonAttentionMetadata(
            query_start_loc=starts.to(runner.device, non_blocking=True),
            query_start_loc_cpu=starts,
            seq_lens=seq_lens,
            num_reqs=n,
            num_actual_tokens=n,
            max_query_len=1,
            max_seq_len=self._last_position + 1,
            block_table_tensor=self._block_table,
            slot_mapping=slots,
            causal=True,
            positions=self._positions,
            is_prefilling=torch.zeros(n, dtype=torch.bool),
            seq_lens_cpu_upper_bound=host_seq_lens,
        )
        per_layer = {}
        for group in runner.attn_groups[0]:
            built = group.get_metadata_builder(0).build(0, metadata)
            per_layer.update(dict.fromkeys(group.layer_names, built))
        with set_forward_context(
            per_layer,
            runner.vllm_config,
            num_tokens=n,
            slot_mapping=dict.fromkeys(per_layer, slots),
            skip_compiled=True,
        ):
            hidden = self._draft(input_ids=tokens, positions=self._positions)
        self._positions = self._positions + 1
        self._last_position += 1
        logits: torch.Tensor = self._draft.compute_logits(hidden)
        return logits
