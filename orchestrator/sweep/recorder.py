"""Every trial's record, kept up to date on disk while Ray Tune runs: our disk is the truth, Tune's state a cache."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ray
from pydantic import BaseModel
from ray import tune

from orchestrator.config.sweep_config import ObjectiveConfig
from orchestrator.config.trial_config import TrialConfig
from orchestrator.errors import StorageError
from orchestrator.results.folders import SweepFolder
from orchestrator.results.records import PeakMemory, Timing, TrialResult, TrialStatus
from orchestrator.results.secrets import without_secret
from orchestrator.results.storage import at_once, write_result
from orchestrator.sweep.closing import as_left_on_disk
from orchestrator.sweep.failure_policy import STOP_LIMIT_S, pause_s
from orchestrator.sweep.folder_lock import Tenure
from orchestrator.training.task import TrialProgress

log = logging.getLogger(__name__)
LITTLE_SPACE_BYTES = 2**30
STORAGE_LIMIT_S = 120.0
"""So long a disk that is full or away is waited for."""


class Recorder(tune.Callback):
    """Turns what Tune tells into TrialResults; nobody else writes a result.json."""

    def __init__(
        self,
        folder: SweepFolder,
        records: Mapping[str, TrialResult],
        started_at: float,
        board: Any,
        why_stopped: Mapping[str, str],
        predicted_bytes: Callable[[TrialConfig], int],
        fetch: Callable[[str], bool],
        best_by: ObjectiveConfig,
        tenure: Tenure,
        listeners: tuple[Callable[[TrialResult], None], ...],
    ) -> None:
        self.records = dict(records)
        for record in self.records.values():
            share_names(record)
        self._folder, self._board = folder, board
        self.started_at = started_at
        """Of this run of the sweep, seconds since 1970."""
        self._why_stopped, self._predicted_bytes, self._listeners = why_stopped, predicted_bytes, listeners
        self._fetch, self._best_by = fetch, best_by
        self.tenure = tenure
        """Once it is lost nothing more is written."""
        self._launched_at: dict[str, float] = {}
        self._startup_s: dict[str, float] = {}
        """Of trials that have told something in this run: of all their launches."""
        self.storage_error: StorageError | None = None
        """Why the records can no longer be kept."""
        self._told_of_disk = False
        self._unseen: set[str] = set()
        """Trials of which it was not seen what they left: their workers had not ended, or the store was away."""

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its callbacks into its own state, which we never read back.
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The trial has its slot, or another one after that died."""
        record = self.records[trial.config["trial_id"]]
        if record.status is TrialStatus.RUNNING:
            now = time.time()
            held_s = now - self._launched_at[record.trial_id]
            self._launched_at[record.trial_id] = now
            total_s = record.timing.total_s + held_s
            self.save(record.model_copy(update={"timing": record.timing.model_copy(update={"total_s": total_s})}))
        elif record.status is TrialStatus.PENDING:
            self._launched_at[record.trial_id] = time.time()
            micro = trial.config["task"].config.micro_batch_size
            if micro != record.config.micro_batch_size:
                event = f"micro_batch_size {micro}, since trials of its kind ran out of memory with more"
                config = record.config.model_copy(update={"micro_batch_size": micro})
                record = self._with_config(record, config, (event,))
            self.save(record.model_copy(update={"status": TrialStatus.RUNNING}))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """An evaluation, or the end; `done` without a status of ours is the scheduler's stop."""
        record = self.records[trial.config["trial_id"]]
        if record.status is not TrialStatus.RUNNING:
            return
        if launched_at := result.get("launched_at"):
            self._launched_at[record.trial_id] = launched_at
        record = self._with_config(record, result["trial_config"], result["events"])
        record = self._with_progress(record, result.get("progress"))
        status = result.get("status")
        if status:
            record = self._ended(record, TrialStatus(status), result.get("reason"))
        elif result.get("done"):
            if not ray.get(self._board.stop.remote(record.trial_id, STOP_LIMIT_S)):
                self._unseen.add(record.trial_id)
            reason = self._why_stopped.get(record.trial_id, "stopped by Ray Tune: its log says why")
            # The reason tells the step on which the decision fell; the rest tells how far the trial came.
            record = self._ended(record, TrialStatus.STOPPED, reason)
        self.save(record)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The slot itself died, more often than Tune starts it again: its node is gone, or we have a bug."""
        record = self.records[trial.config["trial_id"]]
        # Its workers may outlive it, and what they do until they have ended counts.
        with contextlib.suppress(ray.exceptions.RayActorError):
            ray.get(self._board.abandon.remote(record.trial_id, STOP_LIMIT_S))
        if not record.status.needs_reason and record.status is not TrialStatus.COMPLETED:
            told = _last_words(trial)
            # An actor that died says nothing against the trial: the next run goes on with it.
            status = (
                TrialStatus.PREEMPTED if ray.exceptions.ActorDiedError.BASE_ERROR_MSG in told else TrialStatus.FAILED
            )
            reason = f"its slot on the cluster died: {(told.splitlines() or ['no more is known'])[-1][:500]}"
            self.save(self._ended(record, status, reason))

    def refuse(self, trial_id: str, reason: str) -> None:
        """What others took says that this one cannot run: it is not launched."""
        self.save(self.records[trial_id].model_copy(update={"status": TrialStatus.INFEASIBLE, "reason": reason}))

    def cancel_rest(self, reason: str) -> int:
        """What had not ended when the sweep did goes on when it is resumed; how many those are."""
        rest = [r for r in self.records.values() if r.status in (TrialStatus.PENDING, TrialStatus.RUNNING)]
        self.save_all(self._ended(record, TrialStatus.CANCELLED, reason) for record in rest)
        return len(rest)

    def look_again(self) -> None:
        """Once all workers have gone: at the trials that had ended when what they left could not be seen."""
        for trial_id in tuple(self._unseen):
            before = self.records[trial_id]
            if (record := self._as_left(before)) != before:
                self.save(record)

    @property
    def has_launched(self) -> bool:
        """Whether any trial was begun in this run of the sweep."""
        return bool(self._launched_at)

    def trial_seconds(self) -> float:
        """Seconds that trials have held their resources: all that ended, in earlier runs too, and those at work."""
        before = sum(record.timing.total_s + record.timing.earlier_s for record in self.records.values())
        at_work = [i for i, record in self.records.items() if record.status is TrialStatus.RUNNING]
        now = time.time()
        return before + sum(now - self._launched_at.get(trial_id, now) for trial_id in at_work)

    def save(self, record: TrialResult) -> None:
        """Keep a record, on disk first; of one that is not there nobody hears, since the next run does not know it."""
        record = _without_secrets(record)
        self._note(record, not self.tenure.is_lost and self._write(record))

    def save_all(self, records: Iterable[TrialResult]) -> None:
        """Keep many, whose writes wait for the disk side by side: whoever interrupts a sweep has little time."""
        hidden = [_without_secrets(record) for record in records]
        written = at_once(lambda record: not self.tenure.is_lost and self._failure(record) is None, hidden)
        for record, is_written in zip(hidden, written, strict=True):
            # What failed is written as one alone is, which waits for a disk that is full or away.
            self._note(record, not self.tenure.is_lost and (is_written or self._write(record)))

    def _note(self, record: TrialResult, is_kept: bool) -> None:
        share_names(record)
        self.records[record.trial_id] = record
        if is_kept:
            self._watch_disk()
            for listener in self._listeners:
                listener(record)

    def _write(self, record: TrialResult) -> bool:
        """Whether it is on disk: where that is full or away for longer than we wait, the sweep is to end."""
        until_s = time.monotonic() + STORAGE_LIMIT_S
        failures = 0
        while error := self._failure(record):
            failures += 1
            left_s = until_s - time.monotonic()
            if self.storage_error is not None or left_s <= 0:
                self.storage_error = error
                return False
            if failures == 1:
                log.warning("%s; waiting for it for %.0f s", error, STORAGE_LIMIT_S)
            time.sleep(min(pause_s(failures), left_s))
        return True

    def _failure(self, record: TrialResult) -> StorageError | None:
        """Why it could not be written."""
        try:
            self._require_folder()
            write_result(self._folder, record)
        except StorageError as error:
            return error
        return None

    def _require_folder(self) -> None:
        """Where a mount has gone away, another folder of this name would be begun in its place."""
        if not os.path.exists(self._folder.sweep_file):  # noqa: PTH110
            raise StorageError(
                f"{self._folder.root} has lost its {self._folder.sweep_file.name}, as where a mount goes away or the "
                "folder is removed: bring it back"
            )

    def _watch_disk(self) -> None:
        """Say once that it is about to be full, while that can still be mended."""
        with contextlib.suppress(OSError):
            free_bytes = shutil.disk_usage(self._folder.root).free
            if free_bytes < LITTLE_SPACE_BYTES and not self._told_of_disk:
                self._told_of_disk = True
                log.warning("only %d MiB are left on the disk of %s: free some", free_bytes // 2**20, self._folder.root)

    def _with_config(self, record: TrialResult, config: TrialConfig, events: tuple[str, ...]) -> TrialResult:
        """The micro-batch may have become smaller than planned, and the notes say why."""
        record = record.model_copy(update={"notes": tuple(dict.fromkeys((*record.notes, *events)))})
        if config == record.config:
            # Of equal ones the record keeps its own: a sweep of thousands would keep as many that came by message.
            return record
        memory = record.peak_memory
        if memory:
            memory = memory.model_copy(update={"predicted_bytes": self._predicted_bytes(config)})
        # The step time was told of another micro-batch.
        return record.model_copy(update={"config": config, "peak_memory": memory, "predicted_step_time_s": None})

    def _with_progress(self, record: TrialResult, progress: TrialProgress | None) -> TrialResult:
        if progress is None:
            return record
        timing = Timing(
            data_s=progress.data_s,
            model_s=progress.model_s,
            training_s=progress.training_s,
            evaluation_s=progress.evaluation_s,
            saving_s=progress.saving_s,
        )
        launched_at = self._launched_at[record.trial_id]
        if record.trial_id not in self._startup_s:
            # One that went on from a checkpoint tells of the runs before it too.
            before_s = record.timing.phases_s - record.timing.startup_s
            known_s = max(0.0, timing.phases_s - before_s)
            new_s = max(0.0, time.time() - launched_at - known_s)
            self._startup_s[record.trial_id] = record.timing.startup_s + new_s
        planned = record.peak_memory
        last = progress.last
        return record.model_copy(
            update={
                "best": progress.best,
                "last": last,
                "steps": last.step if last else 0,
                "tokens": last.tokens if last else 0,
                "tokens_per_s": last.tokens_per_s if last else None,
                "step_time_s": last.step_time_s if last else None,
                "trainable_parameters": progress.trainable_parameters,
                "peak_memory": PeakMemory(
                    predicted_bytes=planned.predicted_bytes if planned else None,
                    available_bytes=planned.available_bytes if planned else None,
                    measured_bytes=progress.peak_memory_bytes,
                    reserved_bytes=progress.reserved_bytes,
                    kind=progress.memory_kind,
                ),
                "timing": timing.model_copy(
                    update={
                        "startup_s": self._startup_s[record.trial_id],
                        "queued_s": max(0.0, launched_at - self.started_at),
                        # Of the runs and slots before this one, until the trial has ended.
                        "total_s": record.timing.total_s,
                        "earlier_s": record.timing.earlier_s,
                    }
                ),
                "hosts": (progress.host,),
                "devices": (progress.device,),
                "adapter": "adapter" if progress.has_adapter else None,
            }
        )

    def _ended(self, record: TrialResult, status: TrialStatus, reason: str | None) -> TrialResult:
        """The final record, of what its workers have left."""
        launched_at = self._launched_at.get(record.trial_id)
        update: dict[str, Any] = {"status": status, "reason": reason}
        # Of one that waited to go on, the run before may have died without a look at what it left.
        if launched_at is not None or record.last:
            record = self._as_left(record)
        if launched_at:
            total_s = record.timing.total_s + time.time() - launched_at
            update["timing"] = record.timing.model_copy(update={"total_s": total_s})
        return record.model_copy(update=update)

    def _as_left(self, record: TrialResult) -> TrialResult:
        if not self._fetch(record.trial_id):
            # What the trial told is more than is known here.
            self._unseen.add(record.trial_id)
            return record
        return as_left_on_disk(record, self._folder.trial(record.trial_id), self._best_by)


def share_names(model: BaseModel) -> None:
    """Let a record, and what is in it, keep one copy of its fields' names with all that are alike.

    A set of those that were set, for each, is three fifths of what a record takes, and what came by message has names
    of its own (pydantic 2.14); a sweep keeps thousands. Copies of a model get a set of their own, so that nobody
    changes a shared one.
    """
    names = frozenset(model.model_fields_set)
    object.__setattr__(model, "__pydantic_fields_set__", _NAMES.setdefault(names, set(names)))
    object.__setattr__(model, "__dict__", {sys.intern(name): value for name, value in vars(model).items()})
    for value in vars(model).values():
        if isinstance(value, BaseModel):
            share_names(value)


_NAMES: dict[frozenset[str], set[str]] = {}


def _without_secrets(record: TrialResult) -> TrialResult:
    notes = tuple(without_secret(note) for note in record.notes)
    return record.model_copy(update={"reason": record.reason and without_secret(record.reason), "notes": notes})


def _last_words(trial: Any) -> str:
    """The last of the errors that Tune keeps in the trial's folder."""
    return Path(trial.error_file).read_text().strip().rpartition("Failure # ")[2] if trial.error_file else ""
