# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Engines configured on faked GPUs, in a process of its own.

    python -m tests.unit.configured_on_cuda < CASES

Cases are JSON: a list of [capability, arguments of the engine]. Prints for each, in one line of
JSON, the error, or what the configuration says.
"""

import json
import sys
from pathlib import Path
from typing import Any

from tests.unit import faked_cuda

MODEL = Path(__file__).parents[2] / "models" / "pystd-6m"


def outcome(capability: tuple[int, int], arguments: dict[str, Any]) -> Any:
    faked_cuda.set_capability(capability)
    from vllm.engine.arg_utils import EngineArgs

    try:
        config = EngineArgs(
            **{"model": str(MODEL), "max_model_len": 128, **arguments}
        ).create_engine_config()
    except ValueError as error:
        return str(error)
    backend = config.attention_config.backend
    return {
        "eager": config.model_config.enforce_eager,
        "mode": config.compilation_config.mode.name,
        "graphs": config.compilation_config.cudagraph_mode.name,
        "backend": None if backend is None else backend.name,
        "worker": config.parallel_config.worker_cls,
    }


if __name__ == "__main__":
    faked_cuda.install()
    from vllm_subspec import plugin

    plugin.register()
    print(json.dumps([outcome(tuple(case[0]), case[1]) for case in json.load(sys.stdin)]))
