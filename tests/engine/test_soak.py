# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""A few waves of `make soak`: as many on a slow machine as on a fast one."""

from tests.engine.helpers import Engines
from tests.soak import Apart, Asked, Got, Soak


class Remembering(Soak):
    """Knows a whole answer of the plain engine."""

    whole: Apart

    def compare(self, request: Asked, plain: Got, drafted: Got, way: str = "") -> None:
        super().compare(request, plain, drafted, way)
        if plain[1] and len(plain[0]) > 2:
            self.whole = Apart(request, plain, drafted, way)


def test_a_short_soak(engines: Engines) -> None:
    engines.close()
    soak = Remembering(requests=192, minutes=30)
    assert soak.run() is None
    assert soak.compared == soak.requests
    assert soak.tau > 1.2

    # What no rounding explains is seen.
    first, second, *rest = soak.whole.plain[0]
    soak.apart = [soak.whole._replace(drafted=((first, second ^ 1, *rest), True))]
    assert (soak._different() or "").startswith("DIFFERENT")
