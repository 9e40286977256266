# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Real vLLM engines for the tests: in process, on the small real language model of this repository.

vLLM keeps process-wide state (distributed groups, the offloader), so one engine lives at a time.
The plugin is found through its entry point, as it is by a user.
"""

import os
from pathlib import Path

# Before vLLM is imported anywhere.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
# Kept between runs: vLLM inspects each model class in a process of its own and remembers it here.
os.environ["VLLM_CACHE_ROOT"] = str(Path(__file__).resolve().parents[2] / "build" / "test-cache")

import signal
from collections.abc import Iterator
from types import FrameType

import pytest
from vllm.platforms import current_platform

from tests.engine.helpers import Engines

FIRST = ("test_two_ranks.py", "test_ray.py")
"""Files of few and long tests: at the end one would run with nothing left to run beside it."""
LONGEST_SECONDS = 900
"""No test takes as long, its fixtures included, unless the engine hangs."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Iterator[None]:
    """Ends a test whose engine hangs."""

    def expired(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"the test did not end within {LONGEST_SECONDS} s")

    previous = signal.signal(signal.SIGALRM, expired)
    signal.alarm(LONGEST_SECONDS)
    try:
        return (yield)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    """All engines and what they answered; see `Engines`."""
    made = Engines(tmp_path_factory.mktemp("store"))
    yield made
    made.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    elsewhere = pytest.mark.skipif(
        not current_platform.is_cpu(),
        reason="needs vLLM's CPU backend: token trees in float32, and its operators",
    )
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.engine)
            item.add_marker(elsewhere)
    items.sort(key=lambda item: item.path.name not in FIRST)
