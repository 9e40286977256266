# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Prompts: bundled sets, and files of the user's.

``chat``: two tasks for each of the eight categories of MT-Bench (Zheng et al., "Judging
LLM-as-a-Judge with MT-Bench and Chatbot Arena", 2023), written for this project. ``python``:
beginnings of Python files, for models that continue code. A file has a JSON object in each line
with at least a ``"prompt"``.
"""

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

BUNDLED = ("chat", "python")


@dataclass(frozen=True)
class Prompt:
    text: str
    category: str = ""


def load(name: str) -> list[Prompt]:
    """A bundled set, or a file.

    Raises:
        ValueError: one sentence about what is wrong with the file.
    """
    if name in BUNDLED:
        text = resources.files(__package__).joinpath(f"{name}.jsonl").read_text("utf-8")
    else:
        path = Path(name)
        if not path.is_file():
            known = " or ".join(f'"{bundled}"' for bundled in BUNDLED)
            raise ValueError(f"--prompts {name} is neither {known} nor a file")
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--prompts {name} cannot be read: {error}") from None
    prompts = [
        _parse(name, number, line) for number, line in enumerate(text.splitlines(), 1) if line
    ]
    if not prompts:
        raise ValueError(f"--prompts {name} has no prompt")
    return prompts


def _parse(name: str, number: int, line: str) -> Prompt:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"--prompts {name}, line {number}: not JSON ({error})") from None
    text = entry.get("prompt") if isinstance(entry, dict) else None
    if not isinstance(text, str) or not text:
        raise ValueError(
            f'--prompts {name}, line {number}: an object with a text "prompt" is wanted'
        )
    return Prompt(text, str(entry.get("category", "")))
