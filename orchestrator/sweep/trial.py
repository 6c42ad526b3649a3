"""One trial as Ray Tune sees it: an actor that hands the trial to its worker group and passes reports on."""

from __future__ import annotations

import time
from typing import Any

import ray
from ray import tune

from orchestrator.results.records import TrialStatus
from orchestrator.sweep.worker import GroupShape
from orchestrator.sweep.worker_group import WorkerGroup
from orchestrator.training.task import TrialEnd, TrialProgress, TrialTask

MAX_ATTEMPTS = 3


class TrialOnWorkers(tune.Trainable):
    """A concurrency slot: it keeps its worker group while Tune gives it one trial after the other (`reuse_actors`).

    The trial's own failures are results, not exceptions: Tune would not reuse the actor of a trial that raised.
    """

    def setup(  # type: ignore[override]
        self,
        config: dict[str, Any],
        *,
        board: Any,
        tasks: dict[str, TrialTask],
        shape: GroupShape,
        model: str,
        storage: str,
        keeps_group: bool,
    ) -> None:
        """Called once an actor."""
        self._board, self._tasks, self._shape = board, tasks, shape
        self._model, self._group_storage, self._keeps_group = model, storage, keeps_group
        self._group: WorkerGroup | None = None
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial."""
        if self._group and not (self._keeps_group and self._group.is_alive):
            self._close()
        self._begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Wait for the next report: an evaluation, or the end."""
        event = ray.get(self._board.next_event.remote(self._task.trial_id))
        if isinstance(event, TrialEnd) and event.status is TrialStatus.PREEMPTED and self._attempt < MAX_ATTEMPTS:
            self._close()
            self._launch()
            return self.step()
        if isinstance(event, TrialProgress):
            return self._result(event)
        return self._result(event.progress, done=True, status=event.status.value, reason=event.reason)

    def cleanup(self) -> None:
        """Tune needs the slot no more."""
        self._close()

    def _begin(self, config: dict[str, Any]) -> None:
        self._task = self._tasks[config["trial_id"]]
        self._launched_at = time.time()
        self._attempt = 0
        self._launch()

    def _launch(self) -> None:
        self._attempt += 1
        if self._group is None:
            self._group = WorkerGroup(self._board, self._shape, self._model, self._group_storage)
        self._group.assign(self._task)

    def _close(self) -> None:
        if self._group:
            self._group.close()
            self._group = None

    def _result(self, progress: TrialProgress | None, **more: Any) -> dict[str, Any]:
        point = progress.last if progress else None
        metrics = point.model_dump(exclude_none=True, exclude={"time_ms"}) if point else {}
        return {**metrics, "progress": progress, "launched_at": self._launched_at, **more}
