# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""The target's own sampler, asked once for every root and every node of a pass.

Each is sampled as if its path had been emitted, by all sampling parameters: penalties and bad
words count the path's tokens, `min_tokens` counts its length, and the seed is that of the token's
place in the text. So the sample at a node is the very token that would be emitted after it without
speculation.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.logits_processor import (
    BatchUpdate,
    LogitBiasLogitsProcessor,
    LogitsProcessor,
    LogitsProcessors,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
from vllm.v1.sample.sampler import Sampler

from vllm_subspec.core.acceptance import Walks
from vllm_subspec.core.noise import gumbel
from vllm_subspec.engine.verification import Verification

# Rows of logits whose noise is made at a time: float64 of a whole vocabulary is large.
_ROWS = 64


@dataclass
class NodeMetadata(SamplingMetadata):
    """Sampling parameters by root and node instead of by request."""

    seeds: Tensor | None = None
    """[m] int64 of each row's noise (`core.noise`); None if every row is greedy."""
    min_p: Tensor | None = None
    """[m, 1] share of the likeliest token's probability below which a token is never sampled; None
    if no request has any."""


def by_node(
    metadata: SamplingMetadata,
    verification: Verification,
    requests: Sequence[Any],
    seeds: Tensor | None,
    config: VllmConfig,
    device: torch.device,
) -> NodeMetadata:
    """``metadata``, which is by request, for the roots and nodes of a pass: m rows, of each request
    its root's and then its nodes'.

    Args:
        requests: vLLM's state of each request of the batch.
        seeds: [m] of each row; None if every request is greedy.
    """
    sizes = verification.sizes
    owners = np.repeat(np.arange(sizes.size), sizes + 1)
    index = torch.as_tensor(owners, device=device)
    given = {field.name: getattr(metadata, field.name) for field in fields(metadata)}

    def expanded(name: str) -> Tensor | None:
        values = given[name]
        return None if values is None else values[index]

    tensors = (
        "temperature",
        "top_p",
        "top_k",
        "prompt_token_ids",
        "frequency_penalties",
        "presence_penalties",
        "repetition_penalties",
        "allowed_token_ids_mask",
    )
    given.update({name: expanded(name) for name in tensors})
    texts: list[list[int]] = []
    needs_min_tokens = any(_misses_min_tokens(request) for request in requests)
    if metadata.output_token_ids or needs_min_tokens:
        texts = _texts(verification, requests)
    words, wanted = metadata.bad_words_token_ids, metadata.logprob_token_ids
    given.update(
        generators={},
        output_token_ids=texts,
        bad_words_token_ids={i: words[owner] for i, owner in enumerate(owners) if owner in words},
        logprob_token_ids=wanted
        and {i: wanted[owner] for i, owner in enumerate(owners) if owner in wanted},
        spec_token_ids=None,
        logitsprocs=_processors(requests, owners, texts, config, device),
        seeds=seeds,
        min_p=_min_p(requests, index),
    )
    return NodeMetadata(**given)


def _texts(verification: Verification, requests: Sequence[Any]) -> list[list[int]]:
    """[m] the output tokens that each row's sample follows."""
    texts = []
    for draft, request in zip(verification.drafts, requests, strict=True):
        output = list(request.output_token_ids)
        texts.append(output)
        mask = draft.tree.ancestor_mask()
        texts += [output + draft.tree.tokens[path].tolist() for path in mask]
    return texts


def _misses_min_tokens(request: Any) -> bool:
    return len(request.output_token_ids) < request.sampling_params.min_tokens


def _processors(
    requests: Sequence[Any],
    owners: np.ndarray,
    texts: list[list[int]],
    config: VllmConfig,
    device: torch.device,
) -> LogitsProcessors:
    """vLLM's processors of ``min_tokens`` and ``logit_bias``, in its order, as of a batch that has
    a request for every row."""
    wanted: list[tuple[type[LogitsProcessor], list[bool]]] = [
        (MinTokensLogitsProcessor, [_misses_min_tokens(request) for request in requests]),
        (LogitBiasLogitsProcessor, [bool(r.sampling_params.logit_bias) for r in requests]),
    ]
    processors = []
    for kind, asks in wanted:
        if any(asks):
            added = [
                (row, requests[owner].sampling_params, None, texts[row] if texts else [])
                for row, owner in enumerate(owners)
                if asks[owner]
            ]
            processor = kind(config, device, False)
            processor.update_state(BatchUpdate(owners.size, removed=[], added=added, moved=[]))
            processors.append(processor)
    return LogitsProcessors(processors)


def _min_p(requests: Sequence[Any], owners: Tensor) -> Tensor | None:
    shares = [request.sampling_params.min_p for request in requests]
    if not any(shares):
        return None
    return torch.tensor(shares, device=owners.device)[owners].unsqueeze(1)


class NodeSampler(Sampler):
    """vLLM's sampler, but the noise of a row follows from its seed."""

    def sample(
        self,
        logits: Tensor,
        sampling_metadata: NodeMetadata,
        logprobs_mode_override: Any = None,
    ) -> tuple[Tensor, Tensor | None]:
        seeds = sampling_metadata.seeds
        if seeds is None:
            return super().sample(logits, sampling_metadata, logprobs_mode_override)
        assert sampling_metadata.temperature is not None
        greedy = self.greedy_sample(logits)
        logits = self.apply_temperature(
            logits, sampling_metadata.temperature, sampling_metadata.all_random
        )
        if (min_p := sampling_metadata.min_p) is not None:
            probabilities = torch.softmax(logits, dim=-1)
            least = probabilities.amax(dim=-1, keepdim=True) * min_p
            logits = logits.masked_fill(probabilities < least, -torch.inf)
        logits = apply_top_k_top_p(logits, sampling_metadata.top_k, sampling_metadata.top_p)
        sampled = torch.where(sampling_metadata.temperature < 1e-5, greedy, _draw(logits, seeds))
        mode = logprobs_mode_override or self.logprobs_mode
        if mode == "processed_logits":
            return sampled, logits
        if mode == "processed_logprobs":
            return sampled, self.compute_logprobs(logits)
        return sampled, None


def _draw(logits: Tensor, seeds: Tensor) -> Tensor:
    """[m] tokens of ``logits`` [m, vocab] (float32), drawn with ``seeds`` [m]."""
    if logits.is_cpu:
        drawn: Tensor = torch.ops._C.fused_gumbel_argmax(logits, seeds)
        return drawn
    parts = zip(logits.split(_ROWS), seeds.split(_ROWS), strict=True)
    return torch.cat([(some + gumbel(own, some.shape[1])).argmax(dim=-1) for some, own in parts])


def emitted(output: SamplerOutput, verification: Verification, walks: Walks) -> SamplerOutput:
    """The samples on the accepted paths, as vLLM's rejection sampler returns them.

    Returns:
        sampled_token_ids: [requests, longest path + 1] int32, -1 behind a request's last one;
            logprobs_tensors, if any: of the same places in rows [requests * (longest + 1)].
    """
    sizes, counts = verification.sizes, walks.counts
    first = np.cumsum(sizes + 1) - sizes - 1
    places = np.full((sizes.size, int(counts.max(initial=0)) + 1), -1)
    places[:, 0] = first
    rows = np.repeat(np.arange(sizes.size), counts)
    steps = np.arange(rows.size) - np.repeat(np.cumsum(counts) - counts, counts)
    places[rows, steps + 1] = first[rows] + 1 + walks.nodes
    samples = output.sampled_token_ids.flatten()
    index = torch.as_tensor(places, device=samples.device)
    tokens = torch.where(index >= 0, samples[index.clamp(min=0)], -1)
    logprobs = output.logprobs_tensors
    if logprobs is not None:
        kept = index.clamp(min=0).flatten()
        logprobs = LogprobsTensors(*(part[kept] if part.numel() else part for part in logprobs[:3]))
    return SamplerOutput(sampled_token_ids=tokens, logprobs_tensors=logprobs)
