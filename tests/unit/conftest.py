# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def messages_reach_caplog() -> Iterator[None]:
    """Also after a test that has registered the plugin: it logs what vLLM logs, as vLLM does."""
    logger = logging.getLogger("vllm_subspec")
    before = logger.propagate, logger.level
    logger.propagate = True
    logger.setLevel(logging.NOTSET)
    yield
    logger.propagate = before[0]
    logger.setLevel(before[1])
