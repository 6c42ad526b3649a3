"""The signals that ask for the end of a sweep: Ctrl-C's, SIGTERM, and SIGHUP where a terminal closes."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from orchestrator.sweep.stopper import Stopper

TOGETHER_S = 1.0
"""What comes within so long is one signal: `timeout` sends its own to its child, and then to the group of both."""

STOPPING = (
    "stopping: what has ended is safe, and running trials go on with the same command (Ctrl-C once more ends at once)"
)


class Signals:
    """Each raises KeyboardInterrupt, so that what is open is closed, unless a stopper hears them at that time."""

    def __init__(self) -> None:
        self.came = False
        self._last_s = -TOGETHER_S
        self._answer: Callable[[int], None] = _interrupt

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Hear them within this; SIGHUP only where whoever started us has not had it ignored, as `nohup` does."""
        asking = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            asking.append(signal.SIGHUP)
        before = {number: signal.signal(number, self._hear) for number in asking}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def to(self, stopper: Stopper, say: Callable[[str], None]) -> Iterator[None]:
        """The first one ends the sweep cleanly, and `say` is told at once; a second one ends it at once."""
        heard = threading.Event()

        def answer(number: int) -> None:
            if stopper.interrupted:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            stopper.interrupt(signal.Signals(number).name)
            heard.set()

        def tell() -> None:
            heard.wait()
            if stopper.interrupted:
                say(STOPPING)

        # A signal may come in the midst of a line, into which its handler must not print.
        teller = threading.Thread(target=tell, daemon=True)
        teller.start()
        self._answer = answer
        try:
            yield
        finally:
            self._answer = _interrupt
            heard.set()
            teller.join()

    def _hear(self, number: int, _: FrameType | None) -> None:
        now_s = time.monotonic()
        is_another, self._last_s = now_s - self._last_s >= TOGETHER_S, now_s
        self.came = True
        if is_another:
            self._answer(number)


def _interrupt(number: int) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)
