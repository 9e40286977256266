# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Sizes and rates as people write them."""

import re

_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4} | {
    "ki": 1 << 10,
    "mi": 1 << 20,
    "gi": 1 << 30,
    "ti": 1 << 40,
}
_WRITTEN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?(/s)?\s*", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """Bytes of ``24GiB``, ``512 MB`` or a plain number.

    Raises:
        ValueError: one sentence.
    """
    return int(_parse(text, rate=False))


def parse_rate(text: str) -> float:
    """Bytes/s of ``25GB/s``; the ``/s`` may be left out.

    Raises:
        ValueError: one sentence.
    """
    return _parse(text, rate=True)


def _parse(text: str, rate: bool) -> float:
    found = _WRITTEN.fullmatch(text)
    unit = found[2].lower() if found else ""
    if not found or unit not in _UNITS or (found[3] and not rate) or not float(found[1]):
        kind, example = ("a rate", "25GB/s") if rate else ("a size", "24GiB")
        raise ValueError(f"{text!r} is not {kind} above 0 such as {example}")
    return float(found[1]) * _UNITS[unit]


def in_gib(size: float) -> str:
    return f"{size / (1 << 30):.2f} GiB"
