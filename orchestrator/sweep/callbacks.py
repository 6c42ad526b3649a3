"""Other packages' code that hears of trials and sweeps that end, named by an entry point of theirs.

[project.entry-points."orchestrator.callbacks"]
pager = "my_package.pager:Pager"
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from orchestrator.results.records import SweepResult, TrialResult, TrialStatus

GROUP = "orchestrator.callbacks"


class Callback:
    """What an entry point names a subclass of; made once a run without arguments.

    Its methods are called in the sweep's process, between two of its own steps: return quickly.
    """

    def trial_ended(self, trial: TrialResult) -> None:
        """A trial has its final record, of whatever status; one refused before the start is not told of."""

    def sweep_ended(self, sweep: SweepResult, folder: Path) -> None:
        """All trials have ended, and report and records are in the folder."""


class Callbacks:
    """All that are installed; what one raises is said, and neither the sweep nor the others hear of it."""

    def __init__(
        self, say: Callable[[str], None], known: Iterable[TrialResult], found: Iterable[EntryPoint] | None = None
    ) -> None:
        """Load them; `known` is how the sweep begins: ends of earlier runs, and refusals, are not told of."""
        self._say = say
        self._told: set[tuple[str, TrialStatus]] = {(trial.trial_id, trial.status) for trial in known}
        self._callbacks: list[tuple[str, Callback]] = []
        for point in entry_points(group=GROUP) if found is None else found:
            self._contain(point.name, functools.partial(self._load, point))

    def track(self, trial: TrialResult) -> None:
        """Take note of a record; its end is passed on once."""
        ended = trial.status not in (TrialStatus.PENDING, TrialStatus.RUNNING)
        if ended and (trial.trial_id, trial.status) not in self._told:
            self._told.add((trial.trial_id, trial.status))
            for name, callback in self._callbacks:
                self._contain(name, functools.partial(callback.trial_ended, trial))

    def sweep_ended(self, sweep: SweepResult, folder: Path) -> None:
        """Pass on that all is over."""
        for name, callback in self._callbacks:
            self._contain(name, functools.partial(callback.sweep_ended, sweep, folder))

    def _load(self, point: EntryPoint) -> None:
        self._callbacks.append((point.name, point.load()()))

    def _contain(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            self._say(f"callback {name}: {type(error).__name__}: {error}")
