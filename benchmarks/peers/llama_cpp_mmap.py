# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""llama.cpp with a mapped file: the kernel reads pages as they are touched, and drops old ones."""

import os
import sys
from pathlib import Path

from llama_cpp import Llama

from benchmarks.peers.gguf_export import export
from benchmarks.peers.serving import Answer, Emit, parser, serve


def load(model: Path, folder: Path) -> Answer:
    file = folder / f"{model.name}.gguf"
    if not file.exists():
        export(model, file)
    cores = len(os.sched_getaffinity(0))
    llama = Llama(
        str(file), use_mmap=True, n_ctx=1024, n_threads=cores, n_threads_batch=cores, verbose=False
    )

    def answer(prompt: list[int], tokens: int, emit: Emit) -> None:
        llama.reset()
        for token in llama.generate(prompt, temp=0.0):
            if not emit([token]):
                break

    return answer


if __name__ == "__main__":
    told = parser("llama_cpp_mmap").parse_args()
    sys.exit(serve(lambda: load(told.model, told.folder), ["llama-cpp-python", "gguf"]))
