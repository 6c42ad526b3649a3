"""How the sweep stands, while it runs: a live panel on a terminal, one line a change elsewhere. All on stderr."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

from orchestrator.results.records import MetricPoint, TrialResult, TrialStatus


class Progress:
    """Hears of every record that changes."""

    def __init__(
        self, records: Iterable[TrialResult], label: Callable[[TrialResult], str], metric: str, mode: str, slots: int
    ) -> None:
        self._records = {record.trial_id: record for record in records}
        self._label, self._metric, self._mode, self._slots = label, metric, mode, slots
        self._started = time.monotonic()
        self._console = Console(stderr=True, highlight=False)
        live = sys.stderr.isatty() and "NO_COLOR" not in os.environ
        self._live = Live(get_renderable=self._panel, console=self._console, refresh_per_second=2) if live else None

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def __call__(self, record: TrialResult) -> None:
        """Take note of a record, and say so where its status changed or it was evaluated."""
        before = self._records.get(record.trial_id)
        self._records[record.trial_id] = record
        changed = before is None or before.status is not record.status
        evaluated = before is not None and record.best is not None and before.last != record.last
        if changed or evaluated:
            self.say(self._line(record))

    def say(self, text: str) -> None:
        """One line."""
        self._console.print(Text(text), soft_wrap=True)

    def _line(self, record: TrialResult) -> str:
        told = f"{record.trial_id}  {self._label(record)}  {record.status}"
        if record.last and record.steps:
            told += f"  step {record.steps}"
        value = self._value(record.last) or self._value(record.best)
        if value is not None:
            told += f"  {self._metric} {value:.4g}"
        if record.reason:
            told += f"  ({record.reason.splitlines()[0]})"
        return f"[{_clock(time.monotonic() - self._started)}] {told}"

    def _panel(self) -> Text:
        counts = Counter(record.status for record in self._records.values())
        parts = ", ".join(f"{counts[status]} {status}" for status in TrialStatus if counts[status])
        gone_s = time.monotonic() - self._started
        text = f"{parts} · {_clock(gone_s)} gone"
        if left_s := self._left_s():
            text += f", about {_clock(left_s)} left"
        if best := self._best():
            text += f"\nbest so far: {self._metric} {self._value(best.best):.4g}  {self._label(best)}"
        return Text(text, style="bold")

    def _left_s(self) -> float | None:
        """By the mean time of the trials that ended in this run."""
        ended = [r.timing.total_s for r in self._records.values() if r.status.is_final and r.timing.total_s]
        open_ = sum(r.status in (TrialStatus.PENDING, TrialStatus.RUNNING) for r in self._records.values())
        return open_ * sum(ended) / len(ended) / self._slots if ended and open_ else None

    def _best(self) -> TrialResult | None:
        known = [record for record in self._records.values() if self._value(record.best) is not None]
        sign = 1 if self._mode == "min" else -1
        return min(known, key=lambda record: sign * (self._value(record.best) or 0.0), default=None)

    def _value(self, point: MetricPoint | None) -> float | None:
        return getattr(point, self._metric) if point else None


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
