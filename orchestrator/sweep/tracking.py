"""MLflow: a parent run a sweep, a nested run a trial; the only writer there.

What a trial logs is on disk first (metrics.jsonl, with time stamps). A thread carries it over and can be as slow as the
server is: no trial waits for it. Runs are found again by their tags, so a resumed sweep goes on in the same ones."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag, ViewType
from mlflow.exceptions import MlflowException

from orchestrator.config.sweep_config import SweepConfig
from orchestrator.errors import StorageError, TrackingUnreachableError, cut
from orchestrator.reporting.quantities import memory
from orchestrator.reporting.statistics import objective_of
from orchestrator.results.folders import SweepFolder
from orchestrator.results.records import MetricPoint, SweepResult, TrialResult, TrialStatus
from orchestrator.results.remote import local_storage
from orchestrator.results.secrets import without_secret
from orchestrator.sweep import failure_policy, own_database
from orchestrator.sweep.delivered import TrialDelivery, read_delivered, remember_server, write_delivered
from orchestrator.sweep.logged_data import dataset_inputs
from orchestrator.sweep.mlflow_patience import (
    failure_meant,
    in_time,
    is_misread,
    is_servers,
    keep_mlflow_short,
    may_come_up,
    time_to_upload,
    twice,
)
from orchestrator.sweep.mlflow_runs import (
    METRICS,
    deleted_words,
    has_all,
    is_deleted,
    key_of,
    log_latest,
    metrics_of,
    run_name,
    started_from,
)
from orchestrator.sweep.tracking_address import first_line, tracking_uri
from orchestrator.sweep.trial_files import weights_on_this_node
from orchestrator.training.data import read_summary

log = logging.getLogger(__name__)
INTERVAL_S = 1.0
KEPT_EVERY_S = 5.0
BATCH = 1000
PAGE = 200
"""Of runs with all that they hold."""
DAMAGED = ("file is not a database", "database disk image is malformed")
"""SQLite's own words (SQLITE_NOTADB, SQLITE_CORRUPT)."""
LOGIN_REFUSED = frozenset({"UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED", "PERMISSION_DENIED"})
"""MLflow's codes for 401 and 403 (3.17.2, exceptions.py)."""
END_TAGS = frozenset({"status", "reason", "notes"})
"""Of a trial's run: how the trial ended."""
PARENT = "mlflow.parentRunId"
"""MLflow's own tag."""
RUN_STATUS = {
    TrialStatus.COMPLETED: "FINISHED",
    TrialStatus.STOPPED: "FINISHED",
    TrialStatus.INFEASIBLE: "FAILED",
    TrialStatus.CANCELLED: "KILLED",
    TrialStatus.PREEMPTED: "KILLED",
}


class Tracker:
    """Writes one sweep to MLflow; every method but the constructor returns at once."""

    def __init__(self, sweep: SweepConfig, sweep_id: str, folder: SweepFolder) -> None:
        """Find or make the parent run.

        Raises:
            TrackingUnreachableError: the server does not answer, or lets this account do nothing.
        """
        keep_mlflow_short()
        self._folder, self._sweep_id, self._sweep = folder, sweep_id, sweep
        uri = self._uri = tracking_uri(sweep)
        self._delivered = read_delivered(folder, without_secret(uri), sweep_id)
        self._delivered.is_complete = False
        try:
            twice(lambda: self._connect(uri))
        except Exception as error:
            if not is_servers(error):
                raise
            where, why = cut(without_secret(uri)), first_line(error, uri)
            if getattr(error, "error_code", None) in LOGIN_REFUSED:
                raise TrackingUnreachableError(
                    f"the tracking server at {where} refuses this account ({why}): "
                    "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, to one that "
                    "may write there"
                ) from error
            if uri.startswith("sqlite:") and any(words in str(error) for words in DAMAGED):
                raise TrackingUnreachableError(
                    f"MLflow's database {where} is damaged ({why}): put it back, "
                    "or move it away, and a new one gets all that is on disk"
                ) from error
            if is_misread(error):
                raise TrackingUnreachableError(
                    f"the tracking server at {where} answers otherwise than MLflow does ({why}): name the address of "
                    "an MLflow server, or leave tracking.uri out to track in a local database"
                ) from error
            raise TrackingUnreachableError(
                f"the tracking server at {where} does not answer ({why}): start it, "
                "or leave tracking.uri out to track in a local database"
            ) from error
        remember_server(without_secret(uri))
        self._trials: dict[str, _TrackedTrial] = {}
        # An older release kept no such file, but a run's id once all of the trial had arrived.
        self._believes_records = not folder.tracking.exists()
        self._is_kept, self._kept_at_s = False, 0.0
        self._failures = 0
        """In a row, of who is away: the server, or the store that the sweep lies in."""
        self._away = ""
        self._wake = threading.Event()
        self._closing_until_s: float | None = None
        self._sends_files = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _connect(self, uri: str) -> None:
        self._client = MlflowClient(uri)
        self._experiment_id = self._find_experiment(self._sweep, uri)
        self.parent_run_id = self._find_run(self._sweep.name, {})
        self._resume()
        self._take_in_orphans()
        if self._delivered.trials:
            self._forget_what_is_lost()

    def track(self, result: TrialResult) -> None:
        """Take note of a trial's newest state."""
        with self._lock:
            if result.trial_id not in self._trials:
                kept = self._delivered.trials.get(result.trial_id)
                if kept is None and self._believes_records and result.mlflow_run_id:
                    kept = TrialDelivery(run_id=result.mlflow_run_id, status=result.status)
                self._trials[result.trial_id] = _TrackedTrial(kept or TrialDelivery(), result)
            self._trials[result.trial_id].result = result
        if result.status is not TrialStatus.RUNNING:
            self._wake.set()

    def run_id(self, trial_id: str) -> str | None:
        """The trial's run, once MLflow has all of it."""
        trial = self._trials.get(trial_id)
        return trial.run_id if trial and not trial.is_behind else None

    def refused(self) -> list[str]:
        """The trials that MLflow lacks for good, or until a person mends what it refuses them for."""
        return [trial_id for trial_id, trial in self._trials.items() if trial.is_refused]

    def finish(self, limit_s: float, wait: Callable[[str], None] | None = None) -> bool:
        """Carry everything over; False where that was not done within `limit_s`.

        wait: files that arrive may take longer than that, which it is told once; None: they may not.
        """
        with self._lock:
            for trial in self._trials.values():
                # Once more: of a database that fails MLflow may say BAD_REQUEST (3.17.2, store/db/utils.py).
                trial.is_refused = False
        self._closing_until_s = time.monotonic() + limit_s
        self._wake.set()
        self._thread.join(limit_s)
        is_told = False
        while wait and self._thread.is_alive() and (self._sends_files or time.monotonic() < self._closing_until_s):
            if self._sends_files and not is_told:
                wait(f"waiting for MLflow to take {memory(self._owed_bytes())}")
                is_told = True
            self._thread.join(INTERVAL_S)
        return not self._thread.is_alive() and not any(trial.is_behind for trial in self._trials.values())

    def _owed_bytes(self) -> int:
        behind = [trial for trial in self._trials.values() if trial.is_behind]
        files = [file for trial in behind for part in self._files(trial.result) for file in part]
        return sum(file.stat().st_size for file in files)

    def close_parent(self, sweep: SweepResult, best: TrialResult | None) -> bool:
        """Put the sweep's own files on the parent run and end it, after `finish`; False where MLflow has gone away."""
        try:
            twice(lambda: self._close_parent(sweep, best))
            self._delivered.is_complete = True
            write_delivered(self._folder, self._delivered)
        except Exception as error:
            # Its stores' clients raise kinds of their own, as boto3 does, and packages may be missing.
            log.warning("MLflow did not take the sweep's own files: %s", first_line(error, self._uri))
            return False
        return True

    def _close_parent(self, sweep: SweepResult, best: TrialResult | None) -> None:
        run = self.parent_run_id
        own = self._folder
        for file in (own.sweep_file, own.plan, own.results_json, own.results_csv, own.report):
            if own.holds(file):
                self._client.log_artifact(run, str(file))
        if best and best.best:
            if (value := objective_of(sweep, best)) is not None:
                log_latest(self._client, run, {f"best_{key_of(sweep.objective_metric)}": value})
            self._client.set_tag(run, "best_trial", best.trial_id)
        self._client.set_terminated(run, "KILLED" if sweep.interrupted else "FINISHED", sweep.ended_ms)

    def _find_experiment(self, sweep: SweepConfig, uri: str) -> str:
        name = sweep.tracking.experiment or sweep.name
        storage = local_storage(sweep.storage)
        # The first question that a server is asked.
        found = in_time(lambda: self._client.get_experiment_by_name(name), uri)
        if found:
            if found.lifecycle_stage == "deleted":
                self._client.restore_experiment(found.experiment_id)
            location = found.artifact_location
            if uri == own_database.address(storage) and own_database.is_left_behind(location, storage):
                own_database.bring_along(location, storage)
            return str(found.experiment_id)
        local = uri.startswith("sqlite:")
        # Without it MLflow's pages open on traces and judges of language-model applications (mlflow 3.17).
        kind = {"mlflow.experimentKind": "custom_model_development"}
        return str(self._client.create_experiment(name, own_database.artifacts(storage) if local else None, kind))

    def _find_run(self, name: str, tags: dict[str, str]) -> str:
        wanted = {"sweep_id": self._sweep_id, **tags}
        condition = " and ".join(f"tags.{key} = '{value}'" for key, value in wanted.items())
        if not tags:
            condition += " and tags.kind = 'sweep'"
        found = self._client.search_runs([self._experiment_id], condition, ViewType.ACTIVE_ONLY, 1)
        if found:
            return str(found[0].info.run_id)
        kind = {PARENT: self.parent_run_id, "kind": "trial"} if tags else {"kind": "sweep"}
        run = self._client.create_run(self._experiment_id, run_name=name, tags={**wanted, **kind})
        return str(run.info.run_id)

    def _forget_what_is_lost(self) -> None:
        """Where the server's database is an older one again, all it lacks is told once more."""
        # Runs that a person has deleted too: they are not to come back.
        there = {run.info.run_id: run for run in self._runs(ViewType.ALL)}
        self._delivered.trials = {
            trial_id: kept
            if has_all(there[kept.run_id], kept)
            else kept.model_copy(update={"offset_bytes": 0, "status": None})
            for trial_id, kept in self._delivered.trials.items()
            if kept.run_id in there
        }

    def _take_in_orphans(self) -> None:
        """Nest the trials' runs below this parent where a person has deleted the one before."""
        elsewhere = f" and tags.kind = 'trial' and tags.`{PARENT}` != '{self.parent_run_id}'"
        for run in self._runs(ViewType.ACTIVE_ONLY, elsewhere):
            self._client.set_tag(run.info.run_id, PARENT, self.parent_run_id)

    def _runs(self, which: str, condition: str = "") -> list[Run]:
        """All of the sweep."""
        asked: Any = ([self._experiment_id], f"tags.sweep_id = '{self._sweep_id}'{condition}", which, PAGE)
        page = self._client.search_runs(*asked)
        runs = list(page)
        while page.token:
            page = self._client.search_runs(*asked, page_token=page.token)
            runs += page
        return runs

    def _resume(self) -> None:
        self._client.update_run(self.parent_run_id, status="RUNNING")
        if self._sweep.question:
            self._client.set_tag(self.parent_run_id, "mlflow.note.content", self._sweep.question)
        settings = {"model": without_secret(self._sweep.model), "data": without_secret(self._sweep.data.train)}
        self._client.log_batch(self.parent_run_id, params=[Param(k, v) for k, v in settings.items()])
        if summary := read_summary(self._folder.data):
            self._client.log_inputs(self.parent_run_id, dataset_inputs(self._sweep.data, summary))

    def _work(self) -> None:
        while True:
            is_away = self._failures and self._closing_until_s is None
            self._wake.wait(failure_policy.pause_s(self._failures) if is_away else INTERVAL_S)
            self._wake.clear()
            is_closing = self._closing_until_s is not None
            with self._lock:
                behind = [trial for trial in self._trials.values() if trial.is_behind or trial.is_running]
            # One whose files do not arrive keeps nobody waiting.
            behind.sort(key=lambda trial: trial.late)
            self._carry_all(behind)
            # Of the limit as it is now: files that have arrived have moved it.
            is_late = self._closing_until_s is not None and time.monotonic() > self._closing_until_s
            if is_closing and (is_late or not any(trial.is_behind for trial in behind)):
                return

    def _carry_all(self, trials: Sequence[_TrackedTrial]) -> None:
        """Carry over until the server fails; what it refuses is left, and harms no other trial."""
        for trial in trials:
            try:
                was_asked = self._carry(trial)
            except Exception as error:
                # Of a store's client, or of a package that it lacks: the other trials' figures need it not.
                meaning = failure_meant(error)
                if meaning == "gone" and trial.run_id:
                    trial.forget_run()
                elif meaning != "away":
                    trial.is_refused = True
                    self._tell_refusal(trial, error)
                else:
                    self._failures += 1
                    if self._failures == 1:
                        self._away = "the sweep's storage" if isinstance(error, StorageError) else "MLflow"
                        told = "%s does not answer; what MLflow lacks is carried over later: %s"
                        log.warning(told, self._away, first_line(error, self._uri))
                    break
            else:
                # Where there was nothing to tell, the server was not asked, and may be away as before.
                if was_asked and self._failures:
                    log.warning("%s answers again", self._away)
                    self._failures = 0
        self._keep(trials)

    def _tell_refusal(self, trial: _TrackedTrial, error: Exception) -> None:
        """Once, with what helps."""
        why = first_line(error, self._uri)
        # What is asked here may fail as all else.
        with contextlib.suppress(Exception):
            if trial.run_id and is_deleted(self._client.get_run(trial.run_id)):
                why = deleted_words(trial.run_id, self._uri)
        if why != trial.refusal:
            log.warning("MLflow refuses trial %s: %s", trial.result.trial_id, why)
        trial.refusal = why

    def _keep(self, trials: Sequence[_TrackedTrial]) -> None:
        """On disk, how much has arrived: what is not known to have is told again, which adds nothing."""
        for trial in trials:
            before = self._delivered.trials.get(trial.result.trial_id)
            if trial.delivery != before:
                self._delivered.trials[trial.result.trial_id] = trial.delivery
                self._is_kept = False
        now_s = time.monotonic()
        if self._is_kept or (now_s - self._kept_at_s < KEPT_EVERY_S and not self._closing_until_s):
            return
        try:
            write_delivered(self._folder, self._delivered)
        except StorageError as error:
            log.warning("%s", error)
        self._is_kept, self._kept_at_s = True, now_s

    def _carry(self, trial: _TrackedTrial) -> bool:
        """Whether the server was asked: of a running trial there may be nothing new."""
        with self._lock:
            result = trial.result
        began_ms = self._folder.trial(result.trial_id).began_ms()
        if trial.run_id and trial.began_ms and began_ms not in (None, trial.began_ms):
            # It began again: MLflow can take no point back, and would have steps of both curves.
            self._leave_run(trial.run_id, result.trial_id)
            trial.forget_run()
        was_open = trial.is_open
        if not was_open:
            trial.run_id = self._open_trial(result, trial.run_id)
            trial.is_open = True
        assert trial.run_id is not None
        points, offset_bytes = self._certain_points(result, trial.offset_bytes)
        if points:
            trial.began_ms = began_ms
        for start in range(0, len(points), BATCH // len(METRICS)):
            some = points[start : start + BATCH // len(METRICS)]
            self._client.log_batch(trial.run_id, metrics=[m for point in some for m in metrics_of(point)])
        # Moved only once all of it has arrived: what is logged twice is still one point.
        trial.offset_bytes = offset_bytes
        is_new = result.status is not trial.carried
        if is_new:
            if result.status is not TrialStatus.RUNNING:
                self._close_trial(trial, trial.run_id, result)
            trial.carried = result.status
        return bool(points) or is_new or not was_open

    def _leave_run(self, run_id: str, trial_id: str) -> None:
        """Delete it, or let no search for the trial find it where this account may only edit."""
        try:
            self._client.delete_run(run_id)
        except MlflowException as error:
            if error.error_code != "PERMISSION_DENIED":
                raise
            self._client.log_batch(
                run_id, tags=[RunTag("trial_id", f"{trial_id}, begun again"), RunTag("kind", "left")]
            )
            self._client.set_terminated(run_id, "KILLED")

    def _certain_points(self, result: TrialResult, offset_bytes: int) -> tuple[tuple[MetricPoint, ...], int]:
        """The points that no trial will make again: MLflow cannot take one back, and would have its step twice."""
        folder = self._folder.trial(result.trial_id)
        if result.status.is_final:
            return folder.read_metrics_from(offset_bytes)
        steps = folder.checkpoint_steps()
        # Without a checkpoint it would begin again, and its curve with it.
        return folder.read_metrics_from(offset_bytes, steps[-1]) if steps else ((), offset_bytes)

    def _open_trial(self, result: TrialResult, run_id: str | None) -> str:
        """The trial's run, found again or made; a parameter that an earlier run of the sweep logged stays as it is."""
        run_id = run_id or self._find_run(run_name(result, tuple(self._sweep.domains)), {"trial_id": result.trial_id})
        params = {"repeat": result.repeat, **result.config.model_dump(mode="json")}
        data = self._client.get_run(run_id).data
        there = data.params
        for key in END_TAGS & data.tags.keys():
            # Of an earlier attempt, which went on or is told once more: what has no value now would stay.
            self._client.delete_tag(run_id, key)
        self._client.log_batch(
            run_id,
            params=[Param(key, str(value)) for key, value in params.items() if key not in there],
            tags=[RunTag("configuration_id", result.configuration_id), *started_from(result)]
            + [
                RunTag(f"now.{key}", str(value))
                for key, value in params.items()
                if there.get(key, str(value)) != str(value)
            ],
        )
        self._client.update_run(run_id, status="RUNNING")
        return run_id

    def _close_trial(self, tracked: _TrackedTrial, run_id: str, result: TrialResult) -> None:
        tags = {"status": result.status.value, "reason": result.reason or "", "notes": "; ".join(result.notes)}
        self._client.log_batch(run_id, tags=[RunTag(key, value[:5000]) for key, value in tags.items() if value])
        if result.best and result.status.is_final:
            value = result.measured(self._sweep.primary.metric)
            if value is not None:
                self._client.log_metric(run_id, f"best_{self._sweep.primary.metric}", value, result.best.time_ms)
        self._log_searched_numbers(run_id, result)
        try:
            self._send_files(tracked, run_id, result)
        except (MlflowException, StorageError):
            tracked.late += 1
            raise
        self._client.set_terminated(run_id, RUN_STATUS.get(result.status, "FAILED"))

    def _send_files(self, tracked: _TrackedTrial, run_id: str, result: TrialResult) -> None:
        files, adapter = self._files(result)
        own = self._folder.trial(result.trial_id)
        began_s = time.monotonic()
        self._sends_files = True
        try:
            with contextlib.ExitStack() as stack:
                if self._folder.remote and tracked.had_ended and result.adapter:
                    # What this run did not train it has not fetched.
                    weights = weights_on_this_node(self._folder.location(own.adapter))
                    adapter = list(stack.enter_context(weights).glob("*"))
                stack.enter_context(time_to_upload([*files, *adapter], tracked.late))
                for file in files:
                    if file == own.log:
                        # Of a trial whose worker was lost it is as the trial left it.
                        text = file.read_text(encoding="utf-8", errors="replace")
                        self._client.log_text(run_id, without_secret(text), file.name)
                    else:
                        self._client.log_artifact(run_id, str(file))
                if adapter:
                    self._client.log_artifacts(run_id, str(adapter[0].parent), "adapter")
            if self._closing_until_s is not None:
                # Of a server that takes them: one that does not has no more time than `finish` gives it.
                self._closing_until_s += time.monotonic() - began_s
        finally:
            self._sends_files = False

    def _files(self, result: TrialResult) -> tuple[list[Path], list[Path]]:
        """What of a trial is here to be sent, and the files of its adapter."""
        trial = self._folder.trial(result.trial_id)
        files = [file for file in (trial.deepspeed, trial.log, trial.result) if self._folder.holds(file)]
        adapter = list(trial.adapter.iterdir()) if trial.adapter.is_dir() else []
        return files, adapter if all(self._folder.holds(file) for file in adapter) else []

    def _log_searched_numbers(self, run_id: str, result: TrialResult) -> None:
        """As metrics too: MLflow sorts parameters as text, 128 before 8 (3.17.2)."""
        values = {name: getattr(result.config, name) for name in self._sweep.domains}
        numbers = {name: value for name, value in values.items() if type(value) in (int, float)}
        metrics = [Metric(f"setting/{name}", value, 0, 0) for name, value in numbers.items()]
        self._client.log_batch(run_id, metrics=metrics)


def awaited_tracker(
    sweep: SweepConfig, sweep_id: str, folder: SweepFolder, limit_s: float, say: Callable[[str], None]
) -> Tracker:
    """A Tracker once its server answers: one that is deployed together with the sweep may need minutes more.

    Raises:
        TrackingUnreachableError: it does not answer within `limit_s` either, or more time would not help.
    """
    until_s = time.monotonic() + limit_s
    attempt = 0
    while True:
        try:
            return Tracker(sweep, sweep_id, folder)
        except TrackingUnreachableError as error:
            if time.monotonic() >= until_s or not may_come_up(error.__cause__):
                raise
            attempt += 1
            if attempt == 1:
                say(f"{error}; waiting for it, {limit_s / 60:.0f} minutes at most")
        time.sleep(failure_policy.pause_s(min(attempt, 4)))


class _TrackedTrial:
    """How much of a trial MLflow has."""

    def __init__(self, kept: TrialDelivery, result: TrialResult) -> None:
        self.result = result
        self.run_id, self.offset_bytes, self.carried = kept.run_id, kept.offset_bytes, kept.status
        self.began_ms = kept.began_ms
        self.is_open = False
        """Whether this process has set its run going."""
        self.is_refused = False
        self.refusal = ""
        """As it was told last."""
        self.had_ended = result.status is not TrialStatus.RUNNING
        """Before this process heard of it."""
        self.late = kept.late

    def forget_run(self) -> None:
        """It is gone: another one is made, and gets all there is."""
        self.run_id, self.offset_bytes, self.began_ms, self.carried, self.is_open = None, 0, None, None, False

    @property
    def delivery(self) -> TrialDelivery:
        return TrialDelivery(
            run_id=self.run_id,
            offset_bytes=self.offset_bytes,
            began_ms=self.began_ms,
            status=self.carried,
            late=self.late,
        )

    @property
    def is_running(self) -> bool:
        return self.result.status is TrialStatus.RUNNING and not self.is_refused

    @property
    def is_behind(self) -> bool:
        return self.carried is not self.result.status and not self.is_refused
