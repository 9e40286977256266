# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""vLLM's model runners where a token tree differs from a sequence.

inputs      a node's position is its depth, its slot its index
attention   a node attends to the committed tokens and to its ancestors
sampling    every root and node is sampled from; the walk decides what is emitted
pages       the K/V of the accepted path moves to consecutive slots
"""

import functools
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.v1.outputs import DraftTokenIds, SamplerOutput
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_subspec.core.acceptance import walk_batch
from vllm_subspec.core.compaction import moves
from vllm_subspec.core.noise import SeedStream
from vllm_subspec.engine import attention
from vllm_subspec.engine.node_sampler import NodeSampler, by_node, emitted
from vllm_subspec.engine.verification import Verification

# Keeps the seeds of requests that brought none apart from vLLM's own streams.
_STREAM = 0x5B5BEC


class TreeRunner(GPUModelRunner):
    """Of a GPU; on the CPU it is put before vLLM's own runner there among the bases."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self.node_sampler = NodeSampler(vllm_config.model_config.logprobs_mode)
        self.verification: Verification
        """What the newest pass verifies."""
        self._propose: Callable[[], Any] | None = None  # the draft that is to be taken
        self._seeds: dict[str, SeedStream] = {}
        # Equal on all ranks, which see the same requests in the same order.
        self._unseeded = torch.Generator().manual_seed(vllm_config.model_config.seed ^ _STREAM)

    def seed_stream(self, request_id: str) -> SeedStream:
        """The seeds of a request's coming tokens."""
        if request_id not in self._seeds:
            generator = self.requests[request_id].generator
            if generator is None:
                seed = torch.randint(0, 2**62, (), generator=self._unseeded).item()
                generator = torch.Generator().manual_seed(int(seed))
            elif generator.device.type != "cpu":
                # Numbers drawn on a GPU depend on how many are drawn at once.
                generator = torch.Generator().manual_seed(generator.initial_seed())
            self._seeds[request_id] = SeedStream(generator)
        return self._seeds[request_id]

    def layers_of(self, names: AbstractSet[str]) -> list[Any]:
        """Those of vLLM's attention layers that have pages of their own."""
        context = self.compilation_config.static_forward_context
        paged = [name for group in self.attn_groups[0] for name in group.layer_names]
        layers = [context[name] for name in paged if name in names]
        return [layer for layer in layers if layer.kv_sharing_target_layer_name is None]

    def _setup_eagle3_aux_hidden_state_outputs(self) -> None:
        """Done for whichever model the head drafts for, when it is loaded (`draft_models`)."""

    def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: np.ndarray) -> Any:
        prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        count = self.input_batch.num_reqs
        self.verification = Verification.of(
            scheduler_output.scheduled_spec_decode_tokens,
            list(self.input_batch.req_ids),
            self.input_batch.num_computed_tokens_cpu[:count],
            num_scheduled_tokens,
        )
        for finished in self._seeds.keys() - self.requests.keys():
            del self._seeds[finished]
        queries, positions = self.verification.positions()
        if queries.size:
            # Slots were computed from the positions of a sequence, and stay so.
            where = torch.as_tensor(queries, device=self.device)
            self.positions[where] = torch.as_tensor(positions, device=self.device)
        return prepared

    def _build_attention_metadata(self, *args: Any, **kwargs: Any) -> Any:
        metadata, common = super()._build_attention_metadata(*args, **kwargs)
        if not kwargs.get("for_cudagraph_capture") and kwargs.get("logits_indices") is not None:
            trees, starts = self.verification.trees(), self.verification.starts
            attention.attach(self.attn_groups[0], metadata, trees, starts.tolist())
        return metadata, common

    def propose_draft_token_ids(
        self,
        scheduler_output: Any,
        sampled_token_ids: Any,
        sampling_metadata: Any,
        hidden_states: torch.Tensor,
        sample_hidden_states: torch.Tensor,
        aux_hidden_states: list[torch.Tensor] | None,
        *rest: Any,
    ) -> Any:
        """The tokens are known and need not wait for the next draft: it is made when the engine,
        which has sent them by then, takes it."""
        self.drafter.target_computed(self.verification, hidden_states, aux_hidden_states)
        self._propose = functools.partial(
            super().propose_draft_token_ids,
            scheduler_output,
            [list(tokens) for tokens in sampled_token_ids],  # the engine cuts its own at a stop
            sampling_metadata,
            hidden_states,
            sample_hidden_states,
            aux_hidden_states,
            *rest,
        )
        return []

    @torch.inference_mode()
    def take_draft_token_ids(self) -> DraftTokenIds | None:
        if self._propose is not None:
            self._draft_token_ids = self._propose()
            self._propose = None
        return super().take_draft_token_ids()

    def _sample(self, logits: torch.Tensor, spec_decode_metadata: Any) -> SamplerOutput:
        verification = self.verification
        metadata = by_node(
            self.input_batch.sampling_metadata,
            verification,
            [self.requests[name] for name in verification.request_ids],
            self._node_seeds(),
            self.vllm_config,
            self.device,
        )
        output = self.node_sampler(logits=logits, sampling_metadata=metadata)
        samples = output.sampled_token_ids.flatten().cpu().numpy()
        verification.walks = walk_batch([draft.tree for draft in verification.drafts], samples)
        self._advance_seeds()
        self._compact()
        return emitted(output, verification, verification.walks)

    def _node_seeds(self) -> torch.Tensor | None:
        """[m] of every root and node; None if every request is greedy."""
        if self.input_batch.all_greedy:
            return None
        verification = self.verification
        seeds = []
        for name, draft in zip(verification.request_ids, verification.drafts, strict=True):
            depths = np.append(0, draft.tree.depths)
            if name in self.input_batch.random_reqs:
                ahead = self.seed_stream(name).ahead(int(depths.max()) + 1)
                seeds.append(np.asarray(ahead)[depths])
            else:
                seeds.append(np.zeros(depths.size, np.int64))
        return torch.as_tensor(np.concatenate(seeds), device=self.device)

    def _advance_seeds(self) -> None:
        walks = self.verification.walks
        assert walks is not None
        discarded = self.discard_request_mask.np
        for row, name in enumerate(self.verification.request_ids):
            if name in self.input_batch.random_reqs and not discarded[row]:
                self.seed_stream(name).advance(int(walks.counts[row]) + 1)

    def _compact(self) -> None:
        """Nothing has been hashed or handed to another request yet: that is the next schedule's."""
        walks = self.verification.walks
        assert walks is not None
        moved = moves(walks, self.verification.roots)
        if not moved.rows.size:
            return
        table = self.input_batch.block_table[0]
        slots = moved.slots(table.get_numpy_array(), table.block_size)
        sources, destinations = (torch.as_tensor(part, device=self.device) for part in slots)
        layers = self.layers_of(self.drafter.target_layers)
        attention.move_pages(self.device, layers, sources, destinations)
