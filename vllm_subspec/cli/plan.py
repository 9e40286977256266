# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""`vllm-subspec plan MODEL`: does it fit, and how fast will it be? From config.json alone."""

import argparse
import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from vllm_subspec.cli import kubernetes
from vllm_subspec.cli.quantities import in_gib, parse_bytes, parse_rate
from vllm_subspec.config import SubspecOptions
from vllm_subspec.core.forecast import Drafted, Forecast, Machine, expected_tokens, forecast
from vllm_subspec.core.plan import (
    GATHERED,
    GIB,
    PACKED_VOCABULARIES,
    PROCESS,
    WORKSPACE,
    Budget,
    MemoryPlan,
    choose_tier,
    largest_pass,
    plan_memory,
)
from vllm_subspec.core.shapes import Linear, ModelShape
from vllm_subspec.weights.host_memory import host_memory
from vllm_subspec.weights.model_shape import read_shape

# Of a level of a tree, so that a depth of 48 yields the published 28.4 tokens a round (MT-Bench,
# Qwen2.5-7B, 4 bits, greedy).
_ACCEPTANCE = 0.975
_ITEMSIZE = 2  # bytes: vLLM serves float32 checkpoints in 16 bits, too
_GROUP = 64  # columns, below 8 bits
_RESERVED = SubspecOptions.parse({}).lookahead  # slots behind each request
_BLOCK = 128  # tokens: of the CPU, the largest of the defaults
_BAR = 60  # characters
_CPU_TOKENS = 2048  # of a pass of `vllm serve` on a CPU, for each rank
# Requests at once for each of full length that the cache holds: most are shorter, and more would
# only push each other out, which costs passes.
_REQUESTS = 4
# Options that a component depends on.
_DECISIVE = (
    *("model_name", "device_memory", "host_memory", "bits", "tensor_parallel_size"),
    *("max_model_len", "batch", "depth", "k8s"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    parser.add_argument("model", metavar="MODEL", help="folder with a config.json, or a hub name")
    parser.add_argument("--device-memory", help="what one rank may use; default: 90%% of what is")
    parser.add_argument("--host-memory", help="for streamed weights; default: what is available")
    parser.add_argument("--link", help="rate of streamed weights; default: measured")
    parser.add_argument("--device-bandwidth", help="of the device's memory; default: measured")
    parser.add_argument("--bits", type=int, default=4, choices=(2, 3, 4, 8))
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--max-model-len", type=int, help="default: 4096, or the model's own")
    parser.add_argument("--batch", type=int, default=1, help="requests of full length in the cache")
    parser.add_argument("--depth", type=int, default=48, help="most levels of a draft")
    parser.add_argument(
        "--acceptance", type=float, default=_ACCEPTANCE, help="of a drafted level (default: 0.975)"
    )
    parser.add_argument("--model-name", help="by which MODEL is served; default: MODEL")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print JSON")
    output.add_argument(
        "--k8s",
        choices=get_args(kubernetes.Target),
        help="print a Kustomize component for deploy/kustomize; nothing is measured",
    )


def run(args: argparse.Namespace) -> int:
    """Print the plan; 0, or 2 after bad input or where nothing fits (told on stderr)."""
    try:
        if args.k8s:
            print(_component(args), end="")
            return 0
        planned = make_plan(args)
    except (ValueError, OSError) as error:
        print(f"vllm-subspec plan: {error}", file=sys.stderr)
        return 2
    print(json.dumps(planned.to_json_dict(), indent=2) if args.json else planned.describe())
    return 0


@dataclass(frozen=True)
class Layout:
    """What goes where."""

    shape: ModelShape
    plan: MemoryPlan  # of one rank
    plain: MemoryPlan  # without substitutes
    source: Literal["host", "disk"]
    device_is_host: bool
    arguments: dict[str, Any]  # of the engine


@dataclass(frozen=True)
class Planned:
    """What the command found out."""

    model: str
    plan: MemoryPlan
    drafted: Drafted
    expected: Forecast
    machine: Machine
    source: str
    command: str
    notes: list[str]

    def to_json_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "memory": asdict(self.plan) | {"total_bytes": self.plan.total},
            "weight_source": self.source,
            "machine": asdict(self.machine),
            "draft": asdict(self.drafted),
            "expected": asdict(self.expected) | {"speedup": self.expected.speedup},
            "command": self.command,
            "notes": self.notes,
        }

    def describe(self) -> str:
        expected, drafted = self.expected, self.drafted
        where = "host memory" if self.source == "host" else "disk"
        return "\n".join(
            [
                self.plan.describe(),
                _bar(self.plan),
                "",
                f"streamed from {where} at {self.machine.link / 1e9:.1f} GB/s: "
                f"{expected.stream_seconds:.2f} s a pass",
                f"drafted: {drafted.steps} steps of {1000 * expected.step_seconds:.1f} ms, "
                f"{drafted.tokens:.1f} tokens a round",
                f"without speculation  {expected.plain:8.2f} tokens/s",
                f"with SubSpec         {expected.serial:8.2f} tokens/s ({expected.speedup:.1f}x); "
                f"{expected.overlapped:.2f} if drafting and streaming overlap fully",
                *(f"note: {note}" for note in self.notes),
                "",
                self.command,
            ]
        )


def make_plan(args: argparse.Namespace) -> Planned:
    """Raises ValueError, in one sentence, for bad input and for what cannot fit."""
    given_link = parse_rate(args.link) if args.link else None
    given_device = parse_rate(args.device_bandwidth) if args.device_bandwidth else None
    layout = lay_out(args)
    shape, plan = layout.shape, layout.plan
    machine = _machine(given_link, given_device, layout.source, layout.device_is_host)
    drafted, expected = _best(plan, layout.plain, shape, args, machine)
    words = ["vllm", "serve", _served(args), *kubernetes.options(layout.arguments)]
    notes = [*_notes(shape, plan)]
    return Planned(
        args.model, plan, drafted, expected, machine, layout.source, shlex.join(words), notes
    )


def lay_out(args: argparse.Namespace) -> Layout:
    """Raises ValueError as `make_plan` does. Measures nothing but, once, this CPU's kernels."""
    _check(args)
    given_memory = parse_bytes(args.device_memory) if args.device_memory else None
    given_host = parse_bytes(args.host_memory) if args.host_memory else None
    shape, config = read_shape(args.model)
    longest = int(getattr(config, "max_position_embeddings", 0) or 4096)
    context = args.max_model_len or min(4096, longest)
    if context > longest:
        raise ValueError(f"--max-model-len is {context}, but the model reads {longest} tokens")
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{args.model} is already quantized: plan the full-precision model")
    # Without a GPU here and without a size the device is this machine's own memory.
    here = given_memory is None and not torch.cuda.is_available()
    memory = given_memory or _device_memory() // (args.tensor_parallel_size if here else 1)
    device_is_host = args.k8s == "cpu" if args.k8s else here
    workspace = WORKSPACE
    if device_is_host:
        workspace = _cpu_workspace(config, args.tensor_parallel_size, _REQUESTS * args.batch)
        copies = PACKED_VOCABULARIES if args.k8s else _packed_vocabularies(config)
        shape = replace(shape, other=shape.other + copies * shape.head)
    plan, plain = _plans(shape, args, context, memory, workspace)
    stored = plan.store_bytes * args.tensor_parallel_size
    # A pod asks for the host memory that it needs.
    host = given_host or (2 * stored if args.k8s else host_memory().available)
    source = choose_tier(stored, host, device_is_host)
    arguments = _arguments(args, context, source, plan)
    return Layout(shape, plan, plain, source, device_is_host, arguments)


def _packed_vocabularies(config: Any) -> int:
    """Of this CPU: what an engine here does."""
    from vllm_subspec.weights.resident_linear import replaces_vllm  # imports vLLM

    dtype = getattr(config, "dtype", None)
    full = dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
    return 0 if replaces_vllm(full) else PACKED_VOCABULARIES


def _served(args: argparse.Namespace) -> str:
    return str(args.model_name or args.model)


def _component(args: argparse.Namespace) -> str:
    if not args.device_memory:
        raise ValueError("--k8s plans for another machine: give its --device-memory")
    layout = lay_out(args)
    words = ["vllm-subspec", "plan", args.model]
    for name in _DECISIVE:
        if (value := getattr(args, name)) is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return kubernetes.component(
        args.k8s,
        layout.plan,
        model=_served(args),
        arguments=layout.arguments,
        source=layout.source,
        command=shlex.join(words),
    )


def _notes(shape: ModelShape, plan: MemoryPlan) -> Iterator[str]:
    if len({sum(part.size for part in layer) for layer in shape.layers}) > 1:
        yield "decoder layers of several sizes are not served: the engine will refuse this model"
    if not plan.streamed:
        yield "nothing has to be streamed: the model fits without"
    if not plan.substituted:
        yield "no substitute fits beside the model: serve it without speculation"


def _check(args: argparse.Namespace) -> None:
    for name in ("tensor_parallel_size", "max_model_len", "batch", "depth"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; allowed: 1 or more")
    if not 0 < args.acceptance < 1:
        raise ValueError(f"--acceptance is {args.acceptance}; allowed: between 0 and 1")


def _cpu_workspace(config: Any, ranks: int, requests: int) -> int:
    """What the engine counts there (`engine.residency`) for so many requests at once."""
    hidden = config.hidden_size
    batch = largest_pass(
        ranks * _CPU_TOKENS,
        requests * (1 + SubspecOptions.parse({}).num_speculative_tokens),
        hidden=hidden,
        widest=max(getattr(config, "intermediate_size", 0) or 0, hidden),
        vocabulary=config.vocab_size,
        itemsize=_ITEMSIZE,
    )
    return PROCESS + GATHERED + batch


def _plans(
    shape: ModelShape, args: argparse.Namespace, context: int, memory: int, workspace: int
) -> tuple[MemoryPlan, MemoryPlan]:
    """With substitutes, and without any."""

    def planned(bits: int, context: int) -> tuple[MemoryPlan, MemoryPlan]:
        def substitute(linear: Linear) -> int:
            # The engine's own groups; a 16-bit scale and zero point for each.
            groups = linear.size // _GROUP if bits < 8 else linear.rows * linear.count
            return linear.size * (8 if bits > 4 else 4) // 8 + 4 * groups  # no kernel packs closer

        sizes = shape.sizes(_ITEMSIZE, args.tensor_parallel_size, substitute, workspace)
        # And a block that vLLM never gives out.
        budget = Budget(memory, args.batch * (context + _RESERVED) + _BLOCK)
        alone = replace(sizes, substitutes=[0] * len(sizes.layers))
        return plan_memory(sizes, budget), plan_memory(alone, budget)

    try:
        return planned(args.bits, context)
    except ValueError as error:
        # The nearest setting that fits: fewer bits first, then shorter texts.
        halves = (context >> n for n in range(1, context.bit_length()))
        nearest = [("--bits 4", 4, context)] if args.bits > 4 else []
        nearest += [(f"--max-model-len {half}", args.bits, half) for half in halves if half >= 256]
        for setting, bits, shorter in nearest:
            with suppress(ValueError):
                planned(bits, shorter)
                remedy = f"; {setting} fits"
                break
        else:
            remedy = "; no setting of --bits or --max-model-len fits"
        raise ValueError(f"{error}{remedy}") from None


def _best(
    plan: MemoryPlan,
    plain: MemoryPlan,
    shape: ModelShape,
    args: argparse.Namespace,
    machine: Machine,
) -> tuple[Drafted, Forecast]:
    """The depth that the serial bound is best at."""
    head, active = _ITEMSIZE * shape.head // args.tensor_parallel_size, shape.active_share
    found = []
    for steps in range(1, args.depth + 1):
        drafted = Drafted(steps, expected_tokens(args.acceptance, steps))
        found.append((drafted, forecast(plan, plain, head, drafted, machine, active)))
    return max(found, key=lambda pair: pair[1].serial)


def _arguments(
    args: argparse.Namespace, context: int, source: str, plan: MemoryPlan
) -> dict[str, Any]:
    """What serves this plan, whatever else is on the device."""
    options: dict[str, Any] = {"method": "subspec", "weight_source": source}
    if args.bits != SubspecOptions.model_fields["bits"].default:
        options["bits"] = args.bits
    if args.depth != SubspecOptions.model_fields["depth"].default:
        options["depth"] = args.depth
    if plan.streamed:
        layers = len(plan.resident) + 0.5 if plan.resident else 0  # half a layer for rounding
        layer = plan.store_bytes / len(plan.streamed)
        options["resident_weights_gib"] = round(layers * layer / GIB, 3)
        options["ring_layers"] = max(plan.ring_layers, 2)
    arguments: dict[str, Any] = {"max_model_len": context, "max_num_seqs": _REQUESTS * args.batch}
    if args.tensor_parallel_size > 1:
        arguments["tensor_parallel_size"] = args.tensor_parallel_size
    if plan.substituted:
        arguments["speculative_config"] = options
    return arguments | {"kv_cache_memory_bytes": plan.kv_bytes}


def _device_memory() -> int:
    if torch.cuda.is_available():
        return int(0.9 * torch.cuda.get_device_properties(0).total_memory)
    return int(0.9 * host_memory().total)


def _machine(
    link: float | None, device: float | None, source: str, device_is_host: bool
) -> Machine:
    """The given rates, bytes/s; those that are None are measured.

    Raises:
        ValueError: the device is not here.
    """
    from vllm_subspec.bench.bandwidth import direct_read_rate, memory_rates

    copied = link is None and source == "host"
    if (copied or device is None) and not (device_is_host or torch.cuda.is_available()):
        missing = "--link" if copied else "--device-bandwidth"
        raise ValueError(f"no GPU is here to measure {missing}: give it")
    rates = memory_rates() if copied or device is None else {}
    if link is None:
        link = rates["pinned host to device"] if copied else direct_read_rate(Path.cwd())[0]
    if device is None:
        where = "host memory" if device_is_host else "device memory"
        device = rates[f"{where}, read + write"]
    return Machine(link, device)


def _bar(plan: MemoryPlan) -> str:
    parts = {
        "R": plan.resident_bytes,
        "s": plan.substitute_bytes,
        "r": plan.ring_bytes,
        "k": plan.kv_bytes,
        "o": plan.other_bytes,
        "w": plan.workspace_bytes,
    }
    drawn = "".join(sign * round(_BAR * size / plan.device_bytes) for sign, size in parts.items())
    legend = "R resident, s substitutes, r ring, k KV cache, o other weights, w workspace"
    return f"[{drawn[:_BAR]:.<{_BAR}}] of {in_gib(plan.device_bytes)}\n {legend}"
