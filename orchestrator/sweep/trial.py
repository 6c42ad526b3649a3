"""One trial as Ray Tune sees it: an actor that hands the trial to its worker group and passes reports on."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import ray
from ray import tune

from orchestrator.config.trial_config import halved_micro_batch
from orchestrator.results.records import TrialStatus
from orchestrator.sweep import cluster
from orchestrator.sweep.failure_policy import FAILURES_ON_A_NODE, STOP_LIMIT_S, after_end, avoided_nodes
from orchestrator.sweep.worker import GroupShape
from orchestrator.training.task import TrialEnd, TrialProgress, TrialTask


class TrialOnWorkers(tune.Trainable):
    """A concurrency slot: it keeps its worker group while Tune gives it one trial after the other (`reuse_actors`).

    The trial's own failures are results, not exceptions: Tune would not reuse the actor of a trial that raised.
    """

    def setup(  # type: ignore[override]
        self,
        config: dict[str, Any],
        *,
        board: Any,
        groups: Any,
        shape: GroupShape,
        keeps_group: bool,
    ) -> None:
        """Called once an actor; `board` is the sweep's Switchboard, `groups` its WorkerGroups."""
        self._board, self._groups, self._shape, self._keeps_group = board, groups, shape, keeps_group
        self._group: str | None = None
        self._life_of_groups = groups.life.remote()
        self._take(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial."""
        if self._group and not (self._keeps_group and ray.get(self._groups.is_alive.remote(self._group))):
            self._close()
        self._take(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Wait for the next report: an evaluation, or the end."""
        if not self._has_begun:
            self._begin()
        while True:
            event = self._next_event()
            if isinstance(event, TrialProgress):
                return self._result(event)
            self._ends[event.status] += 1
            if retry := after_end(event.status, event.reason, event.may_pass, self._ends[event.status]):
                self._events.append(retry.why)
                avoided = self._avoided_after(event)
                if avoided or event.status is TrialStatus.PREEMPTED:
                    self._close()
                time.sleep(retry.after_s)
                self._launch(avoided)
            elif event.status is not TrialStatus.OUT_OF_MEMORY or not self._halve_micro_batch(event.reason):
                return self._result(event.progress, done=True, status=event.status.value, reason=event.reason)

    def _next_event(self) -> TrialProgress | TrialEnd:
        # Without the groups' actor nobody would tell of a worker that is lost: its death ends the wait, as an error.
        coming = self._board.next_event.remote(self._task.trial_id)
        ready, _ = ray.wait([coming, self._life_of_groups], num_returns=1)
        event: TrialProgress | TrialEnd = ray.get(ready[0])
        return event

    def cleanup(self) -> None:
        """Tune needs the slot no more; its workers may wait for a store that is away, and Tune waits for this."""
        if self._group:
            ray.get(self._board.close_group.remote(self._group))

    def _take(self, config: dict[str, Any]) -> None:
        # It begins with the first step and not here: Tune starts an actor for a trial, and where another slot falls
        # free meanwhile gives the trial to that one (ray 2.60.0, TuneController._maybe_reuse_cached_actor).
        self._task: TrialTask = config["task"]
        self._has_begun = False

    def _begin(self) -> None:
        self._has_begun = True
        self._events: list[str] = []
        self._launched_at = time.time()
        self._ends: Counter[TrialStatus] = Counter()
        self._failed_on: list[str] = []
        # Where Tune gives it to this slot because another died, that one's workers are still at it.
        ray.get(self._board.abandon.remote(self._task.trial_id, STOP_LIMIT_S, self._group))
        self._launch()

    def _avoided_after(self, end: TrialEnd) -> Collection[str]:
        """The nodes to keep away from in the next attempt, where others have room."""
        if end.node is None:
            return ()
        self._failed_on.append(end.node.node_id)
        avoided = avoided_nodes(self._failed_on)
        if not avoided or not cluster.has_room_beside(self._shape, avoided):
            return ()
        if end.node.node_id in avoided:
            self._events.append(f"goes on away from {end.node.host}, where it failed {FAILURES_ON_A_NODE} times")
        return avoided

    def _launch(self, avoided: Collection[str] = ()) -> None:
        """Hand the trial to its workers, who go on from its last checkpoint where it left one."""
        if self._group is None:
            self._group = ray.get(self._groups.open.remote(avoided))
        ray.get(self._board.assign.remote(self._group, self._task))

    def _halve_micro_batch(self, reason: str | None) -> bool:
        """Start the trial again with a smaller micro-batch, where the size is ours to choose and can be smaller."""
        smaller = halved_micro_batch(self._task.config, self._shape.workers) if self._task.halves_micro_batch else None
        if smaller is None:
            return False
        self._events.append(f"micro_batch_size {smaller.micro_batch_size} after: {reason}")
        self._task = replace(self._task, config=smaller)
        self._ends.clear()
        self._launch()
        return True

    def _close(self) -> None:
        if self._group:
            ray.get(self._groups.close.remote(self._group))
            self._group = None

    def _result(self, progress: TrialProgress | None, **more: Any) -> dict[str, Any]:
        if progress and progress.went_on_from is not None:
            event = f"went on from step {progress.went_on_from}"
            self._events += [event] * (event not in self._events)
        about = {"launched_at": self._launched_at, "trial_config": self._task.config, "events": tuple(self._events)}
        return {"progress": progress, **about, **more}
