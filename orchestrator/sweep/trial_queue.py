"""The trials that wait, in their order, each looked at once more in the moment before its launch.

Where none waits any more, an adaptive search is asked for more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ray.tune.search import Searcher

from orchestrator.config.trial_config import TrialConfig, halved_micro_batch
from orchestrator.planning import evidence
from orchestrator.results.records import TrialResult, TrialStatus
from orchestrator.sweep.recorder import Recorder
from orchestrator.training.task import TrialTask


class TrialQueue(Searcher):
    """What Tune asks for the next trial as soon as a slot is free; what has run out of memory by then is known."""

    def __init__(
        self,
        recorder: Recorder,
        task_of: Callable[[TrialResult], TrialTask],
        more: Callable[[], Sequence[str] | None],
        predicted_bytes: Callable[[TrialConfig], int],
        available_bytes: int,
        workers: int,
    ) -> None:
        """Take what waits.

        more: names trials that wait since it was called; none at the search's end, None where a trial has to end first.
        """
        super().__init__()
        records = recorder.records.values()
        self._waiting = deque(record.trial_id for record in records if record.status is TrialStatus.PENDING)
        self._task_of, self._more = task_of, more
        self._recorder, self._predicted_bytes, self._available_bytes = recorder, predicted_bytes, available_bytes
        self._workers = workers
        # A trial is read once, when it has ended: a sweep may have thousands, and looks at each launch.
        self._unread = set(recorder.records) - set(self._waiting)
        self._seen: list[evidence.Observation] = []

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """The next trial that may run; Tune's own id for it is not used."""
        while self._waiting or not self._is_over():
            if not self._waiting:
                return None
            task, reason = self._admitted(self._recorder.records[self._waiting.popleft()])
            if reason:
                self._recorder.refuse(task.trial_id, reason)
                continue
            self._unread.add(task.trial_id)
            configuration_id = self._recorder.records[task.trial_id].configuration_id
            return {"trial_id": task.trial_id, "configuration_id": configuration_id, "task": task}
        finished: Any = Searcher.FINISHED
        return finished  # type: ignore[no-any-return]

    def is_at_end(self) -> bool:
        """Whether no trial waits and none is to come."""
        return not self._waiting and self._is_over()

    def _is_over(self) -> bool:
        """Ask for more."""
        more = self._more()
        self._waiting.extend(more or ())
        return more is not None and not more

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The records tell all there is to learn."""

    def _admitted(self, record: TrialResult) -> tuple[TrialTask, str | None]:
        """The task to launch, with a smaller micro-batch where that is ours to choose, or a reason not to."""
        self._read_ended()
        task, config = self._task_of(record), record.config
        while reason := evidence.refusal(config, self._predicted_bytes(config), self._available_bytes, self._seen):
            smaller = halved_micro_batch(config, self._workers) if task.halves_micro_batch else None
            if smaller is None:
                return task, reason
            config = smaller
        return replace(task, config=config), None

    def _read_ended(self) -> None:
        records = [self._recorder.records[trial_id] for trial_id in self._unread]
        for record in records:
            if record.status in (TrialStatus.PENDING, TrialStatus.RUNNING):
                continue
            self._unread.remove(record.trial_id)
            if observation := evidence.observe(record, self._predicted_bytes, self._available_bytes):
                self._seen.append(observation)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: our own records are the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: a resumed sweep makes a new queue from the records."""
