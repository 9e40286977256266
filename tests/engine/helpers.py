# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Engines, prompts and counters that the engine tests share."""

import copy
import gc
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from msgspec.structs import asdict
from vllm import LLM, ModelRegistry, RequestOutput, SamplingParams
from vllm import _custom_ops as ops
from vllm.tokenizers import get_tokenizer

from vllm_subspec.core.draft_tokens import DraftTokens
from vllm_subspec.core.plan import MemoryPlan
from vllm_subspec.engine import compat

MODELS = Path(__file__).resolve().parents[2] / "models"
MODEL = MODELS / "pystd-6m"
LAYERS = 6

Settings = Mapping[str, Any]

DEFAULTS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 512,
    "block_size": 32,
    "kv_cache_memory_bytes": 128 << 20,
    "max_num_seqs": 64,
    "disable_log_stats": False,
    "seed": 0,
}

# Rounded to 2 bits this model's drafts are often wrong: acceptance and rejection both happen.
# Every layer streams from disk. Nothing is pruned: what is drafted does not depend on the clock.
ROUGH: dict[str, Any] = {
    "method": "subspec",
    "bits": 2,
    "quantizer": "rtn",
    "branching": 3,
    "depth": 6,
    "num_speculative_tokens": 16,
    "pruning": "none",
    "resident_weights_gib": 0,
}
CHAIN: dict[str, Any] = {**ROUGH, "branching": 1, "depth": 8, "num_speculative_tokens": 8}


def resident_gib(layers: int) -> float:
    """A ``resident_weights_gib`` that keeps exactly this many of the model's float32 layers."""
    config = json.loads((MODEL / "config.json").read_text())
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    attention = (2 * heads + 2 * config["num_key_value_heads"]) * config["head_dim"] * hidden
    layer = 4 * (attention + 3 * hidden * config["intermediate_size"])
    return (layers + 0.5) * layer / (1 << 30)


def import_model_class(architecture: str) -> None:
    """vLLM inspects a class that it knows by name only in a new process: up to 20 seconds."""
    known = ModelRegistry.models[architecture].load_model_cls()
    ModelRegistry.register_model(architecture, known)


class Answer(NamedTuple):
    """What a request got."""

    tokens: tuple[int, ...]
    text: str
    finish_reason: str | None
    stop_reason: int | str | None

    @classmethod
    def of(cls, output: RequestOutput) -> "Answer":
        (only,) = output.outputs
        return cls(tuple(only.token_ids), only.text, only.finish_reason, only.stop_reason)


@dataclass
class DraftCounts:
    """What became of the verified drafts. Most nodes of a tree are rejected in any case, as
    siblings exclude each other; ``wrong`` and ``moved`` show what can go wrong in a tree."""

    drafts: int = 0
    drafted: int = 0
    accepted: int = 0
    trees: int = 0
    """Drafts that were no chains."""
    wrong: int = 0
    """Drafts that went on where the target's text left them."""
    moved: int = 0
    """Drafts whose accepted path was no prefix of them, so that its K/V had to move."""
    largest: int = 0
    """Nodes of the largest draft."""

    @property
    def rejected(self) -> int:
        return self.drafted - self.accepted

    def add(self, draft: DraftTokens, path: Sequence[int]) -> None:
        """Counts a draft of which the nodes ``path`` were accepted."""
        if not len(draft):
            return
        self.drafts += 1
        self.drafted += len(draft)
        self.accepted += len(path)
        self.trees += not draft.tree.is_chain
        self.wrong += (path[-1] if len(path) else -1) in draft.tree.parents
        self.moved += list(path) != list(range(len(path)))
        self.largest = max(self.largest, len(draft))

    def __sub__(self, earlier: "DraftCounts") -> "DraftCounts":
        both = vars(self).keys() - {"largest"}
        less = {name: getattr(self, name) - getattr(earlier, name) for name in both}
        return DraftCounts(**less, largest=self.largest)


class Engines:
    """Makes engines, one living at a time, and remembers it as long as the same is asked for.

    Args:
        store_dir: where every engine keeps its weight stores, unless it is told otherwise.
    """

    def __init__(self, store_dir: Path) -> None:
        self.store_dir = store_dir
        self._key = ""
        self._llm: LLM | None = None
        self._references: dict[str, list[Answer]] = {}
        for prefix in ("", "Eagle", "Eagle3"):
            import_model_class(f"{prefix}LlamaForCausalLM")
        _settle()

    def get(self, speculative: Settings | None, model: Path = MODEL, **settings: Any) -> LLM:
        """An engine with ``settings`` over `DEFAULTS`; the one before is shut down.

        Args:
            speculative: the ``speculative_config``; None for no speculation.
        """
        if speculative is not None and speculative["method"] == "subspec":
            speculative = {"store_dir": str(self.store_dir), **speculative}
        given = {**DEFAULTS, **settings, "model": str(model), "speculative_config": speculative}
        key = json.dumps(given, sort_keys=True)
        if self._llm is None or key != self._key:
            self.close()
            if speculative is None:
                compat.apply()  # or vLLM would fail where ours must not
            self._llm = LLM(**given)
            self._key = key
            if speculative is not None:
                self._llm.collective_rpc(count_drafts)
        return self._llm

    def reference(
        self,
        prompts: Sequence[list[int]],
        params: Sequence[SamplingParams],
        **settings: Any,
    ) -> list[Answer]:
        """What an engine without speculation answers; computed once per session.

        Call it before `get`: it may have to replace the living engine.
        """
        # The parameters' own repr leaves some of them out.
        asked = [[p, repr(asdict(q))] for p, q in zip(prompts, params, strict=True)]
        key = json.dumps([settings, asked], sort_keys=True)
        if key not in self._references:
            self._references[key] = generate(self.get(None, **settings), prompts, params)
        return self._references[key]

    def close(self) -> None:
        """Shut the living engine down; its memory and threads are free afterwards."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None
            compat.undo()
            _settle()


def _settle() -> None:
    """While an engine starts vLLM collects garbage many times. It need not go through all modules
    each time; an engine that is shut down unfreezes them."""
    gc.collect()
    gc.freeze()


def generate(
    llm: LLM, prompts: Sequence[list[int]], params: Sequence[SamplingParams]
) -> list[Answer]:
    """One continuous batch; ``prompts`` are token ids."""
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    return [Answer.of(o) for o in llm.generate(asked, list(params), use_tqdm=False)]


@dataclass
class Batch:
    """Requests whose engine is stepped by hand.

    Args:
        llm: an idle engine.
        prompts: token ids; request ``i`` is ``prompts[i]``.
    """

    llm: LLM
    prompts: Sequence[list[int]]
    params: Sequence[SamplingParams]
    answers: dict[int, Answer] = field(default_factory=dict)
    """Finished or aborted requests."""

    def __post_init__(self) -> None:
        engine = self.llm.llm_engine
        self._ids = [
            engine.add_request(str(i), {"prompt_token_ids": prompt}, params)
            for i, (prompt, params) in enumerate(zip(self.prompts, self.params, strict=True))
        ]

    def steps(self) -> Iterator[int]:
        """Runs the engine until it is idle; yields the number of each step after it."""
        step = 0
        while self.llm.llm_engine.has_unfinished_requests():
            for output in self.llm.llm_engine.step():
                if output.finished:
                    self.answers[int(output.request_id)] = Answer.of(output)
            yield step
            step += 1

    def abort(self, request: int) -> None:
        self.llm.llm_engine.abort_request([str(request)])

    def id(self, request: int) -> str:
        """The engine's own name of it."""
        return self._ids[request]

    def running(self) -> dict[int, Any]:
        """The scheduler's `Request` of each running request that has emitted something."""
        requests = {r.request_id: r for r in scheduler_of(self.llm).running}
        return {
            i: requests[name]
            for i, name in enumerate(self._ids)
            if name in requests and requests[name].num_output_tokens
        }


def greedy(max_tokens: int, **settings: Any) -> SamplingParams:
    """Greedy sampling that does not stop at the end of text, unless ``settings`` say so."""
    return SamplingParams(temperature=0, max_tokens=max_tokens, **{"ignore_eos": True, **settings})


def memory_plan(llm: LLM) -> MemoryPlan:
    plan: MemoryPlan = worker_of(llm).loading.plan
    return plan


def encode(text: str) -> list[int]:
    ids: list[int] = get_tokenizer(str(MODEL)).encode(text)
    return ids


def source_prompts(count: int, shortest: int, longest: int) -> list[list[int]]:
    """Token ids of pieces of Python's own standard library, their lengths spread evenly.

    Modules that hardly change between Python versions; the tests compare engines with each
    other, not with recorded answers.
    """
    import argparse
    import ast
    import calendar
    import csv
    import difflib
    import textwrap

    modules: list[ModuleType] = [argparse, ast, calendar, csv, difflib, textwrap]
    sources = [encode(inspect.getsource(module)) for module in modules]
    prompts = []
    for i in range(count):
        source = sources[i % len(sources)]
        length = shortest + (longest - shortest) * i // max(count - 1, 1)
        start = (997 * i) % (len(source) - longest)
        prompts.append(source[start : start + length])
    return prompts


def metric(llm: LLM, name: str) -> int:
    """Sum of the counters ``name`` (with or without ``vllm:``) since the engine's start."""
    name = "vllm:" + name.removeprefix("vllm:")
    found = [m.value for m in llm.get_metrics() if m.name == name]
    if not found:
        raise KeyError(f"the engine has no counter {name}")
    return int(sum(found))


def count_drafts(worker: Any) -> None:
    """Makes a worker count what it verifies (a `collective_rpc`)."""
    runner = worker.model_runner
    sample, runner.draft_counts = runner._sample, DraftCounts()

    def counted(*args: Any, **kwargs: Any) -> Any:
        output = sample(*args, **kwargs)
        done = runner.verification
        for draft, path in zip(done.drafts, done.walks.paths, strict=True):
            runner.draft_counts.add(draft, path)
        return output

    runner._sample = counted


def draft_counts(llm: LLM) -> DraftCounts:
    """Since the engine's start, and the same as the engine reports."""
    found: DraftCounts = copy.copy(llm.collective_rpc(_counts_of)[0])
    assert found.drafts == metric(llm, "spec_decode_num_drafts")
    assert found.drafted == metric(llm, "spec_decode_num_draft_tokens")
    assert found.accepted == metric(llm, "spec_decode_num_accepted_tokens")
    return found


def _counts_of(worker: Any) -> DraftCounts:
    counts: DraftCounts = worker.model_runner.draft_counts
    return counts


def assert_trees_were_tried(counts: DraftCounts, least: int) -> None:
    """Whether trees were verified, right and wrong ones (which are few), and accepted off their
    first path."""
    assert min(counts.accepted, counts.trees, counts.moved, 10 * counts.wrong) >= least, counts


def assert_chains_were_tried(counts: DraftCounts, least: int) -> None:
    assert not counts.trees
    assert min(counts.accepted, counts.wrong) >= least, counts


def worker_of(llm: LLM) -> Any:
    """The engine's only worker (`SubspecCPUWorker`, or vLLM's own without speculation)."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker


def scheduler_of(llm: LLM) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


def kv_pages(
    llm: LLM, request_id: str, start: int, end: int, prefix: str = "model."
) -> torch.Tensor:
    """K and V of a running request at positions ``start`` to ``end``,
    ``[layers, 2, kv_heads, end - start, head_size]``.

    Args:
        prefix: of the names of the model's attention layers; the target's, unless given.
    """
    runner = worker_of(llm).model_runner
    row = runner.input_batch.req_id_to_index[request_id]
    table = runner.input_batch.block_table[0]
    blocks = torch.as_tensor(table.get_numpy_array()[row, : -(-end // table.block_size)])
    names = [name for group in runner.attn_groups[0] for name in group.layer_names]
    context = runner.vllm_config.compilation_config.static_forward_context
    layers = []
    for name in sorted(names):
        if not name.startswith(prefix):
            continue
        cache = context[name].kv_cache  # [blocks, kv_heads, block_size, 2 * head_size]
        size = cache.shape[-1] // 2
        order = _page_order(table.block_size, size, context[name].isa)
        heads = cache[blocks].flatten(2).unflatten(2, (2, -1))
        pages = torch.stack([heads[:, :, side, order[side]] for side in range(2)])
        pages = pages.unflatten(3, (table.block_size, size)).transpose(1, 2).flatten(2, 3)
        layers.append(pages[:, :, start:end].clone())
    return torch.stack(layers)


def _page_order(block_size: int, head_size: int, isa: str) -> torch.Tensor:
    """``[2, block_size * head_size]``: where in its half of a page the attention kernel keeps
    element ``(position, channel)`` of K and of V. Found out by writing numbered elements."""
    count = block_size * head_size
    numbered = torch.arange(count, dtype=torch.float32).view(block_size, 1, head_size)
    page = torch.zeros(1, 1, 2 * block_size, head_size)
    key, value = page.chunk(2, dim=2)
    slots = torch.arange(block_size)
    ops.cpu_attn_reshape_and_cache(numbered, numbered, key, value, slots, isa)
    return page.view(2, count).argsort(dim=1)
