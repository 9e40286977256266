# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Entry point of ``vllm-subspec``: finds the sub-command and imports only that one."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from vllm_subspec import __version__

COMMANDS = {
    "plan": "tell from a model's configuration what goes where and how fast it will be",
    "bench": "measure the ways of drafting beside each other: JSON, an HTML page, a trace",
    "quantize": "write a model's low-bit substitutes as a compressed-tensors checkpoint",
    "doctor": "check versions, seams, device, memory and disk of this machine",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one sub-command and returns its exit status; ``argv`` defaults to the command line."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="vllm-subspec",
        description="Tools for lossless speculative decoding with streamed weights in vLLM.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if argv[:1] == [name]:  # importing vLLM takes seconds, which --help need not wait for
            module = importlib.import_module(f"vllm_subspec.cli.{name}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    return int(args.run(args))
