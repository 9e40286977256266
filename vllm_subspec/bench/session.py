# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""One real engine in this process, generating with speculation switched on or off at will.

Both ways share the engine, its streamed weights and its store, so that a ratio between them is a
ratio on one machine in one run.
"""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# The engine's steps are timed from outside, so it must not run in a process of its own.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from vllm import LLM, SamplingParams, TokensPrompt

from vllm_subspec.config import METHODS


@dataclass
class Generated:
    """One answer. ``steps`` is the number of tokens that each engine step emitted."""

    prompt: str
    tokens: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    text: str = ""
    margins: list[float] = field(default_factory=list)
    """Log probability of the best token minus that of the second, with ``logprobs=2``."""
    prefill_seconds: float = 0.0
    """Until the first step's token is known."""
    decode_seconds: float = 0.0
    """From then to the last token. The first draft, which the first step ends with, is in it."""

    @property
    def decode_tokens(self) -> int:
        return len(self.tokens) - self.steps[0]

    @property
    def tau(self) -> float:
        """Tokens per round after the first step."""
        return self.decode_tokens / max(1, len(self.steps) - 1)

    @property
    def tokens_per_second(self) -> float:
        return self.decode_tokens / self.decode_seconds


class Session:
    """An engine, with method ``subspec`` unless told otherwise.

    Args:
        model: folder of the checkpoint, or its name on the hub.
        options: the ``--speculative-config``; None for no speculation.
        engine: further arguments of `vllm.LLM`.
    """

    def __init__(self, model: Path | str, options: dict[str, Any] | None, **engine: Any) -> None:
        settings: dict[str, Any] = {
            "enforce_eager": True,
            "max_model_len": 2048,
            "max_num_seqs": 8,
            "kv_cache_memory_bytes": 256 << 20,
            "disable_log_stats": False,
            "seed": 0,
            "use_tqdm_on_load": False,
        }
        settings |= engine
        if options is not None:
            options = {"method": "subspec", **options}
        self.method = None if options is None else options["method"]
        self.llm = LLM(str(model), speculative_config=options, **settings)
        self.settings = settings
        self._engine = self.llm.llm_engine
        self._count = 0

    def call(self, method: str, *args: Any) -> Any:
        """A method of the (only) worker."""
        return self.llm.collective_rpc(method, args=args)[0]

    def encode(self, prompt: str) -> list[int]:
        """Token ids; of a chat model those of a conversation that the prompt opens."""
        tokenizer = self.llm.get_tokenizer()
        if getattr(tokenizer, "chat_template", None) is None:
            return list(tokenizer.encode(prompt))
        turns = [{"role": "user", "content": prompt}]
        told = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        return list(tokenizer.encode(told, add_special_tokens=False))

    def generate(
        self,
        prompts: list[str],
        max_tokens: int,
        speculate: bool | None = None,
        **sampling: Any,
    ) -> list[Generated]:
        """All prompts in one batch, greedy unless ``sampling`` says otherwise.

        Args:
            speculate: switches it on or off, with a method of ours.
        """
        if speculate is not None:
            self.call("set_speculation", speculate)
        self.llm.reset_prefix_cache()
        params = SamplingParams(
            **{"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True, **sampling}
        )
        answers: dict[str, Generated] = {}
        for prompt in prompts:
            self._count += 1
            ids = self.encode(prompt)
            internal = self._engine.add_request(
                str(self._count), TokensPrompt(prompt_token_ids=ids), params
            )
            answers[str(self._count)] = Generated(prompt)
            assert internal.startswith(str(self._count))
        began = time.perf_counter()
        first: dict[str, float] = {}
        while self._engine.has_unfinished_requests():
            outputs = self._engine.step()
            now = time.perf_counter()
            for output in outputs:
                answer = answers[output.request_id]
                tokens = list(output.outputs[0].token_ids)
                if len(tokens) > len(answer.tokens):
                    answer.steps.append(len(tokens) - len(answer.tokens))
                    answer.tokens = tokens
                first.setdefault(output.request_id, now)
                answer.prefill_seconds = first[output.request_id] - began
                answer.decode_seconds = now - first[output.request_id]
                answer.text = output.outputs[0].text
                answer.margins = [
                    best - second
                    for best, second in (
                        sorted((entry.logprob for entry in position.values()), reverse=True)[:2]
                        for position in output.outputs[0].logprobs or []
                    )
                ]
        first_draft = self._first_draft_seconds(began)
        for answer in answers.values():
            answer.prefill_seconds -= first_draft
            answer.decode_seconds += first_draft
        return list(answers.values())

    def _first_draft_seconds(self, since: float) -> float:
        """What drafting took at the end of the first step of answers begun at ``since``."""
        if self.method not in METHODS:
            return 0.0
        records = self.call("round_log", since)["records"]
        return records[0]["draft_ended"] - records[0]["draft_began"] if records else 0.0


def harmonic(speeds: list[float]) -> float:
    """Mean of rates over equal amounts of work."""
    return len(speeds) / sum(1 / s for s in speeds)
