# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""`vllm-subspec bench MODEL`: the ways of drafting beside each other, and beside none.

Writes a JSON and a page of HTML that needs nothing else; the trace opens in ui.perfetto.dev.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vllm_subspec.bench.prompts import load
from vllm_subspec.bench.scenario import USUAL, WAYS, Scenario
from vllm_subspec.config import METHODS, SubspecOptions, shown
from vllm_subspec.weights.model_shape import read_config
from vllm_subspec.weights.quantized_weight import SUPPORTED_BITS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`. The first value of a list is the standard."""
    parser.add_argument("model", metavar="MODEL", help="model folder, or its name on the hub")
    parser.add_argument("--out", type=Path, default=Path("bench.json"), help="JSON to write")
    parser.add_argument("--html", type=Path, help="page to write (default: beside the JSON)")
    parser.add_argument("--trace", type=Path, help="Chrome or Perfetto trace of rounds to write")
    parser.add_argument(
        "--prompts", default="chat", help='"chat", "python" or a file with a {"prompt": ...} a line'
    )
    parser.add_argument("--requests", type=int, default=4, help="answers of each setting")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer")
    parser.add_argument(
        "--plain-tokens", type=int, default=12, help="of an answer without speculation"
    )
    parser.add_argument("--ways", nargs="+", help=f"default: {_list(USUAL[SubspecOptions.METHOD])}")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="requests at once")
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0])
    parser.add_argument("--depth", type=int, nargs="+", help="of the drafts")
    parser.add_argument("--bits", type=int, nargs="+", help="of the substitutes")
    parser.add_argument(
        "--speculative-config",
        type=_mapping,
        default={},
        metavar="JSON",
        help='as for vLLM; default {"method": "subspec"}',
    )
    parser.add_argument(
        "--engine",
        type=_mapping,
        default={},
        metavar="JSON",
        help="further arguments of vllm.LLM, such as max_model_len",
    )


def run(args: argparse.Namespace) -> int:
    """Carry the command out; 2 after bad input (told on stderr), 1 if an engine failed."""
    page = args.html or args.out.with_suffix(".html")
    try:
        scenario = _scenario(args)
        for path in (args.out, page, args.trace):
            _check_writable(path)
        if find_spec("matplotlib") is None:
            raise ValueError('the page\'s plots need matplotlib: pip install "vllm-subspec[bench]"')
    except (ValueError, OSError) as error:
        print(f"vllm-subspec bench: {error}", file=sys.stderr)
        return 2

    from tqdm import tqdm

    from vllm_subspec.bench import environment, report
    from vllm_subspec.bench.engine_process import EngineError
    from vllm_subspec.bench.measure import measure, steps
    from vllm_subspec.bench.trace import trace

    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    with tqdm(total=steps(scenario), desc="benchmark", unit="batch") as bar:

        def progress(line: str) -> None:
            bar.set_postfix_str(line)
            bar.update()

        try:
            measured = measure(scenario, progress)
        except EngineError as error:
            print(f"vllm-subspec bench: {error}", file=sys.stderr)
            return 1
    result = {"environment": environment.describe(), **measured}
    environment.write(args.out, result)
    page.write_text(report.render(result), "utf-8")
    if args.trace is not None:
        args.trace.write_text(json.dumps(trace(result)))
    _print(result)
    print(f"wrote {args.out} and {page}" + (f" and {args.trace}" if args.trace else ""))
    return 0


def _scenario(args: argparse.Namespace) -> Scenario:
    method = args.speculative_config.get("method", SubspecOptions.METHOD)
    if not isinstance(method, str) or method not in METHODS:
        told = f"--speculative-config method is {shown(method)}"
        raise ValueError(f"{told}; allowed: {_list(METHODS)}")
    if method != SubspecOptions.METHOD and (args.bits or args.depth):
        raise ValueError(f'--bits and --depth are for method "subspec", not for "{method}"')
    options = {k: v for k, v in args.speculative_config.items() if k != "method"}
    ways = tuple(args.ways or USUAL[method])
    for way in ways:
        if way not in WAYS[method]:
            raise ValueError(f"--ways {way}; allowed with method {method}: {_list(WAYS[method])}")
    for name in ("requests", "tokens", "plain_tokens", "batch", "depth"):
        given = getattr(args, name)
        if any(value < 1 for value in (given if isinstance(given, list) else [given or 1])):
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
    if min(args.tokens, args.plain_tokens) < 2:
        raise ValueError(
            "--tokens and --plain-tokens must be at least 2: speed counts from the first"
        )
    if any(not 0 <= value < 100 for value in args.temperature):
        raise ValueError("--temperature must be from 0 to 100")
    if any(bits not in SUPPORTED_BITS for bits in args.bits or []):
        raise ValueError(f"--bits; allowed: {_list(SUPPORTED_BITS)}")
    scenario = Scenario(
        model=args.model,
        options={"method": method, **options},
        engine={"max_num_seqs": max(args.batch), **args.engine},
        prompts=tuple(load(args.prompts)),
        requests=args.requests,
        tokens=args.tokens,
        plain_tokens=args.plain_tokens,
        ways=ways,
        batches=tuple(dict.fromkeys(args.batch)),
        temperatures=tuple(dict.fromkeys(args.temperature)),
        depths=tuple(dict.fromkeys(args.depth or [None])),
        bits=tuple(dict.fromkeys(args.bits or [None])),
    )
    for bits in scenario.bits:
        METHODS[method].parse(
            {k: v for k, v in scenario.options_for(bits).items() if k != "method"}
        )
    read_config(args.model)
    return scenario


def _check_writable(path: Path | None) -> None:
    if path is None:
        return
    folder = path.resolve().parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"{path} cannot be written")


def _mapping(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"a JSON object is wanted, not {text}")
    return found


def _list(values: Any) -> str:
    return ", ".join(str(value) for value in values)


def _print(result: Mapping[str, Any]) -> None:
    """The cells as a table, and the rates of the kernels that computed."""
    for cell in result["cells"]:
        told = {k: cell[k] for k in ("bits", "batch", "temperature", "depth")}
        print(", ".join(f"{name} {value:g}" for name, value in told.items() if value is not None))
        for name, way in cell["ways"].items():
            line = f"  {name:<10}{way['tokens_per_second']:8.2f} tokens/s"
            if "speedup" in way:
                line += f"{way['speedup']:7.1f}x   tau {way['tau']:.1f}"
            if "serial_bound" in way:
                line += f"   bounds {way['serial_bound']:.1f} / {way['overlapped_bound']:.1f}"
            print(line)
    kernels = {what: rows for e in result.get("engines", ()) for what, rows in e["kernels"].items()}
    for what, by_tokens in kernels.items():
        shares = ", ".join(
            f"{tokens}: {row['gb_per_s']:.1f} GB/s ({row['share_of_reading']:.0%} of memory, "
            f"{row['share_of_float32_rate']:.0%} of float32)"
            for tokens, row in by_tokens.items()
        )
        print(f"{what}, by tokens: {shares}")
