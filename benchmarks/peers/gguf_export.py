# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""A Llama checkpoint in bfloat16 as the file that llama.cpp maps: the same weights, bit by bit.

Without a tokenizer, as prompts are token ids. llama.cpp rotates neighbouring dimensions of a head
where Hugging Face rotates its two halves, so the rows of the query and key projections are
reordered; norms are float32 there.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
Array = np.ndarray[Any, Any]


def gguf_name(name: str) -> str:
    """llama.cpp's name: ``model.layers.3.mlp.up_proj.weight`` is ``blk.3.ffn_up.weight``."""
    stem = name.removesuffix(".weight")
    if not stem.startswith("model.layers."):
        return f"{NAMES[stem]}.weight"
    layer, part = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{NAMES[part]}.weight"


def interleave_halves(rows: Array, heads: int) -> Array:
    """Rows i and i + half of each head become neighbours; ``rows`` is [heads * size, columns]."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, rows.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows.shape))


def read_bfloat16(checkpoint: Path) -> Iterator[tuple[str, Array]]:
    """Every tensor of a safetensors checkpoint as the 16-bit patterns on disk, mapped."""
    for path in sorted(checkpoint.glob("*.safetensors")):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        for name, tensor in header.items():
            if name == "__metadata__":
                continue
            assert tensor["dtype"] == "BF16", f"{name} is {tensor['dtype']}, not BF16"
            offset = 8 + size + tensor["data_offsets"][0]
            yield name, np.memmap(path, np.uint16, "r", offset, tuple(tensor["shape"]))


def export(checkpoint: Path, target: Path) -> None:
    """Write ``target`` atomically."""
    from gguf import GGMLQuantizationType, GGUFWriter

    config = json.loads((checkpoint / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    writer = GGUFWriter(partial, "llama")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_tokenizer_model("none")
    for name, bits in read_bfloat16(checkpoint):
        if bits.ndim == 1:
            writer.add_tensor(gguf_name(name), (bits.astype(np.uint32) << 16).view(np.float32))
            continue
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            bits = interleave_halves(bits, heads if name.endswith("q_proj.weight") else kv_heads)
        writer.add_tensor(gguf_name(name), bits, raw_dtype=GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(target)
