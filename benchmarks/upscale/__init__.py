# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Make a checkpoint of any size that computes the same function as a small one.

    python -m benchmarks.upscale models/pystd-6m OUT --gib 1.5
    python -m benchmarks.upscale models/pystd-6m OUT --like tests/unit/configs/qwen2.5-7b
    python -m benchmarks.upscale models/pystd-6m OUT --check

Net2Net (Chen, Goodfellow, Shlens, "Net2Net: Accelerating Learning via Knowledge Transfer",
ICLR 2016), for decoders with RMSNorm, rotary grouped-query attention and a gated MLP:

- wider: hidden state, heads and MLP are tiled. A linear W [N, K] whose outputs are tiled `outputs`
  times and whose inputs `inputs` times becomes [outputs N, inputs K], each of its blocks W / inputs
  plus noise whose sum over the input copies is zero. On a tiled input the noise cancels, so the
  output is the tiled output of W; a quantised copy does not see it cancel, which keeps quantisation
  error as large as in a model whose weights are all different. The head size, and so rotary
  embedding, softmax scale and norms of single heads, stay; query head c * heads + h reads KV head
  c * kv_heads + h // group, so tiling keeps the grouping. Biases are tiled as they are.
- noise: it widens the range that 4 bits must cover by sqrt(1 + noise**2), and the sum over `inputs`
  copies averages the error out by sqrt(inputs). So sqrt(inputs - 1) of noise, 1 at width 2 and 2.6
  at width 8, leaves the error of a linear what it is in the source; a whole model agrees with its
  4-bit copy somewhat better than the source does, as its layers average over copies too. Much more
  noise makes rounding differences between copies grow. Measured: results/upscale.json.
- deeper: added layers have o_proj and down_proj of zero-sum noise alone, so what they add to the
  residual stream is zero. That noise is small (ADDED_NOISE): at full size each added layer would
  multiply the rounding differences between copies, and ten of them drown the function. Its relative
  precision, which is what quantisation and compression see, does not depend on its size.
  Beyond MAX_DEPTH_FACTOR it falls with the depth.
- lm_head is untied: tiled embedding / width.
- another family: Llama becomes Qwen2 with biases of zero, and Qwen2 becomes Llama with attention
  biases. Nothing becomes Qwen3, whose queries and keys lose their size.

A model with random weights of this size would accept drafts at a rate that says nothing; this one
continues text as its source does. Tensors are made and written in parts, so that memory does not
grow with the checkpoint.

The rooms: families (what a checkpoint consists of), shape (how large it becomes), tiling (the
arithmetic), shards (safetensors as a stream), checkpoint (from a recipe to a folder), check (is it
the same function?), figures (what is measured and committed).
"""

from benchmarks.upscale.checkpoint import upscale
from benchmarks.upscale.families import load_config
from benchmarks.upscale.shape import Recipe, pick_shape, shaped_like

__all__ = ["Recipe", "load_config", "pick_shape", "shaped_like", "upscale"]
