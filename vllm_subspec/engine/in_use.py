# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Which of our methods this process uses; until one is used, vLLM is as without this package.

A process learns it in one of three ways:

    front end                           its arguments name a method of ours (`register`)
    engine core, workers, of Ray too    the configuration arrives, and in it our options (`Asked`)
    a forked process                    from the one that forked it

Only then vLLM is checked (versions, seams) and changed (`compat`). vLLM loads its plugins in every
process before it uses a configuration, but after it has unpickled it: what has arrived by then
takes effect when the plugin is registered.
"""

import functools
import logging
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig
    from vllm.engine.arg_utils import EngineArgs

logger = logging.getLogger(__name__)

NAMES = ("subspec", "hierspec")
"""The keys of `config.METHODS`, which is too slow to import for those who use none."""
KEY = "subspec"
"""Of our options in ``additional_config``."""
PROPOSER = "vllm_subspec.engine.proposer.DraftProposer"
REPAIR = "VLLM_SUBSPEC_REPAIR_VLLM"
"""Set to 1, this variable has every engine run on the vLLM that ours run on."""

_hooked = False
_registered = False
_arrived: set[str] = set()  # methods, before the plugin was registered
_workers = 0


class Asked(dict[str, Any]):
    """Our options in ``additional_config``. Whoever unpickles them uses our methods."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrive, (dict(self),)


def _arrive(options: dict[str, Any]) -> Asked:
    if _registered:
        begin(options["method"])
    else:
        _arrived.add(options["method"])
    return Asked(options)


def register() -> None:
    """Recognize our methods in the arguments of an engine, and make good what has been missed."""
    global _registered
    _registered = True
    _hook()
    if os.environ.get(REPAIR) == "1":
        from vllm_subspec.engine import compat

        compat.apply()
    while _arrived:
        begin(_arrived.pop())


def begin(method: str) -> None:
    """Make vLLM in this process ready for ``method``; again is harmless.

    Raises:
        RuntimeError: this vLLM does not fit, in one sentence.
        ValueError: this platform does not.
    """
    from vllm.platforms import current_platform

    from vllm_subspec.engine import seams, versions

    versions.check()
    seams.require(method, current_platform.device_type)
    from vllm_subspec.engine import compat, metrics  # build on what has just been checked

    compat.apply()
    metrics.install()


def worker_begins(method: str) -> None:
    """A worker of ours is made in this process, which may not have unpickled its options."""
    global _workers
    begin(method)
    _workers += 1


def worker_ends() -> None:
    """The last one takes vLLM's changes with it: what lives on here is no engine of ours."""
    global _workers
    _workers -= 1
    if not _workers and os.environ.get(REPAIR) != "1":
        from vllm_subspec.engine import compat

        compat.undo()


def _hook() -> None:
    """Wrap `EngineArgs.create_speculative_config`, once."""
    global _hooked
    try:
        from vllm.engine.arg_utils import EngineArgs

        original = EngineArgs.create_speculative_config
    except (ImportError, AttributeError) as error:
        logger.warning("This vLLM will not know the methods of vllm-subspec: %s", error)
        return
    if _hooked:
        return

    @functools.wraps(original)
    def create_speculative_config(
        self: "EngineArgs",
        target_model_config: "ModelConfig",
        target_parallel_config: "ParallelConfig",
    ) -> "SpeculativeConfig | None":
        method = _asked_for(self)
        if method is None:
            return original(self, target_model_config, target_parallel_config)
        begin(method)
        from vllm_subspec.engine.method import configure

        return configure(self, method, original, target_model_config, target_parallel_config)

    EngineArgs.create_speculative_config = create_speculative_config
    _hooked = True


def _asked_for(args: "EngineArgs") -> str | None:
    """The method of ours that the arguments name, also those that `method` has rewritten."""
    given = args.speculative_config
    if isinstance(given, str) and any(name in given for name in NAMES):
        from vllm_subspec.config import shown

        raise ValueError(
            f"--speculative-config is {shown(given)}: it must be a JSON object, such as "
            '{"method": "subspec"}'
        )
    if given is None:
        given = {}
    if not isinstance(given, dict):
        return None  # vLLM's own to refuse
    method = given.get("method", args.spec_method)
    if given.get("model") == PROPOSER and KEY in (args.additional_config or {}):
        method = args.additional_config[KEY]["method"]
    return method if isinstance(method, str) and method in NAMES else None
