# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""A process that does not outlive the one that started it."""

import logging
import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.process import BaseProcess

logger = logging.getLogger(__name__)

GRACE_SECONDS = 30.0
"""For an orderly end, which begins when the pass that is running has ended."""


def end_with_parent(grace: float = GRACE_SECONDS) -> None:
    """Have this process end when its parent has, however that ended; at once if it has already.

    It is told to end as by its parent, with SIGTERM, and is ended after ``grace`` seconds. Nothing
    happens in a process that `multiprocessing` did not start.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_watch, args=(parent, grace), daemon=True, name="orphan").start()


def _watch(parent: BaseProcess, grace: float) -> None:
    parent.join()
    logger.error("The front end has ended without a word: its engine ends, too")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace)
    os._exit(1)
