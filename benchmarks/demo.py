# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Show SubSpec at work: the same prompts without speculation and with it, in one run.

    python -m benchmarks.demo [--gib 0.5] [--tokens 48] [--bits 4]

Every decoder layer's full-precision weights are read from disk for every verification. Tokens that
the draft proposed and the target accepted are printed in green, the target's own in white.
"""

import argparse
import os
import sys
import time
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from benchmarks.checkpoints import BUILD, PROMPTS, checkpoint
from vllm_subspec.bench.session import Generated, Session
from vllm_subspec.weights.host_memory import peak_memory

GREEN, BOLD, DIM, RESET = "\x1b[32m", "\x1b[1m", "\x1b[2m", "\x1b[0m"


def coloured(session: Session, answer: Generated, colour: bool) -> str:
    """The answer's text, accepted draft tokens in green."""
    tokenizer = session.llm.get_tokenizer()
    out, end, shown = "", 0, ""
    for emitted in answer.steps:
        # Decode prefixes and take what is new: tokens may be parts of characters.
        for last, paint in ((emitted - 1, GREEN), (1, "")):
            end += last
            text = tokenizer.decode(answer.tokens[:end])
            piece, shown = text[len(shown) :], text
            out += f"{paint}{piece}{RESET}" if colour and paint and piece else piece
    return out


def compare(plain: list[Generated], subspec: list[Generated]) -> str:
    """``yes``, or where the answers part and how near a tie that position is."""
    differences = []
    for number, (a, b) in enumerate(zip(plain, subspec, strict=True), 1):
        pairs = enumerate(zip(a.tokens, b.tokens, strict=True))
        at = next((i for i, (x, y) in pairs if x != y), None)
        if at is not None:
            differences.append(
                f"prompt {number} parts at token {at + 1}, where the two best tokens are "
                f"{a.margins[at]:.3f} apart in log probability (bfloat16 near tie)"
            )
    return "; ".join(differences) or "yes"


def row(name: str, answers: list[Generated], streamed: float) -> list[str]:
    tokens = sum(a.decode_tokens for a in answers)
    seconds = sum(a.decode_seconds for a in answers)
    rounds = sum(len(a.steps) - 1 for a in answers)
    return [
        name,
        f"{tokens / seconds:.2f}",
        f"{tokens / rounds:.1f}",
        f"{streamed / sum(len(a.tokens) for a in answers) / 2**20:,.0f}",
    ]


@dataclass(frozen=True)
class Spent:
    """Where the seconds of some generation went."""

    whole: float
    waiting: float  # for streamed weights, while nothing else was done
    drafting: float
    nbytes: int  # streamed
    reading: float  # by the reader, beside everything else

    @classmethod
    def since(cls, session: Session, before: dict[str, Any], began: float) -> "Spent":
        """Since the worker's statistics were ``before``, at the time ``began``."""
        now = session.call("statistics", before["rounds"])
        counted = {n: value - before["counters"][n] for n, value in now["counters"].items()}
        return cls(
            time.perf_counter() - began,
            counted["stream_stall_seconds"],
            sum(now["seconds"]["draft_seconds"]),
            counted["streamed_bytes"],
            counted["read_seconds"],
        )

    def bound(self) -> str:
        """What took most of the time, and how much the others did."""
        computing = self.whole - self.waiting - self.drafting
        parts = {"link": self.waiting, "drafting": self.drafting, "arithmetic": computing}
        most = max(parts, key=lambda name: parts[name])
        shares = ", ".join(f"{name} {s / self.whole:.0%}" for name, s in parts.items() if s)
        rate = self.nbytes / self.reading / 1e9
        return f"{most} ({shares} of the time; the disk gave {rate:.1f} GB/s)"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=0.5, help="size of the model (default 0.5)")
    parser.add_argument("--tokens", type=int, default=48, help="tokens per prompt (default 48)")
    parser.add_argument("--bits", type=int, default=4, choices=(2, 3, 4, 8), help="of substitutes")
    args = parser.parse_args()
    colour = sys.stdout.isatty() or os.environ.get("FORCE_COLOR") == "1"

    model = checkpoint(args.gib)
    began = time.perf_counter()
    session = Session(
        model,
        {
            "resident_weights_gib": 0,
            "bits": args.bits,
            "store_dir": str(BUILD / "stores"),
        },
    )
    plan = session.call("memory_plan")
    print(
        f"\n{BOLD}{model.name}{RESET}: {plan['store_bytes'] / 2**30:.2f} GiB of decoder layers "
        f"streamed from disk through a ring of {plan['ring_layers']} layers, "
        f"{plan['substitute_bytes'] / 2**30:.2f} GiB of {args.bits}-bit substitutes "
        f"{DIM}(ready after {time.perf_counter() - began:.0f} s){RESET}\n"
    )
    session.generate(PROMPTS[:1], 4, speculate=True)  # warm-up
    plain: list[Generated] = []
    subspec: list[Generated] = []
    spent = {}
    for answers, speculate in ((plain, False), (subspec, True)):
        before, started = session.call("statistics"), time.perf_counter()
        for prompt in PROMPTS:
            answers += session.generate([prompt], args.tokens, speculate, logprobs=2)
        spent[speculate] = Spent.since(session, before, started)

    for answer in subspec:
        print(f"{DIM}{answer.prompt}{RESET}{coloured(session, answer, colour)}\n{DIM}---{RESET}")
    print(f"{GREEN}green{RESET}: drafted by the substitutes, accepted by the target\n")

    rows = [
        ["", "tokens/s", "tokens/round", "MiB streamed/token"],
        row("no speculation", plain, spent[False].nbytes),
        row("SubSpec", subspec, spent[True].nbytes),
    ]
    for cells in rows:
        print(f"  {cells[0]:<16}" + "".join(f"{cell:>20}" for cell in cells[1:]))
    speedup = float(rows[2][1]) / float(rows[1][1])
    print(f"\n  speed-up          {BOLD}{speedup:.1f}x{RESET}")
    print(f"  identical text    {compare(plain, subspec)}")
    print(f"  bound without it  {spent[False].bound()}")
    print(f"  bound with it     {spent[True].bound()}")
    print(
        f"  peak memory       {peak_memory() / 2**30:.2f} GiB (planned {plan['total'] / 2**30:.2f})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
