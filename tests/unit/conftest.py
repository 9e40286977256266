# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def messages_reach_caplog() -> Iterator[None]:
    """Also after a test that has registered the plugin, which logs as vLLM does."""
    logger = logging.getLogger("vllm_subspec")
    before, logger.propagate = logger.propagate, True
    yield
    logger.propagate = before
