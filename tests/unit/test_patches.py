# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""The patches apply to the installed vLLM, and their run-time forms do what they say."""

import ctypes
import functools
import importlib
import importlib.util
import inspect
import itertools
import os
import py_compile
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
import vllm
import zmq
from hypothesis import given
from hypothesis import strategies as st
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed.device_communicators.shm_broadcast import SpinCondition
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.triton_utils import HAS_TRITON
from vllm.utils import cpu_triton_utils
from vllm.utils.hashing import sha256
from vllm.v1 import outputs as vllm_outputs
from vllm.v1 import structured_output
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs, FinishReason
from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.sample.ops import topk_topp_sampler
from vllm.v1.sample.rejection_sampler import expand_batch_to_tokens
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from tests.unit.trees import token_trees
from vllm_subspec import plugin
from vllm_subspec.core.draft_tokens import DraftTokens
from vllm_subspec.core.tree import TokenTree
from vllm_subspec.engine import compat
from vllm_subspec.engine.failure import FailedOutput

ROOT = Path(__file__).parents[2]
PATCHES = sorted((ROOT / "patches").glob("*.patch"))
MODEL = ROOT / "models" / "pystd-6m"
INSTALLED = Path(vllm.__file__).parent.parent
TOUCHED = re.compile(r"^diff --git a/(\S+) b/\1$", re.MULTILINE)
DRAFTS = 4
BLOCK = 16
BLOCKS = 64


@pytest.fixture(autouse=True, scope="module")
def _in_force() -> Iterator[None]:
    plugin.register()
    compat.apply()
    yield
    compat.undo()


# The files


def patched_files(patch: Path, folder: Path) -> list[str]:
    """Copy to ``folder`` what ``patch`` touches, apply it, and return the files' names."""
    touched = TOUCHED.findall(patch.read_text())
    for name in touched:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(INSTALLED / name, folder / name)
    # Outside any repository, or git would take the paths as relative to its root.
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
    for options in (["--check"], []):
        done = subprocess.run(
            ["git", "apply", *options, str(patch)],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    return touched


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_patch_applies_to_the_installed_vllm(patch: Path, tmp_path: Path) -> None:
    touched = patched_files(patch, tmp_path)
    assert touched
    for name in touched:
        assert (tmp_path / name).read_text() != (INSTALLED / name).read_text()
        py_compile.compile(str(tmp_path / name), doraise=True)


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_patch_says_why_how_and_until_when(patch: Path) -> None:
    text = patch.read_text()
    head = text.split("\n---\n", 1)[0]
    assert re.match(r"From [0-9a-f]{40} .*\nFrom: .+\nDate: .+\nSubject: \[PATCH\] .+\n", head)
    for heading in ("Why", "How", "Remove when"):
        assert re.search(rf"^\*\*{heading}\*\*\n\n\S", head, re.MULTILINE), heading
    assert "subspec" not in text.split("Subject:", 1)[1], "a patch for vLLM does not name us"


def test_patches_and_run_time_forms_match() -> None:
    named = compat.apply.__code__.co_names
    forms = [getattr(compat, name) for name in named if inspect.isfunction(vars(compat).get(name))]
    cited = [re.findall(r"\bpatches/(\d{4})\b", inspect.getdoc(form) or "") for form in forms]
    assert cited == [[patch.name[:4]] for patch in PATCHES]
    readme = (ROOT / "patches" / "README.md").read_text()
    for patch, form in zip(PATCHES, forms, strict=True):
        row = next(line for line in readme.splitlines() if line.startswith(f"| `{patch.name}`"))
        assert f"`compat.{form.__name__}`" in row


CHANGED: list[tuple[Any, str]] = [
    (VllmConfig, "num_lookahead_tokens"),
    (cpu_triton_utils, "_expand_kernel_impl"),
    (CPUModelRunner, "_sample"),
    (CPUModelRunner, "_bookkeeping_sync"),
    (Scheduler, "update_from_output"),
    (topk_topp_sampler, "apply_top_k_only"),
    (StructuredOutputManager, "validate_tokens"),
    (StructuredOutputManager, "grammar_bitmask"),
    (SamplingParams, "_validate_spec_decode"),
    (EngineCoreProc, "run_busy_loop"),
    (SpinCondition, "record_read"),
]


def symbols() -> list[Any]:
    """What is there now, of what is changed and of what must not be."""
    inherited = [(GPUModelRunner, "_sample"), (GPUModelRunner, "_bookkeeping_sync")]
    return [inspect.getattr_static(owner, name) for owner, name in [*CHANGED, *inherited]]


def test_applying_twice_changes_nothing() -> None:
    before = symbols()
    compat.apply()
    assert all(one is other for one, other in zip(before, symbols(), strict=True))
    assert "_sample" in vars(CPUModelRunner)
    assert not hasattr(GPUModelRunner._sample, "__wrapped__"), "only the CPU runner is changed"
    assert list(compat._replaced) == CHANGED


def test_undoing_leaves_nothing_behind() -> None:
    changed = symbols()
    compat.undo()
    try:
        assert not any(
            one is other for one, other in zip(changed[: len(CHANGED)], symbols(), strict=False)
        )
        assert "_sample" not in vars(CPUModelRunner)
        assert not hasattr(Scheduler.update_from_output, "__wrapped__")
    finally:
        compat.apply()


@pytest.mark.parametrize("told", [True, False])
def test_what_another_plugin_wraps_is_left_to_it(
    monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    """It hides ours, which is neither put in twice nor taken away with theirs."""
    ours = Scheduler.update_from_output

    def theirs(*args: Any, **kwargs: Any) -> Any:
        return ours(*args, **kwargs)

    wrapper = functools.wraps(ours)(theirs) if told else theirs
    with monkeypatch.context() as patch:
        patch.setattr(Scheduler, "update_from_output", wrapper)
        compat.apply()
        assert Scheduler.update_from_output is wrapper
        compat.undo()
        assert Scheduler.update_from_output is wrapper
    compat.apply()
    assert Scheduler.update_from_output is ours


# Both forms of a patch: the run-time one and the patched files


@dataclass
class Patched:
    """vLLM's modules with a patch in force.

    Args:
        folder: for the patched files; None: the modules in use, which have the run-time forms.
    """

    folder: Path | None
    patcher: pytest.MonkeyPatch
    loaded: dict[str, Any] = field(default_factory=dict)

    def module(self, patch: str, name: str) -> Any:
        """Module ``name``, with the patch of that number."""
        if self.folder is None:
            return importlib.import_module(name)
        if name not in self.loaded:
            self.loaded[name] = self._load(self.folder / patch, patch, name)
        return self.loaded[name]

    def _load(self, folder: Path, patch: str, name: str) -> Any:
        if not folder.exists():
            folder.mkdir()
            patched_files(next(p for p in PATCHES if p.name.startswith(patch)), folder)
        path = folder / name.replace(".", "/")
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        spec = importlib.util.spec_from_file_location(f"patched_{name.replace('.', '_')}", file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        self.patcher.setitem(sys.modules, spec.name, module)  # dataclasses look there
        spec.loader.exec_module(module)
        return module


@pytest.fixture(scope="module", params=["run time", "files"])
def patched(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Patched]:
    with pytest.MonkeyPatch.context() as patcher:
        files = request.param == "files"
        yield Patched(tmp_path_factory.mktemp("patched") if files else None, patcher)


# 0001


def _config(**speculative: Any) -> VllmConfig:
    arguments = EngineArgs(
        model=str(MODEL),
        max_model_len=512,
        max_num_batched_tokens=128,
        speculative_config=speculative or None,
        enforce_eager=True,
    )
    return arguments.create_engine_config()


@pytest.fixture(scope="module")
def subspec_config() -> VllmConfig:
    return _config(method="subspec", num_speculative_tokens=DRAFTS)


def test_drafts_get_lookahead_slots(subspec_config: VllmConfig) -> None:
    assert subspec_config.speculative_config.method == "custom_class"
    # The drafts, and behind them a looked-up continuation while it is verified.
    assert subspec_config.num_lookahead_tokens == DRAFTS + 10


def test_other_methods_keep_their_lookahead() -> None:
    assert _config().num_lookahead_tokens == 0
    ngram = _config(method="ngram", num_speculative_tokens=DRAFTS, prompt_lookup_max=2)
    assert ngram.num_lookahead_tokens == 0


# 0002


@st.composite
def _expansions(draw: st.DrawFn) -> tuple[torch.Tensor, list[int], float, float]:
    dtype = draw(st.sampled_from([torch.float32, torch.int32, torch.int64]))
    values: list[float] = draw(
        st.lists(st.sampled_from([0, 1, 2, 7, -1]), min_size=1, max_size=6)
        if not dtype.is_floating_point
        else st.lists(st.sampled_from([0.0, 0.25, 0.7, 1.0, 1.5]), min_size=1, max_size=6)
    )
    counts = draw(st.lists(st.integers(0, 5), min_size=len(values), max_size=len(values)))
    replace_from, replace_to = draw(st.sampled_from([(0, 0), (0, 1), (1, 7), (-1, 2)]))
    return torch.tensor(values, dtype=dtype), counts, replace_from, replace_to


@given(_expansions(), st.sampled_from([torch.int32, torch.int64]))
def test_expand_kernel_repeats_each_value(
    patched: Patched, case: tuple[torch.Tensor, list[int], float, float], count_dtype: torch.dtype
) -> None:
    values, counts, replace_from, replace_to = case
    expected = [
        replace_to if value == replace_from else value
        for value, count in zip(values.tolist(), counts, strict=True)
        for _ in range(count)
    ]
    output = torch.full((sum(counts),), 99, dtype=values.dtype)
    cumulative = torch.tensor(counts).cumsum(0).to(count_dtype)
    kernels = patched.module("0002", cpu_triton_utils.__name__)
    kernels._expand_kernel_impl(output, values, cumulative, replace_from, replace_to)
    assert torch.equal(output, torch.tensor(expected, dtype=values.dtype))


@pytest.mark.skipif(HAS_TRITON, reason="with Triton the sampler does not use the CPU kernel")
def test_the_sampler_runs_the_repaired_kernel() -> None:
    # As in a worker: plugins first, the platform's kernels second.
    current_platform.register_triton_kernel_overrides()
    temperature = torch.tensor([0.7, 0.0, 1.5])
    expanded = expand_batch_to_tokens(temperature, torch.tensor([2, 2, 5], dtype=torch.int32), 5)
    assert torch.equal(expanded, torch.tensor([0.7, 0.7, 1.5, 1.5, 1.5]))


# 0005


def test_the_top_k_of_no_rows_is_no_rows(patched: Patched) -> None:
    sampler = patched.module("0005", topk_topp_sampler.__name__)
    empty = sampler.apply_top_k_top_p(torch.empty(0, 7), torch.empty(0, dtype=torch.int32), None)
    assert empty.shape == (0, 7)


def test_top_k_still_masks(patched: Patched) -> None:
    sampler = patched.module("0005", topk_topp_sampler.__name__)
    logits = sampler.apply_top_k_top_p(torch.arange(4.0).repeat(2, 1), torch.tensor([1, 4]), None)
    assert torch.isinf(logits).sum(dim=1).tolist() == [3, 0]


# 0004: vLLM's scheduler as the engine builds it, with a runner's outputs given by hand


@pytest.fixture
def scheduler(subspec_config: VllmConfig) -> Scheduler:
    init_none_hash(sha256)
    subspec_config.cache_config.num_gpu_blocks = BLOCKS
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=16, dtype=torch.float32)
    with set_current_vllm_config(subspec_config):
        return Scheduler(
            vllm_config=subspec_config,
            kv_cache_config=KVCacheConfig(BLOCKS, [], [KVCacheGroupSpec(["attention"], spec)]),
            structured_output_manager=StructuredOutputManager(subspec_config),
            block_size=BLOCK,
            hash_block_size=BLOCK,
            log_stats=True,
        )


def _request(name: str, prompt: list[int]) -> Request:
    return Request(
        request_id=name,
        prompt_token_ids=prompt,
        sampling_params=SamplingParams(max_tokens=64, temperature=0.0),
        pooling_params=None,
        block_hasher=get_request_block_hasher(BLOCK, sha256),
    )


def _succeed(
    scheduler: Scheduler, scheduled: SchedulerOutput, token: int = 5
) -> dict[int, EngineCoreOutputs]:
    """The step ran: every row that is past its prompt has emitted one token."""
    names = list(scheduled.num_scheduled_tokens)
    emitted = [[] if scheduler.requests[name].is_prefill_chunk else [token] for name in names]
    output = ModelRunnerOutput(names, {name: i for i, name in enumerate(names)}, emitted)
    return scheduler.update_from_output(scheduled, output)


def _fail(scheduler: Scheduler, scheduled: SchedulerOutput) -> dict[str, FinishReason | None]:
    outputs = scheduler.update_from_output(scheduled, FailedOutput.of(scheduled, "disk gone"))
    return {
        output.request_id: output.finish_reason
        for client in outputs.values()
        for output in client.outputs
    }


def _assert_idle(scheduler: Scheduler) -> None:
    assert not scheduler.running and not scheduler.requests
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == BLOCKS - 1


def _cached_tokens(scheduler: Scheduler, prompt: list[int]) -> int:
    """Tokens of a new request with ``prompt`` that the prefix cache would serve."""
    return scheduler.kv_cache_manager.get_computed_blocks(_request("probe", prompt))[1]


PROMPT = list(range(100, 100 + 3 * BLOCK))


def test_prefix_cache_serves_a_step_that_succeeded(scheduler: Scheduler) -> None:
    """What the tests below look for is found when nothing fails."""
    scheduler.add_request(_request("a", PROMPT))
    _succeed(scheduler, scheduler.schedule())
    assert _cached_tokens(scheduler, [*PROMPT, 1]) == len(PROMPT)


def test_failed_step_ends_prefill_and_chunk_and_row_with_drafts(scheduler: Scheduler) -> None:
    scheduler.add_request(_request("decoding", list(range(700, 720))))
    _succeed(scheduler, scheduler.schedule())
    scheduler.update_draft_token_ids(DraftTokenIds(["decoding"], [[1, 2, 3, 4]]))
    scheduler.add_request(_request("prefill", PROMPT))
    scheduler.add_request(_request("chunk", list(range(200))))
    scheduled = scheduler.schedule()
    assert scheduled.num_scheduled_tokens["decoding"] == 1 + DRAFTS
    assert scheduled.num_scheduled_tokens["prefill"] == len(PROMPT)
    assert 0 < scheduled.num_scheduled_tokens["chunk"] < 200
    assert _fail(scheduler, scheduled) == dict.fromkeys(
        ("decoding", "prefill", "chunk"), FinishReason.ERROR
    )
    _assert_idle(scheduler)
    assert _cached_tokens(scheduler, [*PROMPT, 1]) == 0


def test_the_step_after_a_failed_one_serves_the_same_prompt(scheduler: Scheduler) -> None:
    scheduler.add_request(_request("first", PROMPT))
    _fail(scheduler, scheduler.schedule())
    scheduler.add_request(_request("second", PROMPT))
    scheduled = scheduler.schedule()
    assert scheduled.finished_req_ids == {"first"}
    assert scheduled.num_scheduled_tokens == {"second": len(PROMPT)}, "nothing from the cache"
    outputs = _succeed(scheduler, scheduled)
    assert [output.new_token_ids for output in outputs[0].outputs] == [[5]]


def test_requests_outside_the_failed_step_live_on(scheduler: Scheduler) -> None:
    scheduler.add_request(_request("long", list(range(300, 428))))
    scheduler.add_request(_request("waiting", PROMPT))
    scheduled = scheduler.schedule()
    assert set(scheduled.num_scheduled_tokens) == {"long"}, "the token budget is 128"
    assert _fail(scheduler, scheduled) == {"long": FinishReason.ERROR}
    scheduled = scheduler.schedule()
    assert set(scheduled.num_scheduled_tokens) == {"waiting"}
    assert _succeed(scheduler, scheduled)[0].outputs[0].finish_reason is None


@pytest.mark.parametrize("aborted", [["a"], ["a", "b"]], ids=["one", "all"])
def test_aborted_while_the_step_failed(scheduler: Scheduler, aborted: list[str]) -> None:
    """A request that left before the output was read must not leave its blocks in the cache."""
    prompts = {"a": PROMPT, "b": [token + 500 for token in PROMPT]}
    for name, prompt in prompts.items():
        scheduler.add_request(_request(name, prompt))
    scheduled = scheduler.schedule()
    scheduler.finish_requests(aborted, RequestStatus.FINISHED_ABORTED)
    failed = _fail(scheduler, scheduled)
    assert failed == dict.fromkeys(prompts.keys() - set(aborted), FinishReason.ERROR)
    _assert_idle(scheduler)
    for prompt in prompts.values():
        assert _cached_tokens(scheduler, [*prompt, 1]) == 0


def test_the_scheduler_reads_the_set_of_requests_to_fail() -> None:
    """The set is an attribute of the instance, which `seams` cannot see."""
    stock: Callable[..., Any] = inspect.unwrap(Scheduler.update_from_output)
    assert "grammar_compile_error_reqs" in stock.__code__.co_names


# 0006

NODES = 12
REGEX = "(a[ab]|b[acd])*(cd|ce?)"  # siblings have different followers
THOUGHT = "}"  # ends the reasoning of `Thinker`

# How vLLM calls xgrammar.
QUIET = pytest.mark.filterwarnings("ignore:max_rollback_tokens:DeprecationWarning")


@dataclass(frozen=True)
class Form:
    """vLLM with the patch: its manager and its drafts."""

    manager: type
    draft: Callable[[TokenTree], list[int]]
    parents: Callable[[Any], list[int]]


RUN_TIME = Form(
    StructuredOutputManager,
    lambda tree: DraftTokens(tree, np.ones(len(tree))),
    lambda drafts: drafts.tree.parents.tolist(),
)


@pytest.fixture(scope="module")
def form(patched: Patched) -> Form:
    if patched.folder is None:
        return RUN_TIME
    draft_tree = patched.module("0006", vllm_outputs.__name__).DraftTree
    patched.patcher.setattr(vllm_outputs, "DraftTree", draft_tree, raising=False)
    return Form(
        patched.module("0006", structured_output.__name__).StructuredOutputManager,
        lambda tree: draft_tree(tree.tokens.tolist(), tree.parents.tolist()),
        lambda drafts: drafts.parents,
    )


@dataclass
class Constrained:
    """A manager and requests of it that have got to different places in their grammars."""

    form: Form
    manager: Any
    requests: dict[str, Request]
    committed: dict[str, list[int]]
    alphabet: list[int]

    def drafted(self, tree: TokenTree) -> list[int]:
        tokens = np.array(self.alphabet)[tree.tokens % len(self.alphabet)]
        return self.form.draft(TokenTree(tokens, tree.parents, tree.scores))

    def grammar(self, name: str) -> Any:
        """A grammar like that of request ``name``."""
        request = self.requests[name]
        grammar = self.manager._create_grammar(request)
        assert grammar.accept_tokens(name, self.committed[name])
        return grammar


def encode(manager: Any, text: str) -> list[int]:
    tokens: list[int] = manager.tokenizer.encode(text, add_special_tokens=False)
    return tokens


def structured_request(manager: Any, name: str, backend: str) -> Request:
    constraint = StructuredOutputsParams(regex=REGEX)
    constraint._backend = backend
    request = Request(
        request_id=name,
        prompt_token_ids=[5, 6],
        sampling_params=SamplingParams(max_tokens=64, structured_outputs=constraint),
        pooling_params=None,
    )
    request.sampling_params._all_stop_token_ids = {manager.tokenizer.eos_token_id}
    manager._use_async_grammar_compilation = False  # or the grammar is not there at once
    manager.grammar_init(request)
    return request


@pytest.fixture(scope="module")
def tree_config() -> VllmConfig:
    return _config(method="subspec", num_speculative_tokens=NODES)


@pytest.fixture(scope="module", params=["xgrammar", "guidance"])
def constrained(request: pytest.FixtureRequest, form: Form, tree_config: VllmConfig) -> Constrained:
    manager = form.manager(tree_config)
    alphabet = [token for letter in "abcde" for token in encode(manager, letter)]
    alphabet.append(manager.tokenizer.eos_token_id)
    committed = {
        name: encode(manager, text)
        for name, text in {"p": "", "q": "ab", "r": "abc", "s": "ba"}.items()
    }
    requests = {name: structured_request(manager, name, request.param) for name in committed}
    for name, tokens in committed.items():
        assert manager.accept_tokens(requests[name], tokens)
    requests["free"] = _request("free", [5, 6])
    return Constrained(form, manager, requests, committed, alphabet)


def shaped(tokens: list[int], parents: list[int]) -> TokenTree:
    return TokenTree(np.array(tokens), np.array(parents), np.full(len(tokens), 0.5))


def tree_paths(parents: Sequence[int], tokens: Sequence[int]) -> list[list[int]]:
    paths: list[list[int]] = []
    for parent, token in zip(parents, tokens, strict=True):
        paths.append([*(paths[parent] if parent >= 0 else []), token])
    return paths


def mask_after(grammar: Any, path: list[int], words: int) -> list[int]:
    mask = torch.full((1, words), -1, dtype=torch.int32)
    assert all(grammar.accept_tokens("", [token]) for token in path)
    if not grammar.is_terminated():
        grammar.fill_bitmask(mask, 0)
    return mask[0].tolist()


@QUIET
@given(st.data())
def test_a_mixed_batch_is_validated_and_masked(
    constrained: Constrained, data: st.DataObject
) -> None:
    """Trees, chains that know they are, plain lists, empty drafts, none, and unconstrained rows."""
    manager, form = constrained.manager, constrained.form
    scheduled: dict[str, list[int]] = {}
    parents: dict[str, list[int]] = {}
    for name, request in constrained.requests.items():
        kind = data.draw(st.sampled_from(["tree", "chain", "plain", "absent"]), label=name)
        tree = data.draw(token_trees(most=NODES))
        if kind != "tree":
            tree = TokenTree.chain(tree.tokens, np.full(len(tree), 0.5))
        drafts = constrained.drafted(tree)
        if kind == "absent":
            continue
        paths = tree_paths(tree.parents.tolist(), drafts)
        kept = manager.validate_tokens(request, list(drafts) if kind == "plain" else drafts)
        valid = list(range(len(paths)))
        if name != "free":
            grammar = constrained.grammar(name)
            valid = [i for i, path in enumerate(paths) if grammar.validate_tokens(path) == path]
        assert kept == [drafts[i] for i in valid]
        if kind == "plain":
            parents[name] = list(range(-1, len(kept) - 1))
        else:
            assert type(kept) is type(drafts)
            parents[name] = form.parents(kept)
            assert tree_paths(parents[name], kept) == [paths[i] for i in valid]
        scheduled[name] = kept
    ids = data.draw(st.permutations([name for name in constrained.requests if name != "free"]))
    masks = manager.grammar_bitmask(constrained.requests, ids, scheduled)
    words = masks.shape[1]
    expected = [
        mask_after(constrained.grammar(name), path, words)
        for name in ids
        for path in [[], *tree_paths(parents.get(name, []), scheduled.get(name, []))]
    ]
    assert masks.tolist() == expected
    for name in ids:  # the grammars are where they were
        grammar = constrained.requests[name].structured_output_request.grammar
        assert mask_after(grammar, [], words) == mask_after(constrained.grammar(name), [], words)


@QUIET
def test_an_unexpected_token_takes_its_parents_mask(constrained: Constrained) -> None:
    a, b, _, d, e, end = constrained.alphabet
    tree = shaped([a, end, b, d, e], [-1, -1, 0, 1, 1])
    drafts = constrained.form.draft(tree)
    masks = constrained.manager.grammar_bitmask(constrained.requests, ["q"], {"q": drafts})
    paths: list[list[int]] = [[], [a], [], [a, b], [], []]  # the end is not allowed after "ab"
    words = masks.shape[1]
    assert masks.tolist() == [mask_after(constrained.grammar("q"), path, words) for path in paths]


@QUIET
def test_no_structured_request_no_mask(constrained: Constrained) -> None:
    scheduled = {"free": constrained.form.draft(shaped([1, 2], [-1, -1]))}
    assert constrained.manager.grammar_bitmask(constrained.requests, [], scheduled) is None


class Thinker:
    """A reasoning parser: reasoning lasts until the token of `THOUGHT`."""

    def __init__(self, tokenizer: Any) -> None:
        (self.end,) = tokenizer.encode(THOUGHT, add_special_tokens=False)

    def is_reasoning_end(self, input_ids: Sequence[int]) -> bool:
        return self.end in input_ids

    def is_reasoning_end_streaming(
        self, input_ids: Sequence[int], delta_ids: Sequence[int]
    ) -> bool:
        return self.end in delta_ids


@QUIET
@pytest.mark.parametrize("thought", [0, 1, 2, None])
def test_a_tree_is_a_chain_until_reasoning_ends(
    form: Form, tree_config: VllmConfig, thought: int | None
) -> None:
    manager = form.manager(tree_config)
    manager.reasoner_cls = Thinker
    request = structured_request(manager, "r", "xgrammar")
    (end,) = encode(manager, THOUGHT)
    a, b, c, d = (encode(manager, letter)[0] for letter in "abcd")
    # Once in the grammar, "a" and "b" are valid and "d" is not.
    best = [d, d, a, b, d] if thought is None else [*[d] * thought, end, a, b, d]
    tokens = [best[0], c, *best[1:]]
    parents = [-1, -1, 0, *range(2, len(best))]
    tree = shaped(tokens, parents)
    expected = manager.validate_tokens(request, best)
    assert expected == (best if thought is None else best[:-1])
    kept = manager.validate_tokens(request, form.draft(tree))
    assert kept == expected
    assert form.parents(kept) == list(range(-1, len(kept) - 1))
    masks = manager.grammar_bitmask({"r": request}, ["r"], {"r": kept}).copy()
    expected_masks = manager.grammar_bitmask({"r": request}, ["r"], {"r": expected})
    assert masks.tolist() == expected_masks.tolist()

    assert manager.accept_tokens(request, [end])
    tree = shaped([a, b, d, c], [-1, -1, -1, 1])
    kept = manager.validate_tokens(request, form.draft(tree))
    assert kept == [a, b, c]
    assert form.parents(kept) == [-1, -1, 1]


# 0007


@pytest.mark.parametrize("params", [{"min_p": 0.2}, {"logit_bias": {5: 1.0}}])
def test_parameters_are_served_where_our_proposer_drafts(params: dict[str, Any]) -> None:
    asked = SamplingParams(temperature=1.0, **params)
    ours = _config(method="subspec", num_speculative_tokens=DRAFTS).speculative_config
    ngram = _config(method="ngram", num_speculative_tokens=DRAFTS, prompt_lookup_max=2)
    asked._validate_spec_decode(None)
    asked._validate_spec_decode(ours)
    with pytest.raises(VLLMValidationError, match="not yet supported"):
        asked._validate_spec_decode(ngram.speculative_config)


def test_thinking_budgets_are_refused_where_our_proposer_drafts() -> None:
    asked = SamplingParams(thinking_token_budget=9)
    ours = _config(method="subspec", num_speculative_tokens=DRAFTS).speculative_config
    asked._validate_spec_decode(None)
    with pytest.raises(VLLMValidationError, match="thinking_token_budget from the request"):
        asked._validate_spec_decode(ours)


# 0009

NOTICES = 5_000
MUCH = 2 * NOTICES
"""Bytes."""


class _Allocated(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = [
        *((f"unused_{i}", ctypes.c_size_t) for i in range(7)),
        ("uordblks", ctypes.c_size_t),
        *((f"unused_{i}", ctypes.c_size_t) for i in range(7, 9)),
    ]


def _allocated() -> int:
    """Bytes that this process has from malloc."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _Allocated
    return int(mallinfo().uordblks)


@pytest.fixture
def queue(patched: Patched, tmp_path: Path) -> Iterator[tuple[SpinCondition, SpinCondition]]:
    """Writer and reader."""
    condition = patched.module("0009", SpinCondition.__module__).SpinCondition
    context = zmq.Context()
    address = f"ipc://{tmp_path}/queue"
    ends = condition(False, context, address), condition(True, context, address)
    yield ends
    context.destroy(linger=0)


def unseen(reason: str) -> NoReturn:
    """Skip, but not where everything must be tested."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def test_a_busy_reader_keeps_nothing(
    queue: tuple[SpinCondition, SpinCondition], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not hasattr(ctypes.CDLL(None), "mallinfo2"):
        unseen("this C library does not tell what it gave")
    writer, reader = queue
    stock = inspect.unwrap(SpinCondition.record_read)
    reads = itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: next(reads) / 1000)  # a thousand a second

    def kept(record_read: Callable[[], None]) -> int:
        before = _allocated()
        for _ in range(NOTICES):
            writer.notify()
            time.sleep(5e-5)
            record_read()
        return _allocated() - before

    kept(reader.record_read)
    found = kept(reader.record_read)
    # 40 bytes for each that gets through, if this measures at all: another allocator is not seen.
    stock_keeps = 0
    for _ in range(4):
        stock_keeps += kept(lambda: stock(reader))
        if stock_keeps > MUCH:
            break
    else:
        unseen("malloc's figures do not show what vLLM's own function keeps")
    assert found < MUCH
    monkeypatch.undo()
    reader.last_read = float("-inf")  # idle: it polls, and is woken by the last one
    began = time.monotonic()
    reader.wait(timeout_ms=10_000)
    assert time.monotonic() - began < 5
