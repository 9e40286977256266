# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""llama.cpp with a mapped file: the kernel reads pages as they are touched, and drops old ones.

python -m benchmarks.peers.llama_cpp_mmap --model DIR --folder DIR
"""

import argparse
import os
import sys
from pathlib import Path

from llama_cpp import Llama

from benchmarks.peers.gguf_export import export
from benchmarks.peers.serving import Answer, Emit, serve


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


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.peers.llama_cpp_mmap")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="for the model as a GGUF file")
    arguments = parser.parse_args()
    return serve(lambda: load(arguments.model, arguments.folder), ["llama-cpp-python", "gguf"])


if __name__ == "__main__":
    sys.exit(main())
