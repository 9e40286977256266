# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""A short soak in every run of the tests: answers, pages, open files. `make soak` is the long one,
which also sees memory grow."""

from tests.engine.helpers import Engines
from tests.soak import Soak


def test_a_short_soak(engines: Engines) -> None:
    engines.close()
    soak = Soak(minutes=0.3, wave=16, repeat=True)
    assert soak.run() is None
    assert soak.compared > 3 * soak.wave
    assert soak.tau > 1
