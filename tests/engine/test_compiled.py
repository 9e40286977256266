# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Answers with a compiled target, and in bf16, where a target may also be quantized."""

import logging
from pathlib import Path

import pytest
from vllm import LLM, SamplingParams
from vllm.compilation.counter import compilation_counter

from tests.engine.helpers import (
    MODEL,
    ROUGH,
    Engines,
    assert_chains_were_tried,
    assert_trees_were_tried,
    draft_counts,
    generate,
    greedy,
    resident_gib,
    source_prompts,
    worker_of,
)
from tests.engine.hierarchies import SMALL, WAYS
from vllm_subspec.cli.main import main
from vllm_subspec.weights.kernels import mixed_precision

LAST_PLACE = {"bfloat16": 2**-4, "float16": 2**-7}
"""Of a number from 8 to 16, as this model's best logits are."""
PROMPTS = source_prompts(16, shortest=1, longest=200)
PARAMS = [greedy(32)] * 16


def test_compiled_target(
    engines: Engines,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Streamed and resident layers in one compiled graph: it must wait for the ring, and the draft
    must not run it. The ring has fewer slots than there are streamed layers, so that a slot read
    too early or too late is another layer's. The second start finds the first one's code, which
    vLLM cannot load on a CPU, and says that it compiles again."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    reference = engines.reference(PROMPTS, PARAMS, enforce_eager=False)
    monkeypatch.setattr(logging.getLogger("vllm_subspec"), "propagate", True)
    caplog.set_level(logging.INFO, "vllm_subspec")
    options = {**ROUGH, "resident_weights_gib": resident_gib(3), "ring_layers": 2}
    for start in ("cold", "warm"):
        before = compilation_counter.clone()
        caplog.clear()
        llm = engines.get(options, enforce_eager=False)
        assert compilation_counter.num_aot_artifacts_loaded == before.num_aot_artifacts_loaded
        assert compilation_counter.num_aot_artifacts_saved > before.num_aot_artifacts_saved
        assert "On a CPU each start compiles the model again" in caplog.text
        answers = generate(llm, PROMPTS, PARAMS)
        engines_passes = worker_of(llm).streaming_stats()["passes"]
        counts = draft_counts(llm)
        engines.close()
        assert answers == reference, start
        assert engines_passes > 5
        assert_trees_were_tried(counts, 50)


@pytest.mark.parametrize(
    ("target", "dtype"),
    [
        ("streamed", "bfloat16"),
        ("streamed", "float16"),
        ("resident", "bfloat16"),
        ("resident", "float16"),
        ("W4A16", "bfloat16"),
    ],
)
def test_16_bits_differ_only_at_near_ties(
    engines: Engines, tmp_path: Path, target: str, dtype: str
) -> None:
    """Each first difference is between two tokens that 16 bits themselves cannot order.

    bf16 keeps 8 bits of a sum, float16 11, so a token's log-probability depends on the order of the
    additions: on the kernel, and on how many tokens a pass computes together. How much is measured
    without any draft: the answers of the plain engine are scored as prompts, by itself and by the
    streaming engine with drafting switched off. The largest move of a likely token is the noise.
    Where speculation emits another token, that one and the best may both have moved, so it is at
    most twice the noise behind.

    Some kernels compute a row alike in every batch: ours, W4A16's, oneDNN's with AMX. But trees
    attend in float32, where vLLM's attention rounds: that moves a logit by its last place.
    """
    prompts = source_prompts(32, shortest=10, longest=150)
    params = [greedy(48, logprobs=5) for _ in prompts]
    model, options = MODEL, ROUGH
    if target == "resident":
        options = {**ROUGH, "resident_weights_gib": "auto", "substitute_layers": "all"}
    if target == "W4A16":
        if (reason := mixed_precision.no_w4a16()) is not None:
            pytest.skip(reason)
        model, small = tmp_path / "w4", tmp_path / "small-w4"
        for source, copy in ((MODEL, model), (SMALL, small)):
            assert main(["quantize", str(source), str(copy), "--bits", "4"]) == 0
        options = {**WAYS["small-eagle"], "intermediate": str(small)}
    plain = engines.get(None, model, dtype=dtype)
    baseline = _scored(plain, prompts, params)
    answers = [tokens for tokens, _ in baseline]
    whole = [p + list(t) for p, t in zip(prompts, answers, strict=True)]
    scores = [_prompt_scores(plain, whole)]
    llm = engines.get(options, model, dtype=dtype)
    llm.collective_rpc("set_speculation", args=(False,))
    scores.append(_prompt_scores(llm, whole))
    llm.collective_rpc("set_speculation", args=(True,))
    noise = max(
        abs(step[token] - again[i][len(prompts[i]) + j][token])
        for again in scores
        for i, (tokens, steps) in enumerate(baseline)
        for j, (token, step) in enumerate(zip(tokens, steps, strict=True))
    )
    assert noise < 0.5
    if target != "W4A16":
        noise = max(noise, LAST_PLACE[dtype])

    drafted = generate(llm, prompts, [greedy(48)] * len(prompts))

    counts = draft_counts(llm)
    if target == "W4A16":
        assert_chains_were_tried(counts, 100)
    else:
        assert_trees_were_tried(counts, 100)
    same = 0
    for i, answer in enumerate(drafted):
        if answer.tokens == answers[i]:
            same += 1
            continue
        at = [a == b for a, b in zip(answer.tokens, answers[i], strict=True)].index(False)
        likely = baseline[i][1][at]
        gap = likely[answers[i][at]] - likely.get(answer.tokens[at], float("-inf"))
        assert gap <= 2 * noise, f"request {i}, token {at}: {gap} behind, noise {noise}"
    assert same > len(prompts) // 2


def _scored(
    llm: LLM, prompts: list[list[int]], params: list[SamplingParams]
) -> list[tuple[tuple[int, ...], list[dict[int, float]]]]:
    """Each answer's tokens, and at each the log-probabilities of the likeliest ones."""
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    return [
        (
            tuple(o.outputs[0].token_ids),
            [{t: p.logprob for t, p in step.items()} for step in o.outputs[0].logprobs],
        )
        for o in llm.generate(asked, params, use_tqdm=False)
    ]


def _prompt_scores(llm: LLM, prompts: list[list[int]]) -> list[list[dict[int, float]]]:
    """Log-probabilities of every prompt token, by position."""
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.generate(asked, greedy(1, prompt_logprobs=5), use_tqdm=False)
    return [
        [{t: p.logprob for t, p in (step or {}).items()} for step in o.prompt_logprobs]
        for o in outputs
    ]
