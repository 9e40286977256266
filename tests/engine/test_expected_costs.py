# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""An engine that has just started knows what its first round will cost."""

from tests.engine.helpers import CHAIN, Engines, generate, greedy, source_prompts, worker_of


def test_costs_are_expected_before_the_first_round(engines: Engines) -> None:
    llm = engines.get({**CHAIN, "pruning": "dynamic", "ring_layers": 3})
    proposer, ring = worker_of(llm).proposer, worker_of(llm).loading.ring
    expected, costs = proposer.expected, proposer.drafter.growth.costs
    assert costs.rounds == 0
    assert 0 < expected.step[1] < 1
    assert 0 < expected.verify[1] <= expected.verify[32] * 1.5
    assert costs.best_rate(1) > 0
    reads = ring.transfer.loads
    slowest = max(read.ended - read.began for read in reads) * ring.blocks
    assert expected.verify[1] < 10 * max(slowest, 0.1)
    generate(llm, source_prompts(1, 20, 40), [greedy(24)])
    assert costs.rounds > 0
