# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Figures of kernels: measured once, kept, and never believed of another machine."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.platforms import current_platform

from vllm_subspec.weights import plain_linear, resident_linear
from vllm_subspec.weights.kernels import measured
from vllm_subspec.weights.kernels.measured import TOKENS, Candidate, seconds
from vllm_subspec.weights.plain_linear import ONEDNN, OWN, TORCH

current_platform.import_kernels()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for what is kept."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    return tmp_path


class Counted:
    """Kernels of known cost, and how often they were made."""

    def __init__(self) -> None:
        self.made = 0

    def candidate(self, turns: int) -> Candidate:
        """One that multiplies ``turns`` times."""
        weight = torch.ones(measured.SHAPE[1], 64)

        def product(x: torch.Tensor) -> torch.Tensor:
            for _ in range(turns):
                out = x @ weight
            return out

        def make() -> measured.Product:
            self.made += 1
            return product

        return Candidate(make, 1 << 30)


def kept(folder: Path) -> Path:
    (file,) = folder.glob("subspec/kernels/measured-*.json")
    return file


def test_the_faster_of_two_is_told_and_kept(cache: Path) -> None:
    count = Counted()
    both = {"slow": count.candidate(30), "fast": count.candidate(1)}
    found = seconds("something, float32", both)
    assert {name: list(times) for name, times in found.items()} == dict.fromkeys(both, [*TOKENS])
    assert measured.typical(found["slow"]) > 4 * measured.typical(found["fast"])
    made = count.made
    assert seconds("something, float32", both) == found
    assert count.made == made
    seconds("something else, float32", both)
    assert count.made == 2 * made
    assert len(json.loads(kept(cache).read_text())["figures"]) == 2


def test_another_set_of_candidates_is_measured_again(cache: Path) -> None:
    count = Counted()
    seconds("some, float32", {"one": count.candidate(1)})
    assert count.made
    before = count.made
    found = seconds("some, float32", {"one": count.candidate(1), "two": count.candidate(1)})
    assert count.made > before
    assert found.keys() == {"one", "two"}


def test_one_that_cannot_compute_is_left_out_and_that_is_kept(cache: Path) -> None:
    count = Counted()

    def unable() -> measured.Product:
        count.made += 1
        raise RuntimeError("could not create a primitive descriptor")

    both = {"able": count.candidate(1), "unable": Candidate(unable, 1 << 30)}
    assert seconds("some, float32", both).keys() == {"able"}
    made = count.made
    assert seconds("some, float32", both).keys() == {"able"}
    assert count.made == made


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace(str(measured.machine()["cpu"]), "another CPU"),
        lambda text: text.replace('"128"', '"129"'),
        lambda text: json.dumps(_with(json.loads(text), "none")),
        lambda text: json.dumps(_with(json.loads(text), -1.0)),
        lambda text: json.dumps(_with(json.loads(text), float("inf"))),
    ],
    ids=["half", "empty", "a list", "another CPU", "tokens", "a text", "negative", "infinite"],
)
def test_what_is_damaged_or_of_another_machine_is_measured_again(
    damage: Callable[[str], str], cache: Path
) -> None:
    count = Counted()
    one = {"one": count.candidate(1)}
    found = seconds("some, float32", one)
    text = kept(cache).read_text()
    kept(cache).write_text(damage(text))
    before = count.made
    again = seconds("some, float32", one)
    assert count.made > before
    assert again["one"].keys() == found["one"].keys()
    before = count.made
    seconds("some, float32", one)
    assert count.made == before  # and sound again


def _with(kept: dict[str, Any], value: object) -> dict[str, Any]:
    kept["figures"]["some, float32"]["seconds"]["one"]["8"] = value
    return kept


def test_what_was_interrupted_leaves_nothing(cache: Path) -> None:
    def interrupted() -> measured.Product:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        seconds("some, float32", {"one": Candidate(interrupted, 1 << 30)})
    assert not list(cache.glob("subspec/kernels/*.json"))
    assert not list(cache.glob("subspec/kernels/*.tmp"))
    assert seconds("some, float32", {"one": Counted().candidate(1)})


def test_a_folder_that_cannot_be_written_costs_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "file"))
    lines: list[str] = []
    monkeypatch.setattr(measured.logger, "warning", lambda text, *args: lines.append(text % args))
    assert seconds("some, float32", {"one": Counted().candidate(1)}).keys() == {"one"}
    assert len(lines) == 1
    assert "cannot keep what was measured" in lines[0]


def _measure_slowly(found: "multiprocessing.Queue[tuple[bool, dict[int, float]]]") -> None:
    measured_here = False

    def make() -> measured.Product:
        nonlocal measured_here
        measured_here = True
        time.sleep(0.2)
        return lambda x: x

    times = seconds("some, float32", {"one": Candidate(make, 1 << 30)})
    found.put((measured_here, dict(times["one"])))


def test_of_several_processes_one_measures_and_all_agree(cache: Path) -> None:
    context = multiprocessing.get_context("fork")
    found = context.Queue()
    processes = [context.Process(target=_measure_slowly, args=(found,)) for _ in range(3)]
    for process in processes:
        process.start()
    results = [found.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(here for here, _ in results) == [False, False, True]
    assert results[0][1] == results[1][1] == results[2][1]


GROWTH = """
import psutil, torch
from vllm_subspec.weights.kernels import measured
def make():
    weight = torch.ones(1 << 20)
    return lambda x: weight[:1]
before = psutil.Process().memory_info().rss
measured.seconds("some, float32", {"one": measured.Candidate(make, 1 << 20)})
print("grown by", psutil.Process().memory_info().rss - before)
"""


def test_what_was_measured_with_is_given_back(tmp_path: Path) -> None:
    """Memory is planned by what the process holds. Here the allocator keeps all that is freed."""
    keeps = {f"MALLOC_{name}_THRESHOLD_": str(1 << 40) for name in ("MMAP", "TRIM")}
    own = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(
        [sys.executable, "-c", GROWTH],
        env={**own, **keeps, "VLLM_CACHE_ROOT": str(tmp_path)},
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout.split("grown by")[1]) < 48 << 20


def test_threads_are_as_before(cache: Path) -> None:
    threads = torch.get_num_threads()
    seconds("some, float32", {"one": Counted().candidate(1)})
    assert torch.get_num_threads() == threads


time_of = st.floats(1e-6, 1.0)
some_times = st.dictionaries(
    st.sampled_from([OWN, ONEDNN, TORCH]),
    st.tuples(*[time_of] * len(TOKENS)).map(lambda t: dict(zip(TOKENS, t, strict=True))),
    min_size=1,
)


@given(some_times)
def test_a_plain_linear_is_never_much_slower_than_the_fastest(
    found: dict[str, dict[int, float]],
) -> None:
    steps = plain_linear.steps(found)
    assert [tokens for tokens, _ in steps] == sorted({tokens for tokens, _ in steps})
    assert steps[0][0] == TOKENS[0]
    assert all(a[1] != b[1] for a, b in zip(steps, steps[1:], strict=False))
    for tokens in TOKENS:
        name = [name for begin, name in steps if begin <= tokens][-1]
        best = min(times[tokens] for times in found.values())
        assert found[name][tokens] == best or (
            name == OWN and found[name][tokens] < plain_linear._CLEARLY * best
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_all_linears_of_a_choice_compute_the_same(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was measured: also where one computes few tokens and another many."""
    weight, bias = torch.randn(96, 256).to(dtype) / 16, torch.randn(96).to(dtype)
    able = plain_linear.measure(dtype).keys()
    for few in able:
        for many in able:
            monkeypatch.setattr(
                plain_linear, "choice", lambda dtype, f=few, m=many: ((1, f), (8, m))
            )
            linear = plain_linear.plain_linear(torch.device("cpu"), dtype)
            for tokens in (0, 1, 7, 8, 40):
                x = torch.randn(tokens, 256).to(dtype)
                out = linear(x, weight, bias)
                exact = x.double() @ weight.double().T + bias.double()
                assert out.dtype == dtype
                assert out.shape == (tokens, 96)
                torch.testing.assert_close(out, exact.to(dtype), rtol=2e-2, atol=2e-2)


def test_resident_linears_are_ours_where_vllm_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = dict.fromkeys(TOKENS, 3.0)
    fast = dict.fromkeys(TOKENS, 1.0)
    replaces = resident_linear.replaces_vllm.__wrapped__

    def answer(found: dict[str, dict[int, float]]) -> bool:
        monkeypatch.setattr(resident_linear, "measure", lambda dtype: found)
        return bool(replaces(torch.bfloat16))

    assert answer({OWN: fast, resident_linear.FALLBACK: slow})
    assert answer({OWN: fast, resident_linear.VLLM: slow, resident_linear.FALLBACK: slow})
    # Where vLLM packs, what it would fall back to does not matter.
    assert not answer({OWN: fast, resident_linear.VLLM: fast, resident_linear.FALLBACK: slow})
    assert not answer({OWN: slow, resident_linear.VLLM: fast})
    assert not answer({})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("ours", [True, False])
def test_a_resident_linear_keeps_its_weight_where_ours_computes(
    ours: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor.layers import utils

    monkeypatch.setattr(resident_linear, "replaces_vllm", lambda dtype: ours)
    layer = torch.nn.Linear(256, 96, dtype=dtype)
    weight = layer.weight.detach().clone()
    x = torch.randn(5, 3, 256).to(dtype)
    before = utils.dispatch_cpu_unquantized_gemm
    with resident_linear.resident_linears():
        utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
    assert utils.dispatch_cpu_unquantized_gemm is before
    assert (layer.cpu_linear is resident_linear.resident_linear) == ours
    assert torch.equal(layer.weight, weight)
    if not ours:
        return
    with torch.inference_mode():
        out = utils.cpu_unquantized_gemm(layer, x, layer.weight, layer.bias)
    assert out.shape == (5, 3, 96)
    exact = x.double() @ weight.double().T + layer.bias.double()
    torch.testing.assert_close(out, exact.to(dtype), rtol=2e-2, atol=2e-2)
