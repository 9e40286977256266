# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""A few waves of `make soak`: as many on a slow machine as on a fast one."""

import pytest

from tests.engine.helpers import Engines
from tests.soak import Apart, Soak


def test_a_short_soak(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    engines.close()
    soak = Soak(requests=192, minutes=30)
    compare, seen = soak.compare, list[Apart]()
    monkeypatch.setattr(
        soak, "compare", lambda *apart: (seen.append(Apart(*apart)), compare(*apart))
    )
    assert soak.run() is None
    assert soak.compared == soak.requests
    assert soak.tau > 1.2

    # What no rounding explains is seen.
    apart = next(a for a in seen if a.plain[1] and len(a.plain[0]) > 2)
    first, second, *rest = apart.plain[0]
    soak.apart = [apart._replace(drafted=((first, second ^ 1, *rest), True))]
    assert (soak._different() or "").startswith("DIFFERENT")
