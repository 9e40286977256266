# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""All ranks of an engine must decide alike, also where a decision depends on measured time."""

from collections.abc import Sequence

import torch
from vllm.distributed import get_tp_group


def agree(seconds: Sequence[float]) -> list[float]:
    """Rank 0's ``seconds``, on every rank; all ranks call it with equally many."""
    group = get_tp_group()
    if group.world_size == 1 or not seconds:
        return list(seconds)
    clock = torch.tensor(seconds, dtype=torch.float64, device=group.device)
    agreed: list[float] = group.broadcast(clock, src=0).tolist()
    return agreed
