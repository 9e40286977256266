# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""A ready-made substitute is cut among the ranks as vLLM cuts the weights that it stands for."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)

from vllm_subspec.config import SubspecOptions
from vllm_subspec.weights.checkpoint import SubstituteCheckpoint
from vllm_subspec.weights.quantized_weight import QuantFormat
from vllm_subspec.weights.save_checkpoint import quantize_checkpoint
from vllm_subspec.weights.substitute_source import SubstituteSource

LAYER = "model.layers.0"
HIDDEN = 64
HEADS, HEAD = 8, 8
UP = 96
FORMAT = QuantFormat(4, 16)

Make = Callable[[], LinearBase]


def qkv(kv_heads: int) -> Make:
    return lambda: QKVParallelLinear(
        HIDDEN, HEAD, HEADS, kv_heads, bias=False, prefix=f"{LAYER}.self_attn.qkv_proj"
    )


def gate_up() -> LinearBase:
    return MergedColumnParallelLinear(
        HIDDEN, [UP, UP], bias=False, prefix=f"{LAYER}.mlp.gate_up_proj"
    )


def o_proj() -> LinearBase:
    return RowParallelLinear(HEADS * HEAD, HIDDEN, bias=False, prefix=f"{LAYER}.self_attn.o_proj")


def o_proj_by_columns() -> LinearBase:
    return ColumnParallelLinear(
        HEADS * HEAD, HIDDEN, bias=False, prefix=f"{LAYER}.self_attn.o_proj"
    )


PARTS: dict[type[LinearBase], dict[str, Any]] = {
    QKVParallelLinear: {f"self_attn.{part}_proj": part for part in "qkv"},
    MergedColumnParallelLinear: {"mlp.gate_proj": 0, "mlp.up_proj": 1},
    RowParallelLinear: {"self_attn.o_proj": None},
}
"""The checkpoint's tensors of a linear, and what vLLM calls each when it loads it."""


def checkpoint(folder: Path, kv_heads: int) -> Path:
    """A low-bit checkpoint of one layer."""
    (folder / "full").mkdir()
    (folder / "full" / "config.json").write_text("{}")
    torch.manual_seed(0)
    sizes = {"q": HEADS, "k": kv_heads, "v": kv_heads, "o": HIDDEN // HEAD}
    tensors = {
        f"self_attn.{part}_proj": torch.randn(heads * HEAD, HIDDEN) for part, heads in sizes.items()
    } | {f"mlp.{part}_proj": torch.randn(UP, HIDDEN) for part in ("gate", "up")}
    named = {f"{LAYER}.{name}.weight": tensor for name, tensor in tensors.items()}
    save_file(named, folder / "full" / "model.safetensors")
    quantize_checkpoint(folder / "full", folder / "low", FORMAT, "rtn")
    return folder / "low"


def source(folder: Path, rank: int) -> SubstituteSource:
    text: Any = SimpleNamespace(to_dict=dict)
    model = SimpleNamespace(dtype=torch.float32, hf_text_config=text)
    config: Any = SimpleNamespace(model_config=model)
    options = SubspecOptions.parse({"substitute": str(folder)})
    return SubstituteSource(config, options, rank, torch.device("cpu"))


def of_rank(make: Make, rank: int, ranks: int) -> LinearBase:
    """vLLM's linear as this rank of so many builds it."""
    group = SimpleNamespace(rank_in_group=rank, world_size=ranks)
    with pytest.MonkeyPatch.context() as patch, set_current_vllm_config(VllmConfig()):
        patch.setattr(parallel_state, "_TP", group)
        return make()


@pytest.mark.parametrize(
    ("make", "kv_heads", "ranks"),
    [
        (qkv(8), 8, 2),
        (qkv(4), 4, 4),
        (qkv(2), 2, 4),  # ranks 0 and 1 have the first head of keys, 2 and 3 the second
        (qkv(1), 1, 4),
        (qkv(2), 2, 1),
        (gate_up, 8, 2),
        (gate_up, 8, 4),
        (o_proj, 8, 2),
        (o_proj, 8, 4),
    ],
)
def test_a_rank_gets_what_vllm_loads_there(
    tmp_path: Path, make: Make, kv_heads: int, ranks: int
) -> None:
    folder = checkpoint(tmp_path, kv_heads)
    opened = SubstituteCheckpoint.open(folder)
    for rank in range(ranks):
        of = of_rank(make, rank, ranks)
        for name, shard in PARTS[type(of)].items():
            whole = opened.weight(f"{LAYER}.{name}").dequantize()
            of.weight_loader(of.weight, whole, *([] if shard is None else [shard]))
        found = source(folder, rank)._load(of)
        assert torch.equal(found.dequantize(), of.weight)


def test_a_linear_that_is_cut_in_an_unknown_way_is_refused(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 8)
    whole = of_rank(o_proj_by_columns, 0, 1)
    assert source(folder, 0)._load(whole).codes.shape == whole.weight.shape
    with pytest.raises(ValueError) as refused:
        source(folder, 0)._load(of_rank(o_proj_by_columns, 0, 2))
    assert str(refused.value) == (
        f'"substitute" with tensor parallelism does not know how {whole.prefix} is sharded: '
        "remove it and quantize while loading"
    )
