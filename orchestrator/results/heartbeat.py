"""What a thread does while a block runs: a sign of life that others wait for, or a look at theirs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from orchestrator.errors import StorageError

LAST_WORK_LIMIT_S = 5.0
"""The thread may be within a request that nobody answers."""


@contextmanager
def beside(work: Callable[[threading.Event], None]) -> Iterator[None]:
    """Let a thread work until the block is left, which the event tells it."""
    ended = threading.Event()
    thread = threading.Thread(target=work, args=(ended,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(LAST_WORK_LIMIT_S)


@contextmanager
def beating(every_s: float, beat: Callable[[], bool]) -> Iterator[None]:
    """Call `beat` so often, first after `every_s`, until it returns False; it is over when the block is left.

    A storage that is away or full for a while is no reason to end: the next beat tries again.
    """

    def keep_beating(ended: threading.Event) -> None:
        goes_on = True
        while goes_on and not ended.wait(every_s):
            with contextlib.suppress(StorageError):
                goes_on = beat()

    with beside(keep_beating):
        yield
