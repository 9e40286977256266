# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Whether two answers differ by a near tie of float32 only.

vLLM computes the logits of one text a little differently from batch to batch, without speculation
too: how a prompt is cut into passes, and what the prefix cache holds of it, change the order of
sums. Measured with this repository's models: most logits are the same bits, others are up to 1.1e-5
apart. Of ten thousand answers one may have two best tokens that close together.
"""

from collections.abc import Sequence

import torch
from vllm import LLM, SamplingParams

from vllm_subspec.core.noise import SeedStream, gumbel

NEAR = 1e-4
"""Of logits over temperature, noise included. A wrong key or mask moves them by far more."""
SETTINGS = {"logprobs_mode": "processed_logprobs", "max_logprobs": -1}
"""Of an engine that `gap` may ask."""


def gap(
    llm: LLM, prompt: Sequence[int], params: SamplingParams, one: Sequence[int], two: Sequence[int]
) -> float:
    """How far apart the two tokens are, in what decides, at which two answers part.

    Infinite where one of them was not allowed, where an answer only ends early, or where ``llm``,
    which does not speculate, does not come to that place.
    """
    at = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), None)
    if at is None:
        return float("inf")
    params = params.clone()
    params.logprobs = -1
    asked = {"prompt_token_ids": list(prompt)}
    (said,) = llm.generate([asked], [params], use_tqdm=False)[0].outputs
    if list(said.token_ids[:at]) != list(one[:at]) or len(said.token_ids) <= at:
        return float("inf")
    found = said.logprobs[at]
    scores = torch.tensor([found[token].logprob for token in (one[at], two[at])])
    if params.temperature:
        generator = torch.Generator().manual_seed(params.seed)
        seed = SeedStream(generator).ahead(at + 1)[at]
        noise = gumbel(torch.tensor([seed]), max(found) + 1)[0]
        scores = scores + noise[[one[at], two[at]]]
    apart = float((scores[0] - scores[1]).abs())
    return apart if apart == apart else float("inf")  # minus infinity twice is not a number
