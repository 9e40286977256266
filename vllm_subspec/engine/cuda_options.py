# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""What our methods need on CUDA, chosen or refused before a weight is loaded."""

from collections.abc import Sequence

from vllm.config import CUDAGraphMode, ModelConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.utils.torch_utils import is_quantized_kv_cache
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum

TREES = AttentionBackendEnum.FLASH_ATTN
"""The attention that ours is built on (`attention_cuda`)."""


def choose(args: EngineArgs, method: str, widths: Sequence[str], model: ModelConfig) -> None:
    """Fill in what the user left open.

    Args:
        widths: the options by which the engine drafts trees.
        model: the target's, made of ``args``.

    Raises ValueError, in one sentence, if the rest of it rules the method out.
    """
    _choose_graphs(args, method, model)
    if widths:
        _choose_attention(args, method, widths, model)


def _choose_graphs(args: EngineArgs, method: str, model: ModelConfig) -> None:
    """A captured graph cannot wait for a copy that was issued outside it: graphs must end there.

    The worker adds our operators to those at which vLLM cuts its graphs. But a streamed layer takes
    a hundred times longer to arrive than to launch, and capturing streams every layer a hundred
    times: unless a mode is asked for, a target that streams runs eagerly.
    """
    compilation = args.compilation_config
    if compilation.cudagraph_mode in (CUDAGraphMode.FULL, CUDAGraphMode.FULL_DECODE_ONLY):
        raise ValueError(
            f'method "{method}" needs CUDA graphs in pieces, but cudagraph_mode is '
            f"{compilation.cudagraph_mode.name}: set it to PIECEWISE or NONE"
        )
    chosen = compilation.mode is not None or compilation.cudagraph_mode is not None
    if method == "subspec" and not chosen:
        args.enforce_eager = model.enforce_eager = True
    elif compilation.cudagraph_mode in (None, CUDAGraphMode.FULL_AND_PIECEWISE):
        compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE


def _choose_attention(
    args: EngineArgs, method: str, widths: Sequence[str], model: ModelConfig
) -> None:
    remedy = "set " + " and ".join(f'"{width}"' for width in widths) + " to 1"
    given = args.attention_backend or args.attention_config.backend
    if given is None:
        args.attention_backend = TREES
    elif given not in (TREES, TREES.name):
        name = getattr(given, "name", given)
        raise ValueError(
            f'method "{method}" drafts token trees, but --attention-backend is {name}: use '
            f"{TREES.name}, or {remedy}"
        )
    if is_quantized_kv_cache(args.kv_cache_dtype):
        raise ValueError(
            f'method "{method}" drafts token trees, which read no K/V of --kv-cache-dtype '
            f"{args.kv_cache_dtype}: remove it, or {remedy}"
        )
    capability = current_platform.get_device_capability()
    reasons = FlashAttentionBackend.validate_configuration(
        head_size=model.get_head_size(),
        dtype=model.dtype,
        kv_cache_dtype=args.kv_cache_dtype,
        block_size=args.block_size,
        use_mla=False,
        has_sink=False,
        use_sparse=False,
        use_mm_prefix=False,
        use_per_head_quant_scales=False,
        device_capability=capability,
        attn_type=AttentionType.DECODER,
    )
    if reasons:
        raise ValueError(
            f'method "{method}" drafts token trees with {TREES.name}, which says of this model '
            f"({str(model.dtype).removeprefix('torch.')}, heads of {model.get_head_size()}) on a "
            f"GPU of capability {capability.major}.{capability.minor}: {', '.join(reasons)}; "
            f"change what it names, or {remedy}"
        )
