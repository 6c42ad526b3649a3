"""The trials that wait, in their order, each looked at once more in the moment before its launch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from ray.tune.search import Searcher

from orchestrator.config.trial_config import TrialConfig, halved_micro_batch
from orchestrator.planning import evidence
from orchestrator.results.records import TrialStatus
from orchestrator.sweep.recorder import Recorder
from orchestrator.training.task import TrialTask


class TrialQueue(Searcher):
    """What Tune asks for the next trial as soon as a slot is free; what has run out of memory by then is known."""

    def __init__(
        self,
        tasks: Mapping[str, TrialTask],
        recorder: Recorder,
        predicted_bytes: Callable[[TrialConfig], int],
        available_bytes: int,
        workers: int,
    ) -> None:
        """Take what waits."""
        super().__init__()
        self._tasks, self._waiting = tasks, deque(tasks)
        self._recorder, self._predicted_bytes, self._available_bytes = recorder, predicted_bytes, available_bytes
        self._workers = workers
        # A trial is read once, when it has ended: a sweep may have thousands, and looks at each launch.
        self._unread = set(recorder.records) - set(tasks)
        self._seen: list[evidence.Observation] = []

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """The next trial that may run; Tune's own id for it is not used."""
        while self._waiting:
            ours = self._waiting.popleft()
            config, reason = self._admitted(ours)
            if reason:
                self._recorder.refuse(ours, reason)
                continue
            self._unread.add(ours)
            return {"trial_id": ours, "micro_batch_size": config.micro_batch_size}
        finished: Any = Searcher.FINISHED
        return finished  # type: ignore[no-any-return]

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The records tell all there is to learn."""

    def _admitted(self, trial_id: str) -> tuple[TrialConfig, str | None]:
        """The configuration to launch, with a smaller micro-batch where that is ours to choose, or a reason not to."""
        self._read_ended()
        first = config = self._recorder.records[trial_id].config
        while reason := evidence.refusal(config, self._predicted_bytes(config), self._available_bytes, self._seen):
            smaller = halved_micro_batch(config, self._workers) if self._tasks[trial_id].halves_micro_batch else None
            if smaller is None:
                return first, reason
            config = smaller
        return config, None

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
