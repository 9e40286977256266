# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Engines without our methods, in a process of their own.

    VLLM_PLUGINS=... python -m tests.engine.unused_engines

prints a line of JSON: what each answered, or how it failed.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}

from vllm import LLM, SamplingParams

MODEL = Path(__file__).resolve().parents[2] / "models" / "pystd-6m"
ENGINE: dict[str, Any] = {
    "model": str(MODEL),
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "block_size": 32,
    "max_num_batched_tokens": 96,
    "kv_cache_memory_bytes": 32 << 20,
    "seed": 0,
}
NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}
SHORT = ["def parse(text):\n    ", "import os\nimport os\nimport ", "class Stack:\n"]
LONG = ["x = [1, 2, 3]\n" * 20]  # more than a step computes
NEW = ["y = [1, 2, 3]\n" * 20]  # and nothing of it is cached


def asked(**params: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 16, "ignore_eos": True, **params})


SEEDED = asked(temperature=0.8, seed=7)
Wave = tuple[list[str], SamplingParams]
WAVES: dict[str, Wave] = {
    "greedy": (SHORT + LONG, asked()),
    "sampled": (SHORT, asked(temperature=1.0, top_p=0.9)),
    "seeded": (SHORT, SEEDED),
    "min_p": (SHORT, asked(temperature=1.0, min_p=0.2)),
    "biased": (SHORT, asked(logit_bias={5: 3.0})),
}
TOP_K = asked(temperature=1.0, top_k=5, seed=3)
# The last of an engine: vLLM's own cannot serve them on a CPU, and ends.
PLAIN = {**WAVES, "top k": (SHORT, TOP_K), "seeded and chunked": (NEW, SEEDED)}
LOOKUPS = {**WAVES, "top k": (SHORT, TOP_K)}


def answers(speculative: dict[str, Any] | None, waves: dict[str, Wave]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    llm = LLM(**ENGINE, speculative_config=speculative)
    for name, (prompts, params) in waves.items():
        try:
            outputs = llm.generate(prompts, params, use_tqdm=False)
            found[name] = [output.outputs[0].text for output in outputs]
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    llm.llm_engine.engine_core.shutdown()
    return found


def wrong() -> str:
    try:
        LLM(**ENGINE, speculative_config={"method": "ngram", "no_such_key": 1})
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "made"


if __name__ == "__main__":
    found = {"plain": answers(None, PLAIN), "wrong": wrong(), "ngram": answers(NGRAM, LOOKUPS)}
    registered = "vllm_subspec.plugin" in sys.modules
    print(json.dumps({"registered": registered, "answers": found}))
