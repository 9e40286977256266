# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Invariants 1, 3 and 4: KV pages hold target K/V, the target is never altered, streamed weights
are bit-exact and never seen half-written.
"""

import contextlib
import gc
import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from vllm import LLM, SamplingParams
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm

from tests.engine.helpers import (
    DEFAULTS,
    LAYERS,
    MODEL,
    ROUGH,
    Batch,
    Engines,
    assert_trees_were_tried,
    draft_counts,
    generate,
    greedy,
    kv_pages,
    memory_plan,
    resident_gib,
    scheduler_of,
    source_prompts,
    worker_of,
)
from vllm_subspec.weights.fused_norm import FusedRMSNorm
from vllm_subspec.weights.ring import BlockSource
from vllm_subspec.weights.substitute import build_draft

PROMPTS = source_prompts(8, shortest=7, longest=90)
# They end one by one, so that at times a row that drafts nothing lies between rows that do.
PARAMS = [greedy(20 + 5 * i) for i in range(8)]
LONG = [
    greedy(100 + 25 * i)
    if i % 2
    else SamplingParams(temperature=0.7, seed=i, max_tokens=100 + 25 * i, ignore_eos=True)
    for i in range(8)
]


def _pages_without_speculation(engines: Engines) -> list[torch.Tensor]:
    """Of each request the K/V of its prompt and its answer but the last token."""
    llm = engines.get(None)
    batch = Batch(llm, PROMPTS, LONG)
    pages: dict[int, torch.Tensor] = {}
    for _ in batch.steps():
        for i, request in batch.running().items():
            if request.num_output_tokens == LONG[i].max_tokens - 1:
                pages[i] = kv_pages(llm, batch.id(i), 0, request.num_tokens - 1)
    return [pages[i] for i in range(len(PROMPTS))]


def test_committed_pages_hold_the_targets_kv(engines: Engines) -> None:
    """After every round, every slot below the committed length, against a run without speculation.

    The same float32 sums in another order (a matrix product over k rows instead of one, the
    streamed kernel instead of the packed one) move K and V by some ulps in each layer: with values
    of the order of 1 to 10, less than 1e-3. The yardstick for "another computation" is in the same
    pages: right above the committed length lies the draft's K/V of the root, whose own value the
    run without speculation holds, too.
    """
    expected = _pages_without_speculation(engines)
    llm = engines.get(ROUGH)
    before = draft_counts(llm)
    batch = Batch(llm, PROMPTS, LONG)
    pool = scheduler_of(llm).kv_cache_manager
    committed_error, draft_errors = 0.0, []
    compared = 0
    for _ in batch.steps():
        for i, request in batch.running().items():
            length = min(request.num_computed_tokens, expected[i].shape[-2])
            assert request.num_computed_tokens == request.num_tokens - 1
            pages = kv_pages(llm, batch.id(i), 0, length + bool(request.spec_token_ids))
            error = (pages[..., :length, :] - expected[i][..., :length, :]).abs()
            committed_error = max(committed_error, error.max().item())
            compared += 1
            # The draft's own K/V went into pages that the request owns, not into a neighbour's.
            owned = len(pool.get_block_ids(batch.id(i))[0]) * DEFAULTS["block_size"]
            assert owned >= request.num_computed_tokens + len(request.spec_token_ids)
            if request.spec_token_ids and length < expected[i].shape[-2]:
                root = pages[..., length, :] - expected[i][..., length, :]
                draft_errors.append(root.abs().amax(dim=(1, 2, 3)))
    assert compared > 200
    assert_trees_were_tried(draft_counts(llm) - before, 150)
    assert committed_error < 1e-3
    # In every layer of every round the draft's K/V would be noticed.
    assert len(draft_errors) > 150
    assert torch.stack(draft_errors).min() > 20 * committed_error


def _snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything of a module tree that building a draft could alter."""
    state: dict[str, Any] = {}
    for name, module in model.named_modules():
        state[name] = (id(module), type(module), type(module).forward)
        for key, value in vars(module).items():
            entry: Any = id(value)
            if isinstance(value, dict):  # parameters, buffers, modules, hooks
                entry = (entry, [(k, id(v)) for k, v in value.items()])
            state[f"{name}:{key}"] = entry
        method = getattr(module, "quant_method", None)
        if method is not None:
            state[f"{name}:method"] = {k: id(v) for k, v in vars(method).items()}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        data = tensor.detach()
        checksum = hash(data.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        state[f"{name}="] = (id(tensor), data.data_ptr(), data.shape, data.stride(), checksum)
    return state


def _differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))


def _settle(llm: LLM) -> None:
    """Let the ring's head start finish, so that slots are still."""
    ring = worker_of(llm).loading.ring
    for slot in range(ring.slots):
        ring.transfer.wait(slot)


def test_the_target_is_never_altered(engines: Engines) -> None:
    """By building, running and dropping a draft; streamed and resident layers."""
    llm = engines.get(
        {**ROUGH, "resident_weights_gib": resident_gib(3), "substitute_layers": "all"}
    )
    worker = worker_of(llm)
    target = worker.model_runner.model
    substitutes = worker.loading.substitutes
    generate(llm, PROMPTS, PARAMS)
    _settle(llm)
    before = _snapshot(target)

    draft = build_draft(target, substitutes)

    assert not _differences(before, _snapshot(target))
    substitute = worker.proposer._models._intermediate[0]
    served, substitute._module = substitute._module, draft
    drafted = draft_counts(llm)
    generate(llm, PROMPTS, PARAMS)
    assert (draft_counts(llm) - drafted).accepted > 0
    _settle(llm)
    assert not _differences(before, _snapshot(target))
    substitute._module = served
    del draft
    gc.collect()
    assert not _differences(before, _snapshot(target))


def test_the_draft_shares_all_but_the_substitutes(engines: Engines) -> None:
    llm = engines.get({**ROUGH, "resident_weights_gib": resident_gib(3)})
    worker = worker_of(llm)
    target = worker.model_runner.model
    draft = worker.proposer._models._intermediate[0]._module
    ours, theirs = dict(target.named_modules()), dict(draft.named_modules())
    replaced = {name for name, module in ours.items() if module in worker.loading.substitutes}
    assert ours.keys() == theirs.keys()
    assert len(replaced) == 3 * 4
    for name, module in ours.items():
        on_the_way = any(r == name or r.startswith(name + ".") or not name for r in replaced)
        if isinstance(theirs[name], FusedRMSNorm):  # another kernel over the same weight
            assert isinstance(module, RMSNorm) and theirs[name].weight is module.weight
            continue
        assert (theirs[name] is module) != on_the_way, name
        if on_the_way:
            assert type(theirs[name]) is type(module)
            # The target's fences and streamed forwards must not run for the draft.
            assert not theirs[name]._forward_pre_hooks
            assert not theirs[name]._forward_hooks
            assert "forward" not in vars(theirs[name])
    attention = [name for name, module in ours.items() if isinstance(module, Attention)]
    assert len(attention) == LAYERS
    assert all(theirs[name] is ours[name] for name in attention)
    shared = {id(p) for p in target.parameters()}
    assert all(id(p) in shared for p in draft.parameters())


def _checkpoint_weights(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The linears' weights in vLLM's names: q, k, v and gate, up are one."""
    tensors = load_file(MODEL / "model.safetensors")
    fused = {
        "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attn.o_proj": ("self_attn.o_proj",),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.down_proj": ("mlp.down_proj",),
    }
    return {
        f"{layer}.{name}": torch.cat(
            [tensors[f"model.layers.{layer}.{part}.weight"] for part in parts]
        ).to(dtype)
        for layer in range(LAYERS)
        for name, parts in fused.items()
    }


class Checked:
    """Compares every streamed weight with the checkpoint when its layer begins and ends."""

    def __init__(self, llm: LLM, dtype: torch.dtype) -> None:
        self.comparisons = 0
        self.wrong: list[str] = []
        self._expected = _checkpoint_weights(dtype)
        self._handles = []
        for layer in worker_of(llm).loading.offloader.streamed:
            check = self._checker(layer)
            # Ours run inside of the ring's: after it has waited, before it releases.
            self._handles.append(layer.module.register_forward_pre_hook(check))
            self._handles.append(layer.module.register_forward_hook(check, prepend=True))

    def _checker(self, layer: Any) -> Any:
        def check(*args: Any) -> None:
            for name, _, weight in layer.parameters():
                self.comparisons += 1
                if not torch.equal(weight, self._expected[f"{layer.index}.{name}"]):
                    self.wrong.append(f"{layer.index}.{name}")

        return check

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


@contextlib.contextmanager
def checked(llm: LLM, dtype: torch.dtype) -> Iterator[Checked]:
    checks = Checked(llm, dtype)
    try:
        yield checks
    finally:
        checks.remove()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("streamed", "ring"), [(5, 2), (5, 3), (6, 2), (6, 3)])
def test_streamed_weights_are_those_of_the_checkpoint(
    engines: Engines, streamed: int, ring: int, dtype: str
) -> None:
    itemsize = getattr(torch, dtype).itemsize
    resident = resident_gib(1) * itemsize / 4 if streamed < LAYERS else 0
    options = {**ROUGH, "resident_weights_gib": resident, "ring_layers": ring}
    llm = engines.get(options, dtype=dtype)
    plan = memory_plan(llm)
    assert (len(plan.streamed), plan.ring_layers) == (streamed, ring)
    passes = worker_of(llm).streaming_stats()["passes"]
    with checked(llm, getattr(torch, dtype)) as checks:
        generate(llm, PROMPTS[:2], [greedy(12)] * 2)
    passes = worker_of(llm).streaming_stats()["passes"] - passes
    assert passes >= 3
    assert checks.comparisons == passes * streamed * 4 * 2
    assert not checks.wrong


class Erratic:
    """A source that takes its time, and writes rubbish before it writes a block: whoever looks too
    early, or at a slot that was refilled too early, sees NaN."""

    def __init__(self, source: BlockSource) -> None:
        self._source = source
        self._random = random.Random(0)
        self.reads = 0

    def read(self, index: int, out: torch.Tensor, cancel: threading.Event | None = None) -> None:
        self.reads += 1
        out.fill_(0xFF)
        time.sleep(self._random.choice([0, 0, 0.001, 0.02]))
        self._source.read(index, out, cancel)
        out[out.numel() // 2 :].fill_(0xFF)
        time.sleep(self._random.choice([0, 0.001, 0.005]))
        self._source.read(index, out, cancel)

    def close(self) -> None:
        self._source.close()


@pytest.mark.parametrize("ring", [2, 3])
def test_half_written_weights_are_never_used(engines: Engines, ring: int) -> None:
    params = [greedy(24)] * len(PROMPTS)
    reference = engines.reference(PROMPTS, params)
    llm = engines.get({**ROUGH, "ring_layers": ring, "resident_weights_gib": resident_gib(1)})
    transfer = worker_of(llm).loading.ring.transfer
    _settle(llm)
    plain = transfer._source
    erratic = transfer._source = Erratic(plain)
    try:
        with checked(llm, torch.float32) as checks:
            answers = generate(llm, PROMPTS, params)
    finally:
        _settle(llm)
        transfer._source = plain
    assert erratic.reads >= 5 * 3
    assert not checks.wrong
    assert answers == reference


def test_a_pass_that_did_not_end_leaves_nothing_behind(engines: Engines) -> None:
    """The ring restarts from the first block, whatever an exception left in its slots."""
    params = [greedy(16)] * len(PROMPTS)
    reference = engines.reference(PROMPTS, params)
    llm = engines.get({**ROUGH, "ring_layers": 2, "resident_weights_gib": resident_gib(1)})
    ring = worker_of(llm).loading.ring
    for last in range(5):  # a pass that ends after layer `last`
        for block in range(last + 1):
            ring.wait(block)
            if block < last:
                ring.release(block)
        with checked(llm, torch.float32) as checks:
            answers = generate(llm, PROMPTS, params)
        assert not checks.wrong, f"after a pass that ended in layer {last}"
        assert answers == reference
