# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""A worker that somebody else brings, by ``--worker-cls`` or in a plugin, beside ours.

Both are subclasses of vLLM's worker and call what they override, so ours goes before theirs in one
class of both. It has no name that a configuration could hold: ours is named there, and makes itself
the class of both (`joined`).
"""

from typing import Any

from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname

KEY = "subspec_beside"
"""Of their worker's name in ``additional_config``."""
STOCK = {
    "cpu": "vllm.v1.worker.cpu_worker.CPUWorker",
    "cuda": "vllm.v1.worker.gpu_worker.Worker",
}


def check(method: str, theirs: str) -> None:
    """Raises ValueError, in one sentence, if the worker of this name is none that ours can join."""
    stock = STOCK[current_platform.device_type]
    try:
        found = resolve_obj_by_qualname(theirs)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f'method "{method}" brings its own worker and cannot read the one that --worker-cls '
            f"or another plugin brings, {theirs} ({error}): remove one of them"
        ) from error
    if not (isinstance(found, type) and issubclass(found, resolve_obj_by_qualname(stock))):
        raise ValueError(
            f'method "{method}" brings its own worker, which can be joined with subclasses of '
            f"{stock} only, but --worker-cls or another plugin brings {theirs}: remove one of them"
        )


def joined(ours: type, config: VllmConfig) -> type:
    """The class of a worker: ``ours``, and with it theirs if the configuration has one."""
    extra: Any = config.additional_config
    if not isinstance(extra, dict) or KEY not in extra:
        return ours
    theirs = resolve_obj_by_qualname(extra[KEY])
    if issubclass(ours, theirs):
        return ours
    return type(f"{ours.__name__}With{theirs.__name__}", (ours, theirs), {})
