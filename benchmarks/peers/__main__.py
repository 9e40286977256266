# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Measure the peers beside SubSpec, all under one memory limit; writes ``results/peers.json``.

    python -m benchmarks.peers.environments    # once
    python -m benchmarks.peers                 # about ten minutes, as root or in a delegated group

All peers are loaded, warm up on a prompt for the same time, and then take turns prompt by prompt.
The default limit is less than the checkpoint alone, and little more than SubSpec needs to run it.
Before each answer the model's files are dropped from the page cache; a page that some process maps
stays there, so peers that map the checkpoint have a copy of it each. A way that needs seconds per
token is cut off after ``--seconds``: its speed needs no more, as every token costs it the same.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.checkpoints import BUILD, PROMPTS, checkpoint
from benchmarks.peers import memory
from benchmarks.peers.environments import FOLDER, LLAMA_CPP, ROOT, TRANSFORMERS, Environment
from benchmarks.peers.process import PeerProcess
from benchmarks.peers.serving import CannotRunError
from benchmarks.peers.summary import speed, summarize
from scripts.cpu_env import cpu_environment, find_tcmalloc
from vllm_subspec.bench import environment

WARM_UP_TOKENS, WARM_UP_SECONDS = 128, 30.0  # whoever learns while serving has learnt by then


@dataclass(frozen=True)
class Peer:
    """An adapter, how it is called, and the environment it needs (None: ours)."""

    what: str
    arguments: tuple[str, ...]
    environment: Environment | None = None
    maps_checkpoint: bool = False
    """While it answers."""


def _vllm(way: str, what: str) -> Peer:
    told = ("--way", way, "--folder", str(BUILD / "stores"))
    return Peer(what, ("benchmarks.peers.vllm_engine", *told))


def _files(adapter: str, what: str, environment: Environment, *options: str) -> Peer:
    told = ("--folder", str(FOLDER / "files" / adapter), *options)
    maps_checkpoint = adapter == "transformers_disk"
    return Peer(what, (f"benchmarks.peers.{adapter}", *told), environment, maps_checkpoint)


PEERS = {
    "subspec": _vllm("subspec", "SubSpec: all layers streamed from disk, lookups"),
    "streaming": _vllm("streaming", "the same engine, without speculation"),
    "vllm": _vllm("plain", "vLLM, all weights in memory"),
    "vllm_ngram": _vllm("ngram", "vLLM's ngram, all weights in memory"),
    "vllm_uva": _vllm("uva", "vLLM's UVA offloading"),
    "vllm_prefetch": _vllm("prefetch", "vLLM's prefetch offloading"),
    "transformers": _files(
        "transformers_disk", "transformers + accelerate, all layers on disk", TRANSFORMERS
    ),
    "transformers_filled": _files(
        "transformers_disk",
        "transformers + accelerate, the layers on disk that do not fit",
        TRANSFORMERS,
        "--fill",
    ),
    "airllm": _files("airllm_layers", "AirLLM", TRANSFORMERS),
    "llama_cpp": _files("llama_cpp_mmap", "llama.cpp, mapped file", LLAMA_CPP),
}


def start(name: str, model: Path, limit: int) -> PeerProcess:
    """The peer, loaded; CannotRunError if it is not installed or does not come up."""
    peer = PEERS[name]
    if peer.environment is not None:
        peer.environment.require()
    python = peer.environment.python if peer.environment else Path(sys.executable)
    if peer.maps_checkpoint:
        model = _own_copy(model, FOLDER / "files" / name)
    cores = sorted(os.sched_getaffinity(0))
    variables = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    variables |= {"OMP_NUM_THREADS": str(len(cores)), "HF_HUB_OFFLINE": "1"}
    openmp = Path(sys.prefix) / "lib" / "libiomp5.so"
    if peer.environment is None and openmp.exists():
        variables |= cpu_environment(openmp, find_tcmalloc(), cores, 1, variables)
    command = [str(python), "-m", *peer.arguments, "--model", str(model), "--limit", str(limit)]
    return PeerProcess(name, command, limit, variables, ROOT, FOLDER / f"{name}.log")


def _own_copy(model: Path, folder: Path) -> Path:
    """``model`` in ``folder``, written once."""
    copy, partial = folder / model.name, folder / "partial"
    if not copy.exists():
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(model, partial)
        os.sync()  # pages that are not on disk yet cannot be forgotten
        memory.forget([partial])
        partial.rename(copy)
    return copy


def forget_weights(model: Path) -> None:
    memory.forget([model, BUILD / "stores", FOLDER / "files"])


def measure(
    names: Sequence[str], model: Path, prompts: Sequence[list[int]], limit: int, arguments: Any
) -> dict[str, Any]:
    """Start ``names``, warm them up and let them take turns."""
    running: dict[str, PeerProcess] = {}
    reasons: dict[str, str] = {}
    answers: dict[str, list[dict[str, Any]]] = {}

    def give_up(name: str, reason: CannotRunError) -> None:
        reasons[name] = str(reason)
        print(f"{name:20} cannot run: {reason}", file=sys.stderr)
        if process := running.pop(name, None):
            process.close()

    def close_all() -> None:
        for process in running.values():
            process.close()

    with contextlib.ExitStack() as stack:
        stack.callback(close_all)
        for name in names:
            forget_weights(model)
            try:
                running[name] = start(name, model, limit)
                running[name].ask(prompts[0], WARM_UP_TOKENS, WARM_UP_SECONDS)
                loaded = running[name].ready["load_seconds"]
                print(f"{name:20} loaded in {loaded:.0f} s", file=sys.stderr)
            except CannotRunError as reason:
                give_up(name, reason)
        for number, prompt in enumerate(prompts):
            for name, process in list(running.items()):
                forget_weights(model)
                try:
                    answer = process.ask(prompt, arguments.tokens, arguments.seconds)
                except CannotRunError as reason:
                    give_up(name, reason)
                    continue
                answers.setdefault(name, []).append(answer)
                print(
                    f"{name:20} prompt {number}: {len(answer['tokens'])} tokens, "
                    f"{speed(answer) or 0:.2f} tokens/s",
                    file=sys.stderr,
                )
        details = {
            name: {
                "load_seconds": process.ready["load_seconds"],
                "packages": process.ready["packages"],
                "peak_group_bytes": process.group.peak,
            }
            for name, process in running.items()
        }
    complete = {name: mine for name, mine in answers.items() if name not in reasons}
    rows = summarize(complete, ours="subspec", reference="streaming")
    return {
        "peers": {
            name: {"what": PEERS[name].what, **row, **details[name]} for name, row in rows.items()
        },
        "could_not_run": {
            name: {"what": PEERS[name].what, "why": why} for name, why in reasons.items()
        },
        "answers": {name: [_row(answer) for answer in mine] for name, mine in complete.items()},
    }


def _row(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer with its tokens on one line of the file."""
    shown = {"tokens": " ".join(map(str, answer["tokens"])), "steps": len(answer["steps"])}
    return {**answer, **shown, "tokens_per_second": speed(answer)}


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.peers", description=__doc__.split("\n")[0])
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), metavar="NAME")
    parser.add_argument("--gib", type=float, default=1.6, help="size of the checkpoint")
    parser.add_argument("--model", type=Path, help="a checkpoint, instead of one of --gib")
    parser.add_argument("--memory-gib", type=float, default=1.6, help="limit of each peer")
    parser.add_argument("--prompts", type=Path, help='JSON lines, each {"prompt": [token ids]}')
    parser.add_argument("--count", type=int, default=3, help="use the first so many prompts")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=15, help="of decoding, per answer at most")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "peers.json")
    arguments = parser.parse_args()
    model = (arguments.model or checkpoint(arguments.gib)).resolve()
    if arguments.prompts:
        lines = arguments.prompts.read_text().splitlines()
        prompts = [json.loads(line)["prompt"] for line in lines if line.strip()]
    else:
        tokenizer = AutoTokenizer.from_pretrained(model)
        prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    limit = int(arguments.memory_gib * 2**30)
    FOLDER.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    # `timeout` and the like shall end the peers too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        measured = measure(arguments.peers, model, prompts[: arguments.count], limit, arguments)
    except memory.NoMemoryLimitError as reason:
        print(f"benchmarks.peers: {reason}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("benchmarks.peers: interrupted, the peers are ended", file=sys.stderr)
        return 130
    result = {
        "environment": environment.describe(),
        "model": model.name,
        "model_bytes": sum(file.stat().st_size for file in model.glob("*.safetensors")),
        "memory_limit_bytes": limit,
        "prompts": len(prompts[: arguments.count]),
        "tokens": arguments.tokens,
        "seconds_per_answer": arguments.seconds,
        "run_seconds": time.perf_counter() - began,
        **measured,
    }
    environment.write(arguments.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
