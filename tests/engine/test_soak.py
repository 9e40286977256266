# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""A short soak in every run of the tests: answers, pages, open files. `make soak` is the long one,
which also sees memory grow."""

from tests.engine.helpers import Engines
from tests.soak import Soak


def test_a_short_soak(engines: Engines) -> None:
    engines.close()
    soak = Soak(requests=96, wave=16)
    assert soak.run() is None
    assert soak.compared == 96
    assert soak.tau > 1
