# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Answers a file of prompts with Ray Data, and goes on where it was stopped.

    python examples/ray_batch.py prompts.jsonl answers --model MODEL

PROMPTS is a JSON Lines or Parquet file, or a folder of them, with a string ``prompt`` and a unique
``id`` in every row. ANSWERS becomes a folder of Parquet files with ``id``, ``prompt`` and
``answer``. Run the same command again after any interruption: whatever is answered stays,
what was half written is removed, and each remaining prompt is answered once. So prompts may also be
added later.

One run at a time: a lock in ANSWERS refuses a second one. Mounted object storage may know no locks:
there a run says so and goes on, and seeing to it is left to you.

A prompt that leaves no room for an answer in the engine's `max_model_len` ends the run, and every
later one that comes to it: leave it out, or give `--engine` a larger one.

It joins the Ray cluster that RAY_ADDRESS names, or starts one on this machine. In a cluster PROMPTS
and ANSWERS must be where every machine reaches them.
"""

import argparse
import contextlib
import fcntl
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray.data.checkpoint import CheckpointConfig
from ray.data.llm import build_processor, vLLMEngineProcessorConfig
from vllm.platforms import current_platform

from vllm_subspec.config import check

DONE = "_done"
"""Folder of the ids that are answered; readers of Parquet folders skip names with an underscore."""
LOCK = "_lock"
"""Empty file that a run locks while it lives; it stays behind."""


class AnsweredElsewhereError(Exception):
    """Another run holds the lock."""


def json_object(text: str) -> dict[str, Any]:
    """The JSON object ``text``, as an argument's value."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text} is no JSON object")
    return value


def speculative_config(text: str) -> dict[str, Any]:
    value = json_object(text)
    try:
        check(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return value


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ray_batch",
        description="Answer a file of prompts with Ray Data; resumable.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("prompts", type=Path, help="JSON Lines or Parquet with `id` and `prompt`")
    parser.add_argument("answers", type=Path, help="folder of Parquet files, made if missing")
    parser.add_argument("--model", required=True, help="name or folder of the target")
    parser.add_argument(
        "--speculative-config",
        type=speculative_config,
        default={"method": "subspec"},
        help="JSON",
    )
    parser.add_argument(
        "--sampling",
        type=json_object,
        default={"temperature": 0.0, "max_tokens": 256},
        help="JSON of vLLM's SamplingParams",
    )
    parser.add_argument(
        "--engine", type=json_object, default={}, help="JSON of further engine arguments of vLLM"
    )
    parser.add_argument(
        "--batch-size", type=positive, default=32, help="prompts that are answered and kept at once"
    )
    parser.add_argument("--concurrency", type=positive, default=1, help="engines side by side")
    given = parser.parse_args(arguments)
    if not given.prompts.exists():
        parser.error(f"PROMPTS is {given.prompts}: no such file or folder")
    return given


def read(prompts: Path) -> ray.data.Dataset:
    files = [prompts] if prompts.is_file() else sorted(prompts.iterdir())
    if all(file.suffix == ".parquet" for file in files):
        rows = ray.data.read_parquet([str(file) for file in files])
    else:
        rows = ray.data.read_json([str(file) for file in files])
    return rows.select_columns(["id", "prompt"])


def processor_config(given: argparse.Namespace) -> vLLMEngineProcessorConfig:
    """Engines that take text and give text, one on each GPU (or tensor-parallel group of them)."""
    engine = {**given.engine, "speculative_config": given.speculative_config}
    device: dict[str, Any] = {}
    if current_platform.is_cpu():
        # Ray asks for GPUs, which a machine without any would wait for without end.
        device = {"placement_group_config": {"bundle_per_worker": {"CPU": 1}}}
        # Left to vLLM, as Ray's choice for several ranks refuses CPUs.
        engine.setdefault("distributed_executor_backend", None)
    return vLLMEngineProcessorConfig(
        model_source=given.model,
        engine_kwargs=engine,
        batch_size=given.batch_size,
        concurrency=given.concurrency,
        # The engine itself turns text into tokens and tokens into text.
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
        **device,
    )


@contextlib.contextmanager
def alone(answers: Path) -> Iterator[None]:
    """Meanwhile no other run answers into the folder.

    A run begins by removing what is not confirmed, which would be the other's newest answers.

    Raises:
        AnsweredElsewhereError: another one does.
    """
    with contextlib.ExitStack() as held:
        try:
            lock = held.enter_context((answers / LOCK).open("a"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AnsweredElsewhereError(
                f"another run answers into {answers}: wait for its end, or stop it"
            ) from None
        except OSError as error:
            print(
                f"ray_batch: {answers} cannot be locked ({error.strerror}): "
                "see to it that no other run answers into it",
                file=sys.stderr,
            )
        yield


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments)
    answers = given.answers.absolute()
    answers.mkdir(parents=True, exist_ok=True)
    try:
        with alone(answers):
            answer(given, answers)
    except AnsweredElsewhereError as error:
        print(f"ray_batch: {error}", file=sys.stderr)
        return 2
    return 0


def answer(given: argparse.Namespace, answers: Path) -> None:
    ray.init()
    # Ray Data writes a block's ids before the block, confirms them after it, and removes at the
    # next start whatever was not confirmed.
    ray.data.DataContext.get_current().checkpoint_config = CheckpointConfig(
        id_column="id", checkpoint_path=str(answers / DONE), delete_checkpoint_on_success=False
    )
    process = build_processor(
        processor_config(given),
        preprocess=lambda row: {**row, "sampling_params": given.sampling},
        postprocess=lambda row: {
            "id": row["id"],
            "prompt": row["prompt"],
            "answer": row["generated_text"],
        },
    )
    # A block is kept as a whole: its size is what an interruption can cost.
    blocks = read(given.prompts).repartition(target_num_rows_per_block=given.batch_size)
    process(blocks).write_parquet(str(answers))


if __name__ == "__main__":
    sys.exit(main())
