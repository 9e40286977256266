# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Ray: offline batches and a service of replicas, each as a user runs it."""

import contextlib
import functools
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from tests.engine import two_ranks
from tests.engine.helpers import (
    DEFAULTS,
    MODEL,
    ROUGH,
    Engines,
    encode,
    greedy,
)

if importlib.util.find_spec("ray") is None:
    pytest.skip('Ray is not installed: pip install -e ".[ray]"', allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
TOKENS = 32
TEXTS = [
    f"{start} {name}{rest}"
    for name in ("parse", "Stack", "count", "read", "Node", "merge", "find", "Table")
    for start, rest in (("def", "(text):\n    "), ("class", ":\n    def "), ("import", ", "))
]
ENGINE = {
    **{key: value for key, value in DEFAULTS.items() if key != "disable_log_stats"},
    "kv_cache_memory_bytes": 32 << 20,
}
WRONG = '{"method": "subspec", "bits": 5}'
# A loaded machine starts an engine in a minute or two.
PATIENCE = 400


@pytest.fixture(scope="module")
def expected(engines: Engines) -> dict[str, str]:
    """What the engine without speculation says, by prompt."""
    answers = engines.reference([encode(text) for text in TEXTS], [greedy(TOKENS)] * len(TEXTS))
    engines.close()
    return {text: answer.text for text, answer in zip(TEXTS, answers, strict=True)}


@dataclass
class Job:
    process: subprocess.Popen[bytes]
    log: Path

    def wait_until(self, what: str, happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while True:
            over = self.process.poll() is not None or time.monotonic() > deadline
            if happened():
                return
            if over:
                tail = self.log.read_text(errors="replace")[-4000:]
                pytest.fail(f"{what}: not so (exit status {self.process.poll()}):\n{tail}")
            time.sleep(0.05)


@dataclass
class Cluster:
    """A Ray of this machine's processors; the examples join it as they would a real one."""

    head: Job
    environment: dict[str, str]
    metrics: str
    """Where this node's metrics are."""

    @contextlib.contextmanager
    def running(self, example: str, *arguments: str) -> Iterator[Job]:
        log = self.head.log.with_name(f"{example}.log")
        with log.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, f"examples/{example}.py", *arguments],
                cwd=ROOT,
                env=self.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            yield Job(process, log)
        finally:
            process.kill()
            process.wait()

    def processes(self) -> list[psutil.Process]:
        return psutil.Process(self.head.process.pid).children(recursive=True)

    def tells(self, series: re.Pattern[str], times: int) -> bool:
        """Whether this node's metrics have it so often."""
        with urllib.request.urlopen(self.metrics, timeout=60) as reply:
            return len(series.findall(reply.read().decode())) == times

    def engines(self) -> int:
        """How many are running."""
        count = 0
        for process in self.processes():
            with contextlib.suppress(psutil.Error):  # it has just ended
                count += "EngineCore" in " ".join(process.cmdline())
        return count


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    # Shells ignore it for what runs in the background, and all children would.
    interrupted = signal.signal(signal.SIGINT, signal.default_int_handler)
    folder = tmp_path_factory.mktemp("ray")
    sockets = tempfile.mkdtemp(prefix="ray-")  # a socket's path has at most 107 characters
    port, metrics = free_port(), free_port()
    environment = {**os.environ, **two_ranks.ALONE, "RAY_ADDRESS": f"127.0.0.1:{port}"}
    environment["VLLM_LOG_STATS_INTERVAL"] = "1"
    # The front end and the engine are two processes, as they are for users.
    del environment["VLLM_ENABLE_V1_MULTIPROCESSING"]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    command += ["--node-ip-address", "127.0.0.1", "--port", str(port), "--temp-dir", sockets]
    command += ["--num-cpus", "8", "--object-store-memory", str(200 << 20)]
    command += ["--include-dashboard", "false", "--ray-client-server-port", str(free_port())]
    command += ["--metrics-export-port", str(metrics)]
    log = folder / "head.log"
    with log.open("wb") as output:
        head = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    cluster = Cluster(Job(head, log), environment, f"http://127.0.0.1:{metrics}/metrics")
    try:
        cluster.head.wait_until("Ray runs", lambda: "Ray runtime started" in log.read_text())
        yield cluster
    finally:
        started = cluster.processes()
        head.kill()  # on SIGTERM it waits for each of them in turn
        head.wait()
        for process in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(started)
        shutil.rmtree(sockets, ignore_errors=True)
        signal.signal(signal.SIGINT, interrupted)


def read_answers(folder: Path) -> list[dict[str, Any]]:
    from pyarrow import dataset

    rows: list[dict[str, Any]] = dataset.dataset(folder).to_table().to_pylist()
    return rows


def test_batch_goes_on_where_it_was_killed(
    cluster: Cluster, expected: dict[str, str], tmp_path: Path
) -> None:
    prompts, answers, store = tmp_path / "p.jsonl", tmp_path / "answers", tmp_path / "store"
    rows = [{"id": f"row-{i}", "prompt": TEXTS[i % len(TEXTS)]} for i in range(4 * len(TEXTS))]
    prompts.write_text("".join(json.dumps({**row, "more": 1}) + "\n" for row in rows))
    arguments = [str(prompts), str(answers), "--model", str(MODEL), "--batch-size", "2"]
    arguments += ["--speculative-config", json.dumps({**ROUGH, "store_dir": str(store)})]
    arguments += ["--engine", json.dumps(ENGINE)]
    sampling = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True}
    arguments += ["--sampling", json.dumps(sampling)]

    def kept() -> dict[Path, int]:
        """Confirmed files of ids, and when they were written."""
        done = [f for f in answers.glob("_done/*.parquet") if ".pending." not in f.name]
        return {file: file.stat().st_mtime_ns for file in done}

    with cluster.running("ray_batch", *arguments) as job:
        job.wait_until("something is answered", lambda: bool(kept()))
    early = kept()
    assert len(early) < len(rows) // 2, "it was not killed in the middle"
    with cluster.running("ray_batch", *arguments) as job:
        job.wait_until("it ends", lambda: job.process.poll() == 0)

    assert kept().items() >= early.items()
    found = sorted(read_answers(answers), key=lambda row: int(row["id"].removeprefix("row-")))
    assert found == [{**row, "answer": expected[row["prompt"]]} for row in rows]
    assert len([*store.glob("*.store")]) == 1


@pytest.mark.skipif(
    "SUBSPEC_LONG_TESTS" not in os.environ,
    reason="two replicas take three minutes to start on two cores: set SUBSPEC_LONG_TESTS=1",
)
def test_serve(cluster: Cluster, expected: dict[str, str], tmp_path: Path) -> None:
    port = free_port()
    speculative = {**ROUGH, "store_dir": str(tmp_path)}
    arguments = [f"model={MODEL}", "name=pystd", "replicas=2", f"port={port}"]
    arguments += [f"speculative_config={json.dumps(speculative)}", f"engine={json.dumps(ENGINE)}"]
    client = openai.OpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=60, max_retries=0
    )

    def complete(text: str) -> str:
        reply = client.completions.create(
            model="pystd",
            prompt=text,
            max_tokens=TOKENS,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        return str(reply.choices[0].text)

    with cluster.running("ray_serve", *arguments) as job:
        job.wait_until("all replicas run", lambda: "is ready at" in job.log.read_text())
        assert cluster.engines() == 2
        with ThreadPoolExecutor(8) as pool:
            answers = dict(zip(TEXTS, pool.map(complete, TEXTS), strict=True))
        # Ray's names, one series for each replica's worker; Ray passes them on with a delay.
        for name in ("rounds_total", "accepted_depth_count", "planned_memory_bytes"):
            series = re.compile(rf"^ray_vllm_subspec_{name}{{.*\brank=.* [1-9]", re.MULTILINE)
            told = functools.partial(cluster.tells, series, 2)
            job.wait_until(f"both replicas tell {name}", told)
        job.process.send_signal(signal.SIGINT)
        assert job.process.wait(PATIENCE) == 0
    assert answers == expected
    assert len([*tmp_path.glob("*.store")]) == 1
    cluster.head.wait_until("no engine is left", lambda: cluster.engines() == 0)


@pytest.mark.parametrize(
    ("example", "arguments", "says"),
    [
        ("ray_batch", ["no/such/file", "answers", "--model", "m"], "no/such/file"),
        ("ray_batch", [__file__, "answers", "--model", "m", "--engine", "[]"], "no JSON object"),
        ("ray_batch", [__file__, "answers", "--model", "m", "--batch-size", "0"], "below 1"),
        (
            "ray_batch",
            [__file__, "answers", "--model", "m", "--speculative-config", WRONG],
            '"bits"',
        ),
        ("ray_serve", ["model=m", f"speculative_config={WRONG}"], '"bits"'),
        ("ray_serve", ["modell=m"], "modell"),
        ("ray_serve", ["model=m", "engine={"], "engine"),
        ("ray_serve", ["model=m", "port=0"], "port"),
    ],
)
def test_bad_arguments(
    example: str, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main = importlib.import_module(f"examples.{example}").main
    try:
        assert main(arguments) == 2
    except SystemExit as left:
        assert left.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(example)
    assert says in last
