# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Goodput of a server under load, with speculation and without; writes ``results/goodput.json``.

    python -m benchmarks.goodput    # about an hour

One server streams all decoder layers from disk. Under each load both ways take turns on it, as its
speculation is switched between runs: first with so many requests at any time (``--concurrency``),
then with Poisson arrivals (``--rates``). An answer is good if its first token and its time per
token are within targets that are the same for both ways. What is not given is taken from runs
without speculation: the targets from answers that have the server for themselves, the rates from
the most requests/s that a concurrency reached.
"""

import argparse
import json
import shlex
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import BUILD, ROOT, checkpoint
from benchmarks.goodput.loads import Client, ClientError, Closed, Open
from benchmarks.goodput.server import VLLM, ServerError, serving
from benchmarks.goodput.summary import ratios, row, smallest, stops_paying
from vllm_subspec.bench import environment
from vllm_subspec.bench.prompts import load as load_prompts

FOLDER = BUILD / "goodput"
SHARES = (0.25, 0.5, 1.0, 2.0)
"""The rates, by the most requests/s without speculation."""
TTFT, TPOT = 8.0, 2.0
"""The targets, by the time per token of an answer alone without speculation."""
WAYS = (False, True)
WARM_UP, WARM_UP_REQUESTS = Closed(4), 8
ALONE, ALONE_REQUESTS = Closed(1), 2


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.goodput", description=__doc__.split("\n")[0])
    parser.add_argument("--gib", type=float, default=0.5, help="size of the checkpoint")
    parser.add_argument("--model", type=Path, help="a checkpoint, instead of one of --gib")
    parser.add_argument("--config", default="{}", help="more of --speculative-config, as JSON")
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--kv-gib", type=float, default=1.0, help="memory of the KV cache")
    parser.add_argument("--prompts", default="python", help="a bundled set, or a file")
    parser.add_argument("--output-len", type=int, default=32, help="tokens of every answer")
    parser.add_argument("--concurrency", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--rates", type=float, nargs="*", help="requests/s")
    parser.add_argument("--ttft", type=float, help="target of the first token, in milliseconds")
    parser.add_argument("--tpot", type=float, help="target of each further one, in milliseconds")
    parser.add_argument("--seconds", type=float, default=60, help="of a run without speculation")
    parser.add_argument("--num-prompts", type=int, default=512, help="of a run at most")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/goodput.json")
    return parser.parse_args(arguments)


def server_command(model: Path, told: argparse.Namespace) -> list[str]:
    config = {"method": "subspec", "resident_weights_gib": 0, "store_dir": str(BUILD / "stores")}
    config |= json.loads(told.config)
    return [
        *(VLLM, "serve", str(model), "--speculative-config", json.dumps(config)),
        *("--dtype", "bfloat16", "--enforce-eager", "--max-model-len", "512", "--seed", "0"),
        *("--max-num-seqs", str(told.max_num_seqs), "--no-enable-prefix-caching"),
        *("--kv-cache-memory-bytes", str(int(told.kv_gib * 2**30))),
    ]


class Measurement:
    """All loads on one server, each written to the result as soon as it is measured.

    Args:
        result: what the file holds besides what is measured.
    """

    def __init__(self, client: Client, told: argparse.Namespace, result: dict[str, Any]) -> None:
        self.client, self.told = client, told
        self.targets: dict[str, float] = {}
        self.answer_seconds = self.capacity = 0.0  # without speculation
        self.closed: list[dict[str, Any]] = []
        self.open: list[dict[str, Any]] = []
        self._result = result
        self._began = time.perf_counter()

    def prepare(self) -> None:
        """Warm both ways up, and see what an answer takes that has the server for itself."""
        for speculation in WAYS:
            self.client.server.set_speculation(speculation)
            self.client.run(WARM_UP, WARM_UP_REQUESTS, 0, {})
        self.client.server.set_speculation(False)
        alone = self.client.run(ALONE, ALONE_REQUESTS, 0, {})
        self._learn([alone])
        token = alone["median_tpot_ms"]
        self.targets = {
            "ttft": self.told.ttft or float(f"{TTFT * token:.2g}"),
            "tpot": self.told.tpot or float(f"{TPOT * token:.2g}"),
        }
        print(f"targets, in milliseconds: {self.targets}", file=sys.stderr)

    def measure(self) -> None:
        told = self.told
        for concurrency in sorted(told.concurrency):
            load = Closed(concurrency)
            rows = self._both(load, load.requests(told.seconds, self.answer_seconds))
            self._learn([run for run in rows if not run["speculation"]])
            self._keep(self.closed, {"load": str(load), "concurrency": concurrency}, rows)
        rates = told.rates
        if rates is None:
            rates = [float(f"{share * self.capacity:.2g}") for share in SHARES]
        for rate in sorted(rates):
            arrivals = Open(rate)
            rows = self._both(arrivals, arrivals.requests(told.seconds, self.capacity))
            self._keep(self.open, {"load": str(arrivals), "rate": rate}, rows)

    def _both(self, load: Closed | Open, requests: int) -> list[dict[str, Any]]:
        requests = min(requests, self.told.num_prompts)
        rows: list[dict[str, Any]] = []
        texts: list[str] = []
        for repeat in range(self.told.repeats):
            for speculation in WAYS:
                self.client.server.set_speculation(speculation)
                measured = self.client.run(load, requests, repeat, self.targets)
                texts = texts or measured["generated_texts"]
                rows.append(row(measured, speculation, repeat, texts))
                show(str(load), rows[-1])
        return rows

    def _learn(self, plain: Sequence[dict[str, Any]]) -> None:
        """From runs without speculation, how long the next ones will take."""
        self.answer_seconds = statistics.median(run["median_e2el_ms"] for run in plain) / 1000
        reached = statistics.median(run["request_throughput"] for run in plain)
        self.capacity = max(self.capacity, reached)

    def _keep(
        self, loads: list[dict[str, Any]], load: dict[str, Any], rows: list[dict[str, Any]]
    ) -> None:
        loads.append({**load, "ratios": ratios(rows), "runs": rows})
        result = {
            **self._result,
            "targets_ms": self.targets,
            "run_seconds": time.perf_counter() - self._began,
            "capacity_without_speculation": self.capacity,
            "speculation_stops_paying_at_concurrency": stops_paying(self.closed),
            "smallest_ratio": {
                name: smallest([*self.closed, *self.open], name)
                for name in ("output_throughput", "request_goodput")
            },
            "closed_loop": self.closed,
            "open_loop": self.open,
        }
        environment.write(self.told.out, result)


def show(load: str, run: dict[str, Any]) -> None:
    print(
        f"{load:20} {'subspec' if run['speculation'] else 'plain':8}"
        f"{run['completed']:5} answers in {run['duration']:4.0f} s"
        f"{run['output_throughput']:8.2f} tokens/s{run['request_goodput']:8.3f} good/s"
        f"   ttft {run['median_ttft_ms']:6.0f} tpot {run['median_tpot_ms']:5.0f} ms"
        f"   {run['failed']} failed, {run['answers_that_differ']} differ",
        file=sys.stderr,
    )


def main() -> int:
    told = options()
    model = (told.model or checkpoint(told.gib)).absolute()
    FOLDER.mkdir(parents=True, exist_ok=True)
    prompts = [prompt.text for prompt in load_prompts(told.prompts)]
    command = server_command(model, told)
    result = {
        "environment": environment.describe(),
        "server": shlex.join(["vllm", *command[1:]]).replace(f"{ROOT}/", ""),
        "model": model.name,
        "model_bytes": sum(file.stat().st_size for file in model.glob("*.safetensors")),
        "prompts": len(prompts),
        "tokens": told.output_len,
        "repeats": told.repeats,
    }
    # `timeout` and the like shall end the server too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with serving(command, FOLDER / "server.log") as server:
            client = Client(server, model, prompts, told.output_len, FOLDER)
            measurement = Measurement(client, told, result)
            measurement.prepare()
            measurement.measure()
    except (ServerError, ClientError) as reason:
        print(f"benchmarks.goodput: {reason}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("benchmarks.goodput: interrupted, the server is ended", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
