"""Ending a whole sweep cleanly: a signal from outside, or a limit of the budget."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ray import tune

from orchestrator.config.sweep_config import BudgetConfig
from orchestrator.errors import UnreachableError
from orchestrator.planning.budget import exhausted

LOOK_S = 0.5
"""So often the budget is looked at: what is spent is counted over all trials, and Tune asks many times a trial."""

SLOTS_LIMIT_S = 3.0
"""Tune waits 10 s for slots that wait for their workers (ray 2.60.0, TuneController); Kubernetes gives 30 s for all."""


class Stopper(tune.Stopper):
    """Ends the whole sweep cleanly: on a signal, or when a limit of the budget is reached."""

    def __init__(
        self,
        board: Any,
        budget: BudgetConfig,
        gpu_hours_spent: Callable[[], float],
        broken: Callable[[], UnreachableError | None],
    ) -> None:
        self._board, self._budget, self._gpu_hours_spent, self.broken = board, budget, gpu_hours_spent, broken
        self._started = time.monotonic()
        self._looked_at_s = -LOOK_S
        self.reason: str | None = None
        self.interrupted = False
        self._told = False

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """No single trial is stopped here."""
        return False

    def interrupt(self, signal_name: str) -> None:
        """A signal asks for the end."""
        self.interrupted = True
        self.reason = f"interrupted ({signal_name}): run the same command again to go on"

    def stop_all(self) -> bool:
        """Asked by Tune in every round of its loop."""
        if self.reason is None and (error := self.broken()):
            self.reason = f"the sweep could not go on ({error}): run the same command again"
        if self.reason is None and (limit := self._limit_reached()):
            self.reason = f"{limit} is used up: {_mend(limit)}"
        if self.reason and not self._told:
            self._told = True
            # Slots that wait for a report would not hear Tune's stop before their trial ends.
            self._board.stop_all.remote(SLOTS_LIMIT_S)
        return self.reason is not None

    def _limit_reached(self) -> str | None:
        if time.monotonic() - self._looked_at_s < LOOK_S:
            return None
        self._looked_at_s = time.monotonic()
        return exhausted(self._budget, (time.monotonic() - self._started) / 3600, self._gpu_hours_spent())


def _mend(limit: str) -> str:
    """GPU-hours and money are counted over all runs of a sweep, hours anew in each."""
    if limit == "budget.hours":
        return "run the same command again to go on for as long, or raise it"
    return "raise it and run the same command again to go on"
