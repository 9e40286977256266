# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""A pass whose weights could not be read: its requests end with an error, the server lives on.

An exception out of the model would end the engine. Instead the worker discards what the pass
computed and returns a `FailedOutput`; the scheduler, patched in `compat`, finishes the requests of
that step with an error and empties the prefix cache, which may hold blocks of the failed pass.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.logger import init_logger
from vllm.v1.outputs import ModelRunnerOutput

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler

logger = init_logger(__name__)


@dataclass
class FailedOutput(ModelRunnerOutput):
    """The output of a pass that must not be believed."""

    reason: str = ""

    @classmethod
    def of(cls, scheduler_output: "SchedulerOutput", reason: str) -> "FailedOutput":
        ids = list(scheduler_output.num_scheduled_tokens)
        return cls(
            req_ids=ids,
            req_id_to_index={request_id: index for index, request_id in enumerate(ids)},
            sampled_token_ids=[[] for _ in ids],
            reason=reason,
        )


def fail_requests(scheduler: "Scheduler", output: FailedOutput) -> None:
    """Have ``scheduler`` finish the requests of a failed pass with an error."""
    failed = [request for request in output.req_ids if request in scheduler.requests]
    logger.error("%d request(s) failed: %s", len(failed), output.reason)
    # Blocks were entered into the prefix cache when the pass was scheduled, also those of a request
    # that was aborted since, which no longer says which were its own: forget them all.
    blocks = scheduler.kv_cache_manager.block_pool.num_gpu_blocks
    scheduler.kv_cache_manager.evict_blocks(set(range(blocks)))
    # The scheduler ends the requests in this set with an error after it has read the output.
    scheduler.grammar_compile_error_reqs.update(failed)
