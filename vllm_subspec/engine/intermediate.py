# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""The intermediate model of a hierarchy, on KV pages.

The pages hold a row's text up to its root, whose K/V is not computed yet. A pass computes what is
missing of the text, the root and the nodes of the row's tree, behind each other; then the K/V of
the accepted path moves to the slots behind the root, where the next pass finds it as text.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vllm_subspec.core.acceptance import Walks
from vllm_subspec.core.compaction import moves
from vllm_subspec.core.draft_tokens import DraftTokens
from vllm_subspec.core.tree_attention import TreeRows, verification_mask
from vllm_subspec.drafters.base import ComputedRow, DraftRow
from vllm_subspec.engine import attention
from vllm_subspec.engine.coverage import Coverage
from vllm_subspec.engine.features import Tap
from vllm_subspec.engine.paged_model import PagedModel, Queries

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner


class PagedIntermediate:
    """Verifies trees behind the rows' texts.

    Args:
        runner: the target's model runner.
        model: of one KV group with the target.
        coverage: of its pages.
        layers: its attention layers that have pages, once vLLM has made them.
        tap: takes the features that a head drafts from; None if no head drafts.
    """

    def __init__(
        self,
        runner: "GPUModelRunner",
        model: PagedModel,
        coverage: Coverage,
        layers: Iterable[Any],
        tap: Tap | None,
    ) -> None:
        self._runner = runner
        self._model = model
        self._coverage = coverage
        self._layers = layers
        self._tap = tap
        self._rows: list[DraftRow] = []
        # What the tap took of the rows verified last, from where on in their text.
        self._taken: list[tuple[int, torch.Tensor]] = []

    def verify(self, rows: list[DraftRow], drafts: list[DraftTokens]) -> torch.Tensor:
        begins = [self._coverage.of(row.request_id, row.position) for row in rows]
        texts = [row.history[begin:] for row, begin in zip(rows, begins, strict=True)]
        plain = Queries.of_sequences(
            [row.index for row in rows],
            [np.append(text, draft.tree.tokens) for text, draft in zip(texts, drafts, strict=True)],
            begins,
        )
        wanted, found = [], []
        for i, (text, draft) in enumerate(zip(texts, drafts, strict=True)):
            root = int(plain.starts[i]) + text.size - 1
            wanted.append(np.arange(root, plain.starts[i + 1]))
            if not draft.tree.is_chain:
                plain.positions[wanted[-1][1:]] = rows[i].position + draft.tree.depths
                found.append((i, begins[i], _mask(text.size - 1, draft)))
        indices, prefixes, masks = zip(*found, strict=True) if found else ((), (), ())
        self._rows = rows
        output = self._model.run(replace(plain, trees=TreeRows(indices, prefixes, masks)))
        if self._tap is not None:
            features = plain.split(self._tap.of(*output))
            self._taken = list(zip(begins, features, strict=True))
        return self._model.logits(output[0][torch.as_tensor(np.concatenate(wanted))])

    def keep(self, walks: Walks) -> None:
        roots = [row.position for row in self._rows]
        moved = moves(walks, roots)
        if moved.rows.size:
            table = self._runner.input_batch.block_table[0]
            index = np.array([row.index for row in self._rows])
            slots = moved.slots(table.get_numpy_array()[index], table.block_size)
            sources, destinations = (
                torch.as_tensor(part, device=self._runner.device) for part in slots
            )
            attention.move_pages(self._runner.device, self._layers, sources, destinations)
        for row, count in zip(self._rows, walks.counts, strict=True):
            self._coverage.reach(row.request_id, row.position + 1 + int(count))
        if self._tap is not None:
            for row, path, taken in zip(self._rows, walks.paths, self._taken, strict=True):
                begin, features = taken
                text = row.position + 1 - begin
                kept = torch.as_tensor(np.append(np.arange(text), text + path))
                self._tap.features.add(row.request_id, begin, features[kept])

    def follow(self, rows: list[ComputedRow]) -> None:
        self._model.follow(self._coverage, rows, self._tap)


def _mask(before: int, draft: DraftTokens) -> torch.Tensor:
    """What a pass's queries attend to of each other: ``before`` tokens of text, the root, nodes."""
    tree = verification_mask(draft.tree)
    mask = torch.ones(before + len(tree), before + len(tree), dtype=torch.bool).tril_()
    mask[before:, before:] = tree
    return mask
