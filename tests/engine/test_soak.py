# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""`make soak` for half a minute, so that it is known to run."""

from tests.engine.helpers import Engines
from tests.soak import Soak


def test_a_short_soak(engines: Engines) -> None:
    engines.close()
    soak = Soak(minutes=0.5)
    assert soak.run() is None
    assert soak.compared >= 4 * soak.wave
    assert soak.tau > 1.2
