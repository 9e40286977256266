# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""A few waves of `make soak`: as many on a slow machine as on a fast one."""

from tests.engine.helpers import Engines
from tests.soak import Soak


def test_a_short_soak(engines: Engines) -> None:
    engines.close()
    soak = Soak(requests=192, minutes=30)
    assert soak.run() is None
    assert soak.compared == soak.requests
    assert soak.tau > 1.2
