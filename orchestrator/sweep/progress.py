"""How the sweep stands, while it runs: a live panel on a terminal, one line a change elsewhere. All on stderr."""

from __future__ import annotations

import math
import os
import sys
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from ray import tune
from rich.console import Console
from rich.live import Live
from rich.text import Text

from orchestrator.errors import counted, printable
from orchestrator.planning.pace import RAN, left_s, to_come
from orchestrator.reporting.statistics import best_so_far, label, objective_of
from orchestrator.results.folders import SweepFolder
from orchestrator.results.records import SweepResult, TrialResult, TrialStatus

QUIET_S = 60.0
"""So long without a line, and the steps of the running trials are told."""


class _Stderr(Console):
    """A sweep goes on though nobody listens any more, as where a pager was closed."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class Progress(tune.Callback):
    """Hears of every record that changes, and of every round of Tune's loop."""

    def __init__(
        self,
        folder: SweepFolder,
        sweep: SweepResult,
        slots: int,
        planned_s: Mapping[str, float],
        launches: int | None,
        budget_hours: float | None,
    ) -> None:
        """sweep: its objective is one that is known while trials train."""
        self._folder, self._sweep, self._slots = folder, sweep, slots
        self._records = {record.trial_id: record for record in sweep.trials}
        self._planned_s, self._launches, self._budget_hours = planned_s, launches, budget_hours
        self._started = self._said = time.monotonic()
        self._launched: dict[str, float] = {}
        self._warned = self._is_stopping = False
        self._steps, self._read_at = "", 0.0
        self._console = _Stderr(stderr=True, highlight=False)
        # Where a stream is closed, there is none.
        terminals = all(stream is not None and stream.isatty() for stream in (sys.stdout, sys.stderr))
        live = terminals and "NO_COLOR" not in os.environ
        self._live = Live(get_renderable=self._panel, console=self._console, refresh_per_second=2) if live else None

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            # A terminal may be gone.
            with suppress(OSError):
                self._live.stop()

    def __call__(self, record: TrialResult) -> None:
        """Take note of a record, and say so where its status changed or it was evaluated."""
        before = self._records.get(record.trial_id)
        self._records[record.trial_id] = record
        changed = before is None or before.status is not record.status
        begins = changed and record.status is TrialStatus.RUNNING
        if begins:
            self._launched[record.trial_id] = time.monotonic()
        evaluated = before is not None and record.best is not None and before.last != record.last
        # What an interruption kept from starting is the next run's, and no news of its own.
        never_began = record.status is TrialStatus.CANCELLED and record.trial_id not in self._launched
        if (changed and not never_began) or evaluated:
            self.say(self._line(record, begins))
        if changed and record.status in RAN and not self._warned and (told := self._beyond_budget()):
            self._warned = True
            self.say(told)

    def __getstate__(self) -> dict[str, Any]:
        # As the recorder's: Tune's own state is never read back.
        return {}

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """A sign of life where evaluations are far apart."""
        if not self._live and time.monotonic() - self._said > QUIET_S and (told := self._running() or self._waiting()):
            self.say(f"[{_clock(time.monotonic() - self._started)}] {told}")

    def _running(self) -> str:
        """The running trials' last steps, read from their files at most every two seconds."""
        if time.monotonic() - self._read_at > 2:
            told = []
            for record in self._known():
                if record.status is TrialStatus.RUNNING:
                    last = self._folder.trial(record.trial_id).last_point()
                    where = f"step {last.step} of {record.config.max_steps}" if last else "starting"
                    told.append(f"{record.trial_id} {where}")
            self._steps, self._read_at = f"at work: {', '.join(told)}" if told else "", time.monotonic()
        return self._steps

    def _waiting(self) -> str:
        """Where none runs, as while the first workers start."""
        pending = sum(record.status is TrialStatus.PENDING for record in self._known())
        return f"none at work yet: {counted(pending, 'trial')} to start when workers are there" if pending else ""

    def stopping(self, text: str) -> None:
        """Say that the sweep is about to end: from here on no time is left, and nobody waits for the running trials."""
        self._is_stopping = True
        self.say(text)

    def say(self, text: str) -> None:
        """One line."""
        self._said = time.monotonic()
        try:
            self._console.print(Text(printable(text)), soft_wrap=True)
        except OSError:
            # As where a disk is full.
            self._console.quiet = True

    def _line(self, record: TrialResult, begins: bool) -> str:
        told = f"{record.trial_id}  {label(record, self._sweep.searched)}  {record.status}"
        # Where an earlier run left it is not where it begins: that is its checkpoint, or anew.
        told += "" if begins else self._stand(record)
        if record.reason:
            told += f"  ({record.reason.splitlines()[0]})"
        return f"[{_clock(time.monotonic() - self._started)}] {told}"

    def _stand(self, record: TrialResult) -> str:
        told = f"  step {record.steps}" if record.last and record.steps else ""
        metric = self._sweep.objective_metric
        value = getattr(record.last, metric, None)
        value = record.measured(metric) if value is None else value
        return told if value is None else f"{told}  {metric} {value:.4g}"

    def _known(self) -> tuple[TrialResult, ...]:
        """All as they stand: the panel looks at them from a thread of its own, while the sweep's adds others."""
        return tuple(self._records.values())

    def _panel(self) -> Text:
        known = self._known()
        counts = Counter(record.status for record in known)
        parts = ", ".join(f"{counts[status]} {status}" for status in TrialStatus if counts[status])
        if more := to_come(known, self._launches):
            parts += f" of up to {len(known) + more} trials"
        gone_s = time.monotonic() - self._started
        text = f"{parts} · {_clock(gone_s)} gone"
        if self._is_stopping:
            text += ", stopping"
        else:
            if left := self._left_s():
                allowed = math.inf if self._budget_hours is None else max(0.0, self._budget_hours * 3600 - gone_s)
                until = ", until budget.hours is used up" if allowed < left else ""
                text += f", about {_clock(min(left, allowed))} left{until}"
            if running := self._running():
                text += f"\n{running}"
        if best := best_so_far(self._sweep, known):
            value = objective_of(self._sweep, best)
            text += f"\nbest so far: {self._sweep.objective_metric} {value:.4g}  {label(best, self._sweep.searched)}"
        return Text(printable(text), style="bold")

    def _left_s(self) -> float | None:
        now = time.monotonic()
        gone_s = {trial_id: now - launched for trial_id, launched in dict(self._launched).items()}
        return left_s(self._known(), self._planned_s, gone_s, self._slots, self._launches)

    def _beyond_budget(self) -> str | None:
        """That the sweep will be ended before its last trials, once a trial has ended by which that is known."""
        if self._budget_hours is None:
            return None
        needed = (time.monotonic() - self._started + (self._left_s() or 0.0)) / 3600
        if needed <= self._budget_hours:
            return None
        return (
            f"about {needed:.3g} hours are needed at this pace, and budget.hours is {self._budget_hours:g}: the sweep "
            "will end before its last trials, and the same command with a larger budget goes on"
        )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
