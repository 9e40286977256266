# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""An engine in a process of its own: several can take turns, and each starts with clean memory."""

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Self, TypeVar

if TYPE_CHECKING:
    from vllm_subspec.bench.session import Session

P = ParamSpec("P")
T = TypeVar("T")


class EngineProcess:
    """Runs functions of a `Session` where that lives.

    Args:
        model, options, engine: of the `Session`.

    Raises:
        EngineError: the engine cannot be started.
    """

    def __init__(self, model: Path | str, options: dict[str, Any] | None, **engine: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(model, options, engine, theirs))
        self._process.start()
        theirs.close()
        self._answer()

    def call(
        self,
        function: Callable[Concatenate["Session", P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """``function(session, ...)``; it and its arguments are pickled.

        Raises:
            EngineError: it raised something.
        """
        self._pipe.send((function, args, kwargs))
        answer: T = self._answer()
        return answer

    def close(self) -> None:
        if self._process.is_alive():
            self._pipe.send(None)
        self._process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._process.terminate()
        self.close()

    def _answer(self) -> Any:
        try:
            good, answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise EngineError(
                f"the engine's process ended with status {self._process.exitcode}"
            ) from None
        if not good:
            raise EngineError(answer)
        return answer


class EngineError(RuntimeError):
    """The engine could not be started, or what it was asked for failed."""


def _serve(
    model: Path | str, options: dict[str, Any] | None, engine: dict[str, Any], pipe: Connection
) -> None:
    from vllm_subspec.bench.session import Session

    try:
        session = Session(model, options, **engine)
    except Exception as error:
        traceback.print_exc()
        pipe.send((False, str(error)))
        return
    pipe.send((True, None))
    while (asked := pipe.recv()) is not None:
        function, args, kwargs = asked
        try:
            pipe.send((True, function(session, *args, **kwargs)))
        except Exception as error:
            traceback.print_exc()
            pipe.send((False, f"{type(error).__name__}: {error}"))
