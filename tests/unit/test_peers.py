# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""The peers' protocol, their memory limit and what a run comes to."""

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from benchmarks.peers import memory
from benchmarks.peers.environments import LLAMA_CPP, TRANSFORMERS, Environment
from benchmarks.peers.gguf_export import gguf_name, interleave_halves, read_bfloat16
from benchmarks.peers.memory import (
    V1,
    V2,
    MemoryGroup,
    NoMemoryLimitError,
    own_group,
    parent_for_groups,
)
from benchmarks.peers.process import PeerProcess
from benchmarks.peers.serving import CannotRunError, Clock
from benchmarks.peers.summary import first_difference, speed, summarize

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models" / "pystd-6m"
PROMPT = [5, 17, 33, 80, 100, 7, 9]

V1_GROUPS = "9:name=systemd:/\n4:memory:/jobs/a\n3:cpu,cpuacct:/\n0::/\n"
V1_MOUNTS = (
    "cgroup /sys/fs/cgroup/cpu cgroup rw,cpu,cpuacct 0 0\n"
    "cgroup /sys/fs/cgroup/memory cgroup rw,relatime,memory 0 0\n"
    "cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n"
)
V2_GROUPS = "0::/user.slice/session-1.scope\n"
V2_MOUNTS = "proc /proc proc rw 0 0\ncgroup2 /sys/fs/cgroup cgroup2 rw,nsdelegate 0 0\n"


def test_a_group_of_version_1_is_found_beside_version_2():
    assert own_group(V1_GROUPS, V1_MOUNTS) == (
        V1,
        Path("/sys/fs/cgroup/memory"),
        Path("/sys/fs/cgroup/memory/jobs/a"),
    )


def test_a_group_of_version_2():
    mount = Path("/sys/fs/cgroup")
    assert own_group(V2_GROUPS, V2_MOUNTS) == (V2, mount, mount / "user.slice/session-1.scope")


def test_a_root_group_is_its_mount():
    assert own_group("0::/\n", V2_MOUNTS)[2] == Path("/sys/fs/cgroup")


def test_no_memory_group_is_one_sentence():
    with pytest.raises(NoMemoryLimitError, match="no control group"):
        own_group("3:cpu,cpuacct:/\n", V1_MOUNTS)


def test_version_2_needs_a_parent_that_passes_the_controller_on(tmp_path: Path):
    own = tmp_path / "a" / "b"
    own.mkdir(parents=True)
    (own / "cgroup.subtree_control").write_text("")
    (tmp_path / "a" / "cgroup.subtree_control").write_text("cpu memory pids\n")
    assert parent_for_groups(V2, tmp_path, own) == tmp_path / "a"
    (tmp_path / "a" / "cgroup.subtree_control").write_text("cpu pids\n")
    with pytest.raises(NoMemoryLimitError, match="run as root"):
        parent_for_groups(V2, tmp_path, own)


@pytest.fixture
def group():
    try:
        group = MemoryGroup("test", 64 << 20)
    except NoMemoryLimitError as reason:
        pytest.skip(str(reason))
    yield group
    group.close()


def run(group: MemoryGroup, source: str, *arguments: str) -> int:
    command = [sys.executable, "-c", textwrap.dedent(source), *arguments]
    return subprocess.run(group.command(command), check=False).returncode


def test_a_process_beyond_the_limit_is_killed(group: MemoryGroup):
    assert run(group, "bytearray(b'x' * (16 << 20))") == 0
    assert group.kills == 0
    assert run(group, "bytearray(b'x' * (256 << 20))") == -9
    assert group.kills == 1


def test_the_page_cache_counts_and_gives_way(group: MemoryGroup, tmp_path: Path):
    """A file larger than the limit can be read, but does not stay in memory."""
    file = tmp_path / "weights"
    with file.open("wb") as out:
        out.write(os.urandom(128 << 20))
        os.fsync(out.fileno())
    memory.forget([tmp_path])
    assert run(group, "import sys; open(sys.argv[1], 'rb').read(1 << 20)", str(file)) == 0
    once = group.peak
    source = """
        import sys
        with open(sys.argv[1], "rb", buffering=0) as file:
            while file.read(1 << 20):
                pass
    """
    assert run(group, source, str(file)) == 0
    assert once < group.peak <= 64 << 20
    assert group.peak > 48 << 20
    assert group.kills == 0


PEER = """
    import sys, time
    from benchmarks.peers.serving import CannotRunError, serve

    def load():
        print("a library's own words")
        if sys.argv[1] == "refuses":
            raise CannotRunError("needs another machine")
        if sys.argv[1] == "breaks":
            raise RuntimeError("broken")
        if sys.argv[1] == "grows":
            bytearray(b"x" * (1 << 30))

        def answer(prompt, tokens, emit):
            for token in range(tokens):
                time.sleep(0.01)
                if not emit([prompt[0] + token]):
                    return

        return answer

    sys.exit(serve(load, ["pytest"]))
"""


@pytest.fixture
def start(tmp_path: Path):
    started = []

    def start(how: str) -> PeerProcess:
        command = [sys.executable, "-c", textwrap.dedent(PEER), how]
        try:
            peer = PeerProcess("t", command, 256 << 20, os.environ, ROOT, tmp_path / "log")
        except NoMemoryLimitError as reason:
            pytest.skip(str(reason))
        started.append(peer)
        return peer

    yield start
    for peer in started:
        peer.close()
        assert not peer.group.folder.exists()


def test_a_peer_answers_prompt_by_prompt(start):
    peer = start("works")
    assert peer.ready["packages"] == {"pytest": pytest.__version__}
    for first in (5, 70):
        answer = peer.ask([first], 3, 60)
        assert answer["tokens"] == [first, first + 1, first + 2]
        assert answer["steps"] == [1, 1, 1]
        assert answer["decode_seconds"] >= 0.02
        assert 1 << 20 < answer["peak_rss_bytes"] < 64 << 20  # Not what this process has.


def test_a_slow_answer_is_cut_off(start):
    tokens = start("works").ask([0], 1000, 0.2)["tokens"]
    assert 2 <= len(tokens) <= 22  # one at once, and then one each hundredth of a second
    assert tokens == list(range(len(tokens)))


def test_a_waiting_peer_is_stopped(start):
    peer = start("works")
    peer.ask([1], 1, 60)
    (pid,) = (peer.group.folder / "cgroup.procs").read_text().split()
    deadline = time.monotonic() + 60
    while (state := Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]) != "T":
        assert time.monotonic() < deadline, f"the peer is in state {state}, not stopped"


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("refuses", "^needs another machine$"),
        ("breaks", "^ended with status 1 while loading: RuntimeError: broken$"),
        ("grows", "^killed at the memory limit of 0.25 GiB while loading$"),
    ],
)
def test_why_a_peer_could_not_run(start, how: str, why: str):
    with pytest.raises(CannotRunError, match=why):
        start(how)


@pytest.fixture(scope="module")
def greedy() -> list[int]:
    """What the model answers where nothing is offloaded."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto")
    text = model.generate(torch.tensor([PROMPT]), do_sample=False, max_new_tokens=4)
    return text[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize(
    ("environment", "adapter", "options"),
    [
        (TRANSFORMERS, "transformers_disk", []),
        (TRANSFORMERS, "transformers_disk", ["--fill"]),
        (TRANSFORMERS, "airllm_layers", []),
        (LLAMA_CPP, "llama_cpp_mmap", []),
    ],
)
def test_an_adapter_answers_as_the_model(
    environment: Environment, adapter: str, options: list[str], greedy, tmp_path: Path
):
    try:
        environment.require()
    except CannotRunError as reason:
        pytest.skip(str(reason))
    limit = 1 << 30
    told = ["--model", str(MODEL), "--folder", str(tmp_path), "--limit", str(limit), *options]
    command = [str(environment.python), "-m", f"benchmarks.peers.{adapter}", *told]
    try:
        peer = PeerProcess(adapter, command, limit, os.environ, ROOT, tmp_path / "log")
    except NoMemoryLimitError as reason:
        pytest.skip(str(reason))
    try:
        assert peer.ask(PROMPT, 4, 60)["tokens"] == greedy
    finally:
        peer.close()


def test_names_of_tensors_in_a_gguf_file():
    assert gguf_name("model.layers.12.self_attn.o_proj.weight") == "blk.12.attn_output.weight"
    assert gguf_name("model.embed_tokens.weight") == "token_embd.weight"
    assert gguf_name("lm_head.weight") == "output.weight"


def test_halves_of_heads_become_neighbours():
    rows = np.arange(12, dtype=np.uint16).reshape(12, 1)
    assert interleave_halves(rows, heads=2).ravel().tolist() == [
        *(0, 3, 1, 4, 2, 5),
        *(6, 9, 7, 10, 8, 11),
    ]


def test_a_checkpoint_is_read_bit_by_bit():
    tensors: dict[str, torch.Tensor] = {}
    for file in MODEL.glob("*.safetensors"):
        tensors |= load_file(file)
    read = dict(read_bfloat16(MODEL))
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert np.array_equal(read[name], tensor.view(torch.uint16).numpy())


def test_a_clock_stops_at_the_wanted_number():
    clock = Clock(tokens=4, seconds=60)
    assert clock.emit([1])
    assert clock.emit([2, 3])
    assert not clock.emit([4])
    result = json.loads(json.dumps(clock.result()))
    assert (result["tokens"], result["steps"]) == ([1, 2, 3, 4], [1, 2, 1])
    assert result["first_token_seconds"] >= 0


def answer(tokens: list[int], steps: list[int], seconds: float) -> dict[str, object]:
    return {
        "tokens": tokens,
        "steps": steps,
        "first_token_seconds": 1.0,
        "decode_seconds": seconds,
    }


def test_speed_is_that_of_the_whole_answer():
    assert speed(answer([1, 2, 3, 4, 5], [2, 3], 1.5)) == 2.0
    assert speed(answer([1], [1], 0.0)) is None


def test_first_difference():
    assert first_difference([1, 2, 3], [1, 2, 4]) == 2
    assert first_difference([1, 2], [1, 2, 3]) is None
    assert first_difference([9], [1, 2, 3]) == 0


def test_summary_compares_speed_and_answers():
    rows = summarize(
        {
            "ours": [answer([1, 2, 3, 4, 5], [1, 4], 1.0), answer([1, 7, 8], [1, 2], 1.0)],
            "plain": [answer([1, 2, 3], [1, 1, 1], 2.0), answer([1, 7, 9], [1, 1, 1], 2.0)],
            "silent": [answer([1], [1], 0.0), answer([1], [1], 0.0)],
        },
        ours="ours",
        reference="plain",
    )
    assert rows["ours"]["tokens_per_second"] == pytest.approx(2 / (2 / 5 + 2 / 3))
    assert rows["plain"]["ours_over_this"] == pytest.approx(2 / (2 / 5 + 2 / 3))
    assert rows["ours"]["first_difference"] == [None, 2]
    assert rows["ours"]["compared_tokens"] == [3, 3]
    assert rows["silent"]["tokens_per_second"] is None
    assert "ours_over_this" not in rows["silent"]
