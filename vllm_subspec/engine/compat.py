# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Changes to vLLM's behaviour, applied at run time.

Each function here is the run-time form of one file in ``patches/``, which says why the change is
needed and when it can go. They take effect where our methods are used (`in_use`); `apply` is
idempotent, `undo` its inverse. What is changed was checked by `seams`.
"""

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.config import SpeculativeConfig, VllmConfig
from vllm.distributed.device_communicators.shm_broadcast import SpinCondition
from vllm.exceptions import VLLMValidationError
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.sample.ops import topk_topp_sampler
from vllm.v1.structured_output import StructuredOutputManager

from vllm_subspec.core.draft_tokens import DraftTokens
from vllm_subspec.core.grammar_walk import best_path, fill_masks, valid_nodes
from vllm_subspec.engine import orphan, refusals
from vllm_subspec.engine.failure import FailedOutput, fail_requests
from vllm_subspec.engine.in_use import PROPOSER
from vllm_subspec.engine.method import options_of

if TYPE_CHECKING:
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

_ABSENT = object()
_replaced: dict[tuple[Any, str], tuple[Any, Any]] = {}
"""What was there (`_ABSENT`: only inherited) and what is now, by owner and name."""


def apply() -> None:
    """Apply every patch that is not yet in force."""
    patches = (
        _lookahead,
        _expand_kernel,
        _cpu_generators,
        _failed_steps,
        _no_rows,
        _tree_grammar,
        _sampling_parameters,
        _orphans,
        _busy_queues,
    )
    for patch in patches:
        patch()


def undo() -> None:
    """Put vLLM's own back, except beneath what another plugin has wrapped around ours since."""
    for (owner, name), (before, now) in list(_replaced.items()):
        if vars(owner).get(name) is not now:
            continue
        if before is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
        del _replaced[owner, name]


def _replace(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    if (owner, name) in _replaced:
        return
    now = make(inspect.getattr_static(owner, name))  # a property as such, not its value
    _replaced[owner, name] = vars(owner).get(name, _ABSENT), now
    setattr(owner, name, now)


def _lookahead() -> None:
    """patches/0001: reserve KV slots behind the committed tokens for our drafts."""

    def make(original: property) -> property:
        read = original.fget
        assert read is not None

        def num_lookahead_tokens(self: VllmConfig) -> int:
            options = options_of(self)
            if options is not None:
                return options.lookahead
            lookahead: int = read(self)
            return lookahead

        return property(num_lookahead_tokens, doc=original.__doc__)

    _replace(VllmConfig, "num_lookahead_tokens", make)


def _expand_kernel() -> None:
    """patches/0002: the CPU form of the sampler's expand kernel wrote into a temporary."""

    def make(original: Any) -> Any:
        @functools.wraps(original)
        def expand(
            output: torch.Tensor,
            input_val: torch.Tensor,
            cu_num_tokens: torch.Tensor,
            replace_from: float,
            replace_to: float,
            MAX_NUM_TOKENS: int | None = None,  # noqa: N803 - the kernel's own parameter
        ) -> None:
            num_tokens = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
            values = input_val.masked_fill(input_val == replace_from, replace_to)
            output.copy_(values.repeat_interleave(num_tokens))

        return expand

    if current_platform.is_cpu():
        from vllm.utils import cpu_triton_utils

        _replace(cpu_triton_utils, "_expand_kernel_impl", make)


def _cpu_generators() -> None:
    """patches/0003: undo, on the CPU, what a discarded sample took from a request's generator.

    vLLM rewinds the generator by an offset, which only CUDA generators have.
    """

    def discarded(runner: "CPUModelRunner") -> list[int]:
        mask = runner.discard_request_mask.np[: runner.input_batch.num_reqs]
        return [i for i in mask.nonzero()[0].tolist() if i in runner.input_batch.generators]

    def sample(original: Any) -> Any:
        @functools.wraps(original)
        def _sample(self: "CPUModelRunner", *args: Any, **kwargs: Any) -> Any:
            generators = self.input_batch.generators
            before = {i: generators[i].get_state() for i in discarded(self)}
            output = original(self, *args, **kwargs)
            for i, state in before.items():
                generators[i].set_state(state)
            return output

        return _sample

    def bookkeeping(original: Any) -> Any:
        @functools.wraps(original)
        def _bookkeeping_sync(self: "CPUModelRunner", *args: Any, **kwargs: Any) -> Any:
            generators = self.input_batch.generators
            held_back = {i: generators.pop(i) for i in discarded(self)}
            try:
                return original(self, *args, **kwargs)
            finally:
                generators.update(held_back)

        return _bookkeeping_sync

    if current_platform.is_cpu():
        import vllm.v1.worker.cpu_worker  # noqa: F401 - to be imported before the runner
        from vllm.v1.worker.cpu_model_runner import CPUModelRunner

        # Both are inherited: set on the CPU runner, they leave the GPU runner as it is.
        _replace(CPUModelRunner, "_sample", sample)
        _replace(CPUModelRunner, "_bookkeeping_sync", bookkeeping)


def _failed_steps() -> None:
    """patches/0004: a failed pass ends its requests, not the engine."""

    def make(original: Any) -> Any:
        @functools.wraps(original)
        def update_from_output(
            self: Scheduler,
            scheduler_output: SchedulerOutput,
            model_runner_output: ModelRunnerOutput,
        ) -> Any:
            if isinstance(model_runner_output, FailedOutput):
                fail_requests(self, model_runner_output)
            return original(self, scheduler_output, model_runner_output)

        return update_from_output

    _replace(Scheduler, "update_from_output", make)


def _no_rows() -> None:
    """patches/0005: a step without drafts asks for the top k of no rows at all."""

    def make(original: Any) -> Any:
        @functools.wraps(original)
        def apply_top_k_only(logits: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            rest: torch.Tensor = original(logits, k) if logits.shape[0] else logits
            return rest

        return apply_top_k_only

    _replace(topk_topp_sampler, "apply_top_k_only", make)


def _tree_grammar() -> None:
    """patches/0006: a grammar follows each path of a token tree.

    Chains, also those that are drafted as trees, stay vLLM's own matter.
    """

    def validate(original: Any) -> Any:
        @functools.wraps(original)
        def validate_tokens(
            self: StructuredOutputManager, request: Request, spec_tokens: list[int]
        ) -> list[int]:
            if not isinstance(spec_tokens, DraftTokens):
                rest: list[int] = original(self, request, spec_tokens)
                return rest
            drafts = spec_tokens
            if request.use_structured_output and not drafts.tree.is_chain:
                if self._get_constraint_bounds(request, ()).constraint_start == 0:
                    grammar = request.structured_output_request.grammar
                    return drafts.select(valid_nodes(drafts.tree, grammar, request.request_id))
                # Still reasoning: where the grammar begins is found in a single path only.
                drafts = drafts.select(best_path(drafts.tree))
            # A plain list goes in, as vLLM also takes its end, and a plain prefix of it comes out.
            return drafts[: len(original(self, request, list(drafts)))]

        return validate_tokens

    def bitmask(original: Any) -> Any:
        @functools.wraps(original)
        def grammar_bitmask(
            self: StructuredOutputManager,
            requests: dict[str, Request],
            structured_output_request_ids: list[str],
            scheduled_spec_decode_tokens: dict[str, list[int]],
        ) -> npt.NDArray[np.int32] | None:
            scheduled = scheduled_spec_decode_tokens
            trees = {
                name: drafts.tree
                for name, drafts in scheduled.items()
                if isinstance(drafts, DraftTokens) and not drafts.tree.is_chain
            }
            # Of a draft that is all padding vLLM lays out the rows and asks the grammar nothing.
            plain = {
                name: [-1] * len(drafts) if name in trees else list(drafts)
                for name, drafts in scheduled.items()
            }
            masks: npt.NDArray[np.int32] | None = original(
                self, requests, structured_output_request_ids, plain
            )
            end = 0
            for name in structured_output_request_ids:
                start, end = end, end + 1 + len(scheduled.get(name, ()))
                if name in trees:
                    # Its root is constrained, or `validate_tokens` had cut it to a chain.
                    grammar = requests[name].structured_output_request.grammar
                    rows = torch.from_numpy(masks)[start:end]
                    fill_masks(trees[name], grammar, name, rows)
            return masks

        return grammar_bitmask

    _replace(StructuredOutputManager, "validate_tokens", validate)
    _replace(StructuredOutputManager, "grammar_bitmask", bitmask)


def _sampling_parameters() -> None:
    """patches/0007: `min_p` and `logit_bias` are served where the target's own sampler verifies."""

    def make(original: Any) -> Any:
        @functools.wraps(original)
        def _validate_spec_decode(
            self: SamplingParams, speculative_config: SpeculativeConfig | None
        ) -> None:
            if speculative_config is None or speculative_config.model != PROPOSER:
                original(self, speculative_config)
            elif reason := refusals.of_request(self):
                raise VLLMValidationError(reason)

        return _validate_spec_decode

    _replace(SamplingParams, "_validate_spec_decode", make)


def _orphans() -> None:
    """patches/0008: an engine ends when its front end has been killed."""

    def make(original: Any) -> Any:
        @functools.wraps(original)
        def run_busy_loop(self: EngineCoreProc) -> None:
            if options_of(self.vllm_config) is not None:
                orphan.end_with_parent()
            original(self)

        return run_busy_loop

    _replace(EngineCoreProc, "run_busy_loop", make)


def _busy_queues() -> None:
    """patches/0009: a queue that is never idle keeps a note of every message."""

    def make(original: Any) -> Any:
        @functools.wraps(original)
        def record_read(self: SpinCondition) -> None:
            before = int(self.last_read)
            original(self)
            if int(self.last_read) != before:  # once a second
                self.local_notify_socket.poll(0)  # takes nothing away

        return record_read

    _replace(SpinCondition, "record_read", make)
