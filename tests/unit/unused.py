# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""What the plugin does to a process that does not ask for our methods.

    python -m tests.unit.unused {cpu,cuda} {start,footprint}

prints a line of JSON. CUDA is faked.

start       the process has imported what `vllm serve` imports: "seconds" that `register` takes, and
            the modules that it imports
footprint   the process has imported all that our methods build on as well: names of "changed"
            attributes of torch and vLLM once the plugin is registered, once our method is used
            ("used") by those that `compat` has "replaced", and once that is over ("over"); the
            modules "imported" in the meantime
"""

import contextlib
import importlib
import json
import logging
import os
import sys
import time
from types import ModuleType
from typing import Any

Footprint = dict[tuple[str, str], Any]
"""By owner and name, every attribute of vLLM's and torch's modules and of their classes."""


def footprint() -> Footprint:
    found: Footprint = {}
    for module in list(sys.modules.values()):
        name = getattr(module, "__name__", None)
        if not isinstance(name, str) or name.split(".")[0] not in ("torch", "vllm"):
            continue
        for attribute, value in list(vars(module).items()):
            found[name, attribute] = value
            if isinstance(value, type) and value.__module__ == name:
                owner = f"{name}.{value.__qualname__}"
                found |= {(owner, inner): of for inner, of in vars(value).items()}
    found |= {("os.environ", name): value for name, value in os.environ.items()}
    found["logging", "handlers"] = tuple(logging.getLogger("vllm").handlers)
    return found


def changes(before: Footprint, after: Footprint) -> list[str]:
    """Names of what has another value, of modules and classes that were there before.

    What Python keeps for later does not count, nor does a package's new module.
    """
    owners = {owner for owner, _ in before}
    found = []
    for owner, name in before.keys() | after.keys():
        was, now = before.get((owner, name)), after.get((owner, name))
        same = was is now or (owner == "os.environ" and was == now)
        if owner in owners and not (same or name.startswith("__") or isinstance(now, ModuleType)):
            found.append(f"{owner}.{name}")
    return sorted(found)


def named(owner: Any, name: str) -> str:
    module = owner.__module__ + "." if isinstance(owner, type) else ""
    return f"{module}{getattr(owner, '__qualname__', owner.__name__)}.{name}"


def import_what_we_build_on(platform: str) -> None:
    from vllm_subspec.engine import seams

    for method in ("subspec", "hierspec"):
        for table in seams._tables(method, platform):
            for seam in table:
                with contextlib.suppress(ImportError):  # of the CUDA wheel alone
                    importlib.import_module(seam.partition(":")[0])


def start() -> dict[str, Any]:
    before = set(sys.modules)
    began = time.perf_counter()
    from vllm_subspec.plugin import register

    register()
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "imported": sorted(set(sys.modules) - before)}


def footprints(platform: str) -> dict[str, Any]:
    import_what_we_build_on(platform)
    before = footprint()
    modules = set(sys.modules)
    from vllm_subspec.plugin import register

    register()
    seen = {"changed": changes(before, footprint())}
    from vllm_subspec.engine import compat, in_use

    in_use.begin("subspec")
    importlib.import_module(f"vllm_subspec.engine.worker_{platform}")
    seen["used"] = changes(before, footprint())
    seen["replaced"] = sorted(named(owner, name) for owner, name in compat._replaced)
    compat.undo()
    seen["over"] = changes(before, footprint())
    seen["imported"] = sorted(set(sys.modules) - modules)
    return seen


if __name__ == "__main__":
    _, where, what = sys.argv
    if where == "cuda":
        from tests.unit import faked_cuda

        faked_cuda.install()
    import vllm.entrypoints.cli.main
    import vllm.entrypoints.llm
    import vllm.entrypoints.openai.api_server  # noqa: F401

    print(json.dumps(start() if what == "start" else footprints(where)))
