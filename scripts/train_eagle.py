# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Train a one-layer EAGLE or EAGLE-3 draft head for a small Llama checkpoint, on the CPU.

    python scripts/train_eagle.py models/pystd-6m models/pystd-6m-eagle --kind eagle --steps 1200

After the target has computed position i and token i + 1 is known, the head gets the embedding of
token i + 1 and the target's features of position i, and predicts token i + 2; its own output is
the feature of the next step.

- eagle (Li et al., "EAGLE: Speculative Sampling Requires Rethinking Feature Uncertainty",
  arXiv 2401.15077): the feature is the target's hidden state behind its final norm, the logits are
  the target's lm_head of the head's output. Loss: cross entropy against the target's distribution
  plus smooth L1 against its features, which get uniform noise on input.
- eagle3 (Li et al., "EAGLE-3: Scaling up Inference Acceleration of Large Language Models via
  Training-Time Test", arXiv 2503.01840): the features are three residual streams of the target,
  reduced by fc; norm and lm_head are the head's own. Loss: cross entropy alone.

Both are unrolled STEPS times, as they draft: a later step attends to the first step's keys up to
its base position i, which come from the target's features, and to those of its own chain after it.

The data is the Python source of the standard library and of the packages installed beside the
interpreter that runs this. The checkpoint is in the format vLLM loads, without embedding, for which
vLLM takes the target's; training.json beside it says how it was made and what was measured.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import shlex
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    repeat_kv,
)

STEPS = 3
WINDOW = 256  # Tokens, as the bundled models were trained on.
BATCH = 2  # Windows.
LEARNING_RATE = 3e-3
WARM_UP = 50  # Optimiser steps.
EAGLE_FEATURE_START = 0.3  # What fc hands through of the feature at first.
FEATURE_LOSS = 0.1  # Weight of EAGLE's smooth L1.
FEATURE_NOISE = 0.1  # EAGLE's uniform noise, to each side.
MAX_FILE_BYTES = 200_000
WINDOWS_PER_FILE = 4  # At most: large files are of few kinds.
HELD_OUT_PART = 0.02  # Of the files.
HELD_OUT_WINDOWS = 96
PROMPT, GREEDY = 64, 64  # Tokens of a greedy continuation's prompt, and of itself.
REPORT_SECONDS = 30.0


def load_target(folder: Path) -> LlamaForCausalLM:
    """The target in float32, frozen; ValueError for one that no head is made for here."""
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} does not exist: name the folder of a checkpoint")
    config = json.loads((folder / "config.json").read_text())
    if config.get("model_type") != "llama":
        raise ValueError(f"{folder}: model_type is {config.get('model_type')!r}, not llama")
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise ValueError(f"{folder}: only linears without bias are handled")
    if config["num_hidden_layers"] < 2:
        raise ValueError(f"{folder}: EAGLE-3 needs three residual streams, so two layers or more")
    target = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return target.eval().requires_grad_(False)


def aux_layer_ids(layers: int) -> list[int]:
    """The residual streams that EAGLE-3 reads: k is that behind k layers, 0 the embedding.

    vLLM's default, (2, layers // 2, layers - 3), needs more than six layers to be three of them.
    """
    return [min(1, layers - 2), (layers + 1) // 2, layers]


def run_target(target: LlamaForCausalLM, tokens: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """(what the head is given, hidden states behind the final norm), both [batch, length, ...]."""
    model = target.model
    hidden = model.embed_tokens(tokens)
    rotary = model.rotary_emb(hidden, torch.arange(tokens.shape[1])[None])
    streams = [hidden]
    for layer in model.layers:
        hidden = layer(hidden, position_embeddings=rotary)
        streams.append(hidden)
    final = model.norm(hidden)
    if kind == "eagle":
        return final, final
    return torch.cat([streams[i] for i in aux_layer_ids(len(model.layers))], dim=-1), final


def linear(weight: Tensor) -> nn.Linear:
    """A linear without bias that starts from a copy of `weight`."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    made.load_state_dict({"weight": weight})
    return made


class Head(nn.Module):
    """A draft head whose parameters are named as in published checkpoints.

    It starts from the target's first layer, which knows embeddings, and an fc that hands the
    embedding (eagle) or the last stream (eagle3) through: better after minutes than at random.
    """

    def __init__(self, target: LlamaForCausalLM, kind: str) -> None:
        super().__init__()
        config = target.config
        hidden, one = config.hidden_size, torch.eye(config.hidden_size)
        self.kind = kind
        self.rotary = LlamaRotaryEmbedding(config)
        layer = LlamaDecoderLayer(config, 0)
        layer.load_state_dict(target.model.layers[0].state_dict())
        if kind == "eagle":
            layer.input_layernorm = nn.Identity()
            self.fc = linear(torch.cat([one, EAGLE_FEATURE_START * one], dim=1))
            self.layers = nn.ModuleList([layer])
            return
        for name in ("q_proj", "k_proj", "v_proj"):
            weight = getattr(layer.self_attn, name).weight
            setattr(layer.self_attn, name, linear(torch.cat([weight, 0 * weight], dim=1)))
        layer.hidden_norm = LlamaRMSNorm(hidden, config.rms_norm_eps)
        self.fc = linear(torch.cat([0 * one, 0 * one, one], dim=1))
        self.midlayer = layer
        self.norm = LlamaRMSNorm(hidden, config.rms_norm_eps)
        self.norm.load_state_dict(target.model.norm.state_dict())
        self.lm_head = linear(target.lm_head.weight)

    def attend(self, attention: Any, x: Tensor, past: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Attention of one step for every base position; its keys and values join `past`."""
        batch, length, _ = x.shape
        query, key, value = (
            projection(x).view(batch, length, -1, attention.head_dim).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        cos, sin = self.rotary(x, torch.arange(length)[None] + len(past))
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        groups = attention.num_key_value_groups
        past.append((repeat_kv(key, groups), repeat_kv(value, groups)))
        (first_key, first_value), *chain = past
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        scores = (query @ first_key.transpose(2, 3)).masked_fill(future, -torch.inf)
        own = [(query * key).sum(-1, keepdim=True) for key, _ in chain]
        weights = (torch.cat([scores, *own], dim=-1) * attention.scaling).softmax(-1)
        mixed = weights[..., :length] @ first_value
        for step, (_, value) in enumerate(chain):
            mixed = mixed + weights[..., length + step, None] * value
        return attention.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))

    def step(self, embeds: Tensor, feature: Tensor, past: list[tuple[Tensor, Tensor]]) -> Tensor:
        """The next feature from the embedding of the token that was drafted or accepted last."""
        layer: Any = self.layers[0] if self.kind == "eagle" else self.midlayer
        if self.kind == "eagle":
            residual = x = self.fc(torch.cat([embeds, feature], dim=-1))
        else:
            residual = feature
            x = torch.cat([layer.input_layernorm(embeds), layer.hidden_norm(feature)], dim=-1)
        hidden = residual + self.attend(layer.self_attn, x, past)
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))

    def unroll(
        self, target: LlamaForCausalLM, tokens: Tensor, given: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(logits, feature) of every step, for each base position that STEPS tokens follow.

        Item s of base i stands for position i + 1 + s of the target.
        """
        bases = tokens.shape[1] - STEPS
        feature = given[:, :bases]
        if self.kind == "eagle3":
            feature = self.fc(feature)
        embeds = target.model.embed_tokens(tokens)
        past: list[tuple[Tensor, Tensor]] = []
        for step in range(1, STEPS + 1):
            feature = self.step(embeds[:, step : step + bases], feature, past)
            if self.kind == "eagle":
                yield target.lm_head(feature), feature
            else:
                yield self.lm_head(self.norm(feature)), feature


def find_corpus(seed: int) -> tuple[list[Path], str]:
    """(shuffled Python files of the standard library and installed packages, their digest).

    The digest, of names and sizes, tells whether another machine has the same files.
    """
    found: list[tuple[str, int, Path]] = []
    for scheme in ("stdlib", "purelib"):
        root = Path(sysconfig.get_path(scheme))
        for path in root.rglob("*.py"):
            relative = path.relative_to(root)
            names = {part.lower() for part in relative.parts}
            tests = names & {"test", "tests", "testing"} or path.name.startswith("test_")
            if tests or (scheme == "stdlib" and "site-packages" in names):
                continue
            size = path.stat().st_size
            if size <= MAX_FILE_BYTES:
                found.append((f"{scheme}/{relative.as_posix()}", size, path))
    found.sort()
    listing = "".join(f"{name} {size}\n" for name, size, _ in found)
    files = [path for _, _, path in found]
    random.Random(seed).shuffle(files)
    return files, hashlib.sha256(listing.encode()).hexdigest()


def windows(
    files: Sequence[Path], tokenizer: Tokenizer, per_file: int, seed: int
) -> Iterator[list[int]]:
    """Windows of WINDOW tokens, of each file some picked by chance."""
    picker = random.Random(seed)
    for path in files:
        text = path.read_text(encoding="utf-8", errors="replace")
        tokens = tokenizer.encode(text, add_special_tokens=False).ids
        starts = range(0, len(tokens) - WINDOW + 1, WINDOW)
        for start in picker.sample(starts, min(per_file, len(starts))):
            yield tokens[start : start + WINDOW]


def batches(files: Sequence[Path], tokenizer: Tokenizer, seed: int) -> Iterator[Tensor]:
    """Batches of the files' windows, without end."""
    batch: list[list[int]] = []
    while True:
        seed += 1  # Other windows of the files in the next pass.
        for window in windows(files, tokenizer, WINDOWS_PER_FILE, seed):
            batch.append(window)
            if len(batch) == BATCH:
                yield torch.tensor(batch)
                batch = []


def train(
    head: Head, target: LlamaForCausalLM, data: Iterator[Tensor], seconds: float, steps: int | None
) -> dict[str, Any]:
    """Train for `seconds`, or for `steps` if given; losses are means of the last tenth."""
    optimizer = torch.optim.AdamW(head.parameters(), LEARNING_RATE, (0.9, 0.95), weight_decay=0.0)
    started = reported = time.monotonic()
    history: list[Tensor] = []
    while True:
        elapsed = time.monotonic() - started
        progress = len(history) / steps if steps else elapsed / seconds
        if progress >= 1:
            break
        tokens = next(data)
        with torch.no_grad():
            given, final = run_target(target, tokens, head.kind)
            wanted = target.lm_head(final).softmax(-1)
            if head.kind == "eagle":
                given = given + (torch.rand_like(given) * 2 - 1) * FEATURE_NOISE
        losses, regression = [], torch.zeros(())
        for step, (logits, feature) in enumerate(head.unroll(target, tokens, given), 1):
            there = slice(step, step + logits.shape[1])
            expected = wanted[:, there].flatten(0, 1)
            losses.append(functional.cross_entropy(logits.flatten(0, 1), expected))
            if head.kind == "eagle":
                regression = regression + functional.smooth_l1_loss(feature, final[:, there])
        decay = (1 + math.cos(math.pi * progress)) / 2
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (len(history) + 1) / WARM_UP) * decay
        optimizer.zero_grad()
        entropy = torch.stack(losses)
        (entropy.mean() + FEATURE_LOSS * regression / STEPS).backward()
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        history.append(entropy.detach())
        if time.monotonic() - reported > REPORT_SECONDS:
            reported = time.monotonic()
            print(
                f"{elapsed:5.0f} s, step {len(history)}: cross entropy {entropy.mean():.3f}",
                flush=True,
            )
    last = torch.stack(history[len(history) * 9 // 10 :]).mean(0).tolist()
    return {
        "optimizer_steps": len(history),
        "tokens": len(history) * BATCH * WINDOW,
        "seconds": round(time.monotonic() - started, 1),
        "final_cross_entropy": [round(loss, 4) for loss in last],
    }


@torch.no_grad()
def evaluate(head: Head, target: LlamaForCausalLM, rows: Tensor, first: int) -> dict[str, Any]:
    """Agreement at each step, over base positions from `first` on.

    Agreement is with the target's most likely token, and of a step where all before it agreed.
    """
    right, tried = [0] * STEPS, [0] * STEPS
    for tokens in rows.split(BATCH):
        given, final = run_target(target, tokens, head.kind)
        wanted = target.lm_head(final)
        alive = torch.ones(len(tokens), tokens.shape[1] - STEPS - first, dtype=torch.bool)
        for step, (logits, _) in enumerate(head.unroll(target, tokens, given)):
            theirs = wanted[:, step + 1 : step + 1 + logits.shape[1]]
            hits = (logits.argmax(-1) == theirs.argmax(-1))[:, first:]
            tried[step] += int(alive.sum())
            alive = alive & hits
            right[step] += int(alive.sum())
    return {
        "agreement": [round(r / max(t, 1), 4) for r, t in zip(right, tried, strict=True)],
        "positions": tried[0],
    }


def continue_greedily(target: LlamaForCausalLM, prompts: Tensor) -> Tensor:
    """The prompts with GREEDY tokens of the target behind them, also past an end of text."""
    target.generation_config.eos_token_id = None
    mask = torch.ones_like(prompts)
    return target.generate(prompts, attention_mask=mask, max_new_tokens=GREEDY, do_sample=False)


def head_config(config: dict[str, Any], kind: str) -> dict[str, Any]:
    """config.json of the head: the target's with what differs."""
    changed: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM" if kind == "eagle" else "LlamaForCausalLMEagle3"],
        "num_hidden_layers": 1,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    if kind == "eagle3":
        ids = aux_layer_ids(config["num_hidden_layers"])
        changed |= {
            "draft_vocab_size": config["vocab_size"],
            "eagle_aux_hidden_state_layer_ids": ids,
            "num_aux_hidden_states": len(ids),
        }
    return config | changed


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train an EAGLE or EAGLE-3 head for a target.")
    parser.add_argument("target", type=Path, help="folder of a small Llama checkpoint")
    parser.add_argument("output", type=Path, help="folder to make for the head")
    parser.add_argument(
        "--kind", choices=("eagle", "eagle3"), required=True, help="which head to train"
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--minutes", type=float, default=8.0, help="wall-clock time to train (default: 8)"
    )
    length.add_argument(
        "--steps", type=int, help="optimiser steps to train instead: the same head every time"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the data's order, weights and noise (default: 0)"
    )
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch (default: 1)")
    return parser.parse_args()


def make_head(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train, write and measure a head; what training.json says of it."""
    kind, output = arguments.kind, arguments.output
    if not arguments.minutes > 0:
        raise ValueError(f"--minutes is {arguments.minutes}: give a time above 0")
    if arguments.steps is not None and arguments.steps < 1:
        raise ValueError(f"--steps is {arguments.steps}: give 1 or more")
    if arguments.threads < 1:
        raise ValueError(f"--threads is {arguments.threads}: give 1 or more")
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty: name a new folder")
    target = load_target(arguments.target)
    output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    tokenizer = Tokenizer.from_file(str(arguments.target / "tokenizer.json"))
    files, digest = find_corpus(arguments.seed)
    split = math.ceil(len(files) * HELD_OUT_PART)
    head = Head(target, kind)
    data = batches(files[split:], tokenizer, arguments.seed)
    figures = train(head, target, data, arguments.minutes * 60, arguments.steps)

    # What is measured is what is stored: rounded to bfloat16.
    stored = {name: weight.bfloat16().contiguous() for name, weight in head.state_dict().items()}
    head.load_state_dict(stored)
    save_file(stored, output / "model.safetensors", metadata={"format": "pt"})
    config = head_config(json.loads((arguments.target / "config.json").read_text()), kind)
    (output / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    held_out = windows(files[:split], tokenizer, 1, arguments.seed)
    text = torch.tensor(list(islice(held_out, HELD_OUT_WINDOWS)))
    # The first base of a continuation is the prompt's last position.
    greedy = continue_greedily(target, text[:, :PROMPT])
    return {
        "command": shlex.join(["python", *sys.argv]),
        "seed": arguments.seed,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "files": {"train": len(files) - split, "held_out": split, "sha256": digest},
        **figures,
        "held_out_text": evaluate(head, target, text, 0),
        "held_out_greedy": evaluate(head, target, greedy, PROMPT - 1),
    }


def main() -> int:
    arguments = parse_arguments()
    try:
        made = json.dumps(make_head(arguments), indent=2)
        (arguments.output / "training.json").write_text(made + "\n")
    except (OSError, ValueError) as error:
        print(f"train_eagle: {error}", file=sys.stderr)
        return 1
    print(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
