# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""A worker of somebody else's, joined with ours; what our engine leaves behind in its process."""

from tests.engine.helpers import ROUGH, Engines, generate, greedy, source_prompts, worker_of
from tests.unit.test_harmless import WORKER
from vllm_subspec.engine import compat

PROMPTS = source_prompts(4, shortest=10, longest=90)
PARAMS = [greedy(24)] * len(PROMPTS)


def test_a_joined_worker_serves_and_leaves_vllm_as_it_was(engines: Engines) -> None:
    reference = engines.reference(PROMPTS, PARAMS)
    engines.close()
    assert not compat._replaced
    llm = engines.get(ROUGH, worker_cls=WORKER)
    assert compat._replaced
    assert llm.collective_rpc("colours") == ["blue"]
    assert generate(llm, PROMPTS, PARAMS) == reference
    assert worker_of(llm).streaming_stats()["passes"] > 5
    llm.llm_engine.engine_core.shutdown()
    assert not compat._replaced
    engines.close()  # says it twice
    assert generate(engines.get(None), PROMPTS, PARAMS) == reference
