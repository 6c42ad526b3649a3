"""What a trial's process says to its worker, until it has ended, is late, or has fallen silent."""

from __future__ import annotations

import time
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

from orchestrator.sweep.failure_policy import silence_limit_s
from orchestrator.training.task import Alive, TrialEnd, TrialProgress


class SilentError(TimeoutError):
    """The process lives and does nothing."""


def messages(reports: Connection, process: Any, limit_s: float | None) -> Iterator[TrialProgress | TrialEnd]:
    """What the process sends, until it is gone and its pipe is empty.

    Raises:
        SilentError: no sign of life for much longer than ever before.
        TimeoutError: it goes on after `limit_s`.
    """
    started_s = heard_s = time.monotonic()
    longest_s: float | None = None
    while True:
        silent_at_s = heard_s + silence_limit_s(longest_s)
        late_at_s = silent_at_s if limit_s is None else started_s + limit_s
        left_s = min(silent_at_s, late_at_s) - time.monotonic()
        if not wait([reports, process.sentinel], max(0.0, left_s)):
            if late_at_s < silent_at_s:
                raise TimeoutError(
                    f"it ran longer than budget.trial_hours allows ({(limit_s or 0) / 3600:.4g} h), or hung: see its "
                    "log.txt, raise the limit or mend the cause, and remove its folder to have it run again"
                )
            raise SilentError(
                f"it hung: no step for {time.monotonic() - heard_s:.0f} s, where the longest had taken "
                f"{longest_s or 0:.0f} s; see its log.txt and mend the cause"
            )
        try:
            while reports.poll():
                message = reports.recv()
                now_s = time.monotonic()
                if isinstance(message, Alive):
                    # The first one ends the loading, which says nothing of the steps.
                    longest_s = 0.0 if longest_s is None else max(longest_s, now_s - heard_s)
                heard_s = now_s
                if not isinstance(message, Alive):
                    yield message
        except EOFError:
            return
        if not process.is_alive():
            return
