"""A sign of life that others wait for, given from a thread while a block runs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from orchestrator.errors import StorageError

LAST_BEAT_LIMIT_S = 5.0
"""A beat may be within a request that nobody answers."""


@contextmanager
def beating(every_s: float, beat: Callable[[], bool]) -> Iterator[None]:
    """Call `beat` so often, first after `every_s`, until it returns False; it is over when the block is left.

    A storage that is away or full for a while is no reason to end: the next beat tries again.
    """
    ended = threading.Event()

    def keep_beating() -> None:
        goes_on = True
        while goes_on and not ended.wait(every_s):
            with contextlib.suppress(StorageError):
                goes_on = beat()

    thread = threading.Thread(target=keep_beating, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(LAST_BEAT_LIMIT_S)
