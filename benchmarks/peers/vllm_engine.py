# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""vLLM in the ways that it offers itself, and in ours: they differ in options only."""

import itertools
import os
import sys
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from vllm import LLM, SamplingParams, TokensPrompt
from vllm.platforms import current_platform

from benchmarks.peers.serving import Answer, CannotRunError, Emit, parser, serve

SUBSPEC = {"method": "subspec", "resident_weights_gib": 0}
NGRAM = {"method": "ngram", "num_speculative_tokens": 8, "prompt_lookup_max": 5}
WAYS: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
    "subspec": (SUBSPEC, {}),
    # The same engine with drafting switched off: what streaming alone gives.
    "streaming": (SUBSPEC, {}),
    "plain": (None, {}),
    "ngram": (NGRAM, {}),
    "uva": (None, {"offload_backend": "uva", "cpu_offload_gb": 1024}),
    "prefetch": (None, {"offload_backend": "prefetch", "offload_group_size": 1}),
}
CUDA_ONLY = ("uva", "prefetch")


def load(way: str, model: Path, stores: Path) -> Answer:
    if way in CUDA_ONLY and not current_platform.is_cuda():
        raise CannotRunError(
            f"vLLM's {way} offloading moves weights between host and device memory: it needs CUDA"
        )
    speculation, offloading = WAYS[way]
    if speculation is SUBSPEC:
        speculation = {**SUBSPEC, "store_dir": str(stores)}
    llm = LLM(
        str(model),
        speculative_config=speculation,
        enforce_eager=True,
        max_model_len=1024,
        max_num_seqs=1,
        kv_cache_memory_bytes=128 << 20,
        gpu_memory_utilization=1.0,  # the limit itself is the peers' own
        disable_log_stats=True,
        enable_prefix_caching=False,
        use_tqdm_on_load=False,
        **offloading,
    )
    if way == "streaming":
        llm.collective_rpc("set_speculation", args=(False,))
    engine, names = llm.llm_engine, map(str, itertools.count())

    def answer(prompt: list[int], tokens: int, emit: Emit) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        name = engine.add_request(next(names), TokensPrompt(prompt_token_ids=prompt), params)
        known, wanted = 0, True
        while wanted and engine.has_unfinished_requests():
            for output in engine.step():
                answered = list(output.outputs[0].token_ids)
                if len(answered) > known:
                    wanted = emit(answered[known:])
                    known = len(answered)
        engine.abort_request([name], internal=True)

    return answer


if __name__ == "__main__":
    options = parser("vllm_engine")
    options.add_argument("--way", choices=WAYS, required=True)
    told = options.parse_args()
    sys.exit(
        serve(lambda: load(told.way, told.model, told.folder), ["vllm", "torch", "transformers"])
    )
