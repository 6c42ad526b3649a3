"""MLflow: a parent run a sweep, a nested run a trial; the only writer there.

What a trial logs is on disk first (metrics.jsonl, with time stamps). A thread carries it over and can be as slow as the
server is: no trial waits for it. Runs are found again by their tags, so a resumed sweep goes on in the same ones.
"""

from __future__ import annotations

import logging
import os
import threading

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag, ViewType
from mlflow.exceptions import MlflowException

from orchestrator.config.sweep_config import SweepConfig
from orchestrator.errors import TrackingUnreachableError
from orchestrator.results.provenance import without_secret
from orchestrator.results.records import MetricPoint, SweepResult, TrialResult, TrialStatus
from orchestrator.results.remote import local_storage
from orchestrator.results.storage import SweepFolder
from orchestrator.sweep.logged_data import dataset_inputs
from orchestrator.training.data import read_summary

log = logging.getLogger(__name__)
INTERVAL_S = 1.0
BATCH = 1000
METRICS = (
    "loss",
    "eval_loss",
    "learning_rate",
    "grad_norm",
    "tokens_per_s",
    "step_time_s",
    "peak_memory_bytes",
)
RUN_STATUS = {
    TrialStatus.COMPLETED: "FINISHED",
    TrialStatus.STOPPED: "FINISHED",
    TrialStatus.INFEASIBLE: "FAILED",
    TrialStatus.CANCELLED: "KILLED",
    TrialStatus.PREEMPTED: "KILLED",
}


def tracking_uri(sweep: SweepConfig) -> str:
    """The server that the sweep file names, or MLFLOW_TRACKING_URI, or a database in the storage folder."""
    storage = local_storage(sweep.storage)
    return sweep.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{storage / 'mlflow.db'}"


class Tracker:
    """Writes one sweep to MLflow; every method but the constructor returns at once."""

    def __init__(self, sweep: SweepConfig, sweep_id: str, folder: SweepFolder) -> None:
        """Find or make the parent run.

        Raises:
            TrackingUnreachableError: the server does not answer.
        """
        # MLflow itself would try for four minutes (3.17.2); what fails now is on disk and carried over later.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        # A new database tells of its tables otherwise.
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        self._folder, self._sweep_id, self._sweep = folder, sweep_id, sweep
        uri = tracking_uri(sweep)
        try:
            self._client = MlflowClient(uri)
            self._experiment_id = self._find_experiment(sweep, uri)
            self.parent_run_id = self._find_run(sweep.name, {})
            self._resume()
        except (MlflowException, OSError) as error:
            raise TrackingUnreachableError(
                f"the tracking server at {without_secret(uri)} does not answer ({_first_line(error)}): start it, "
                "or leave tracking.uri out to track in a local database"
            ) from error
        self._trials: dict[str, _TrackedTrial] = {}
        self._wake = threading.Event()
        self._closing = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def track(self, result: TrialResult) -> None:
        """Take note of a trial's newest state."""
        with self._lock:
            trial = self._trials.setdefault(result.trial_id, _TrackedTrial())
            trial.result = result
        if result.status is not TrialStatus.RUNNING:
            self._wake.set()

    def run_id(self, trial_id: str) -> str | None:
        """The trial's run, once there is one."""
        trial = self._trials.get(trial_id)
        return trial.run_id if trial else None

    def finish(self, limit_s: float) -> bool:
        """Carry everything over; False where that was not done within `limit_s`."""
        self._closing = True
        self._wake.set()
        self._thread.join(limit_s)
        return not self._thread.is_alive() and not any(trial.is_behind for trial in self._trials.values())

    def close_parent(self, sweep: SweepResult, best: TrialResult | None) -> None:
        """Put the sweep's own files on the parent run and end it; call after `finish`."""
        run = self.parent_run_id
        for file in (self._folder.sweep_file, self._folder.plan, self._folder.results_json):
            self._client.log_artifact(run, str(file))
        for file in (self._folder.results_csv, self._folder.report):
            if file.exists():
                self._client.log_artifact(run, str(file))
        if best and best.best:
            value = getattr(best.best, sweep.objective_metric)
            if value is not None:
                self._client.log_metric(run, f"best_{sweep.objective_metric}", value)
            self._client.set_tag(run, "best_trial", best.trial_id)
        self._client.set_terminated(run, "KILLED" if sweep.interrupted else "FINISHED")

    def _find_experiment(self, sweep: SweepConfig, uri: str) -> str:
        name = sweep.tracking.experiment or sweep.name
        found = self._client.get_experiment_by_name(name)
        if found:
            if found.lifecycle_stage == "deleted":
                self._client.restore_experiment(found.experiment_id)
            return str(found.experiment_id)
        local = uri.startswith("sqlite:")
        artifacts = local_storage(sweep.storage) / "mlartifacts"
        # Without it MLflow's pages open on traces and judges of language-model applications (mlflow 3.17).
        kind = {"mlflow.experimentKind": "custom_model_development"}
        return str(self._client.create_experiment(name, artifacts.as_uri() if local else None, kind))

    def _find_run(self, name: str, tags: dict[str, str]) -> str:
        wanted = {"sweep_id": self._sweep_id, **tags}
        condition = " and ".join(f"tags.{key} = '{value}'" for key, value in wanted.items())
        if not tags:
            condition += " and tags.kind = 'sweep'"
        found = self._client.search_runs([self._experiment_id], condition, ViewType.ACTIVE_ONLY, 1)
        if found:
            return str(found[0].info.run_id)
        kind = {"mlflow.parentRunId": self.parent_run_id, "kind": "trial"} if tags else {"kind": "sweep"}
        run = self._client.create_run(self._experiment_id, run_name=name, tags={**wanted, **kind})
        return str(run.info.run_id)

    def _resume(self) -> None:
        self._client.update_run(self.parent_run_id, status="RUNNING")
        if self._sweep.question:
            self._client.set_tag(self.parent_run_id, "mlflow.note.content", self._sweep.question)
        settings = {"model": self._sweep.model, "data": self._sweep.data.train}
        self._client.log_batch(self.parent_run_id, params=[Param(k, v) for k, v in settings.items()])
        if summary := read_summary(self._folder.data):
            self._client.log_inputs(self.parent_run_id, dataset_inputs(self._sweep.data, summary))

    def _work(self) -> None:
        while True:
            self._wake.wait(INTERVAL_S)
            self._wake.clear()
            closing = self._closing
            with self._lock:
                behind = [trial for trial in self._trials.values() if trial.is_behind or trial.is_running]
            for trial in behind:
                try:
                    self._carry(trial)
                except (MlflowException, OSError) as error:
                    # On disk all the same: the next round, or the next run of the sweep, tries again.
                    log.warning("MLflow: %s", _first_line(error))
                    break
            if closing:
                return

    def _carry(self, trial: _TrackedTrial) -> None:
        with self._lock:
            result = trial.result
        assert result is not None
        if trial.run_id is None:
            trial.run_id = self._open_trial(result)
        points, offset_bytes = self._certain_points(result, trial.offset_bytes)
        for start in range(0, len(points), BATCH // len(METRICS)):
            some = points[start : start + BATCH // len(METRICS)]
            self._client.log_batch(trial.run_id, metrics=[m for point in some for m in metrics_of(point)])
        # Moved only once all of it has arrived: what is logged twice is still one point.
        trial.offset_bytes = offset_bytes
        if result.status is not trial.carried:
            if result.status is not TrialStatus.RUNNING:
                self._close_trial(trial.run_id, result)
            trial.carried = result.status

    def _certain_points(self, result: TrialResult, offset_bytes: int) -> tuple[tuple[MetricPoint, ...], int]:
        """The points that no trial will make again: MLflow cannot take one back, and would have its step twice."""
        folder = self._folder.trial(result.trial_id)
        if result.status.is_final:
            return folder.read_metrics_from(offset_bytes)
        steps = folder.checkpoint_steps()
        # Without a checkpoint it would begin again, and its curve with it.
        return folder.read_metrics_from(offset_bytes, steps[-1]) if steps else ((), 0)

    def _open_trial(self, result: TrialResult) -> str:
        run_id = self._find_run(result.trial_id, {"trial_id": result.trial_id})
        params = {"repeat": result.repeat, **result.config.model_dump(mode="json")}
        self._client.log_batch(
            run_id,
            params=[Param(key, str(value)) for key, value in params.items()],
            tags=[RunTag("configuration_id", result.configuration_id)],
        )
        self._client.update_run(run_id, status="RUNNING")
        return run_id

    def _close_trial(self, run_id: str, result: TrialResult) -> None:
        tags = {"status": result.status.value, "reason": result.reason or "", "notes": "; ".join(result.notes)}
        self._client.log_batch(run_id, tags=[RunTag(key, value[:5000]) for key, value in tags.items() if value])
        if result.best and result.status.is_final:
            value = getattr(result.best, self._sweep.objective.metric)
            if value is not None:
                self._client.log_metric(run_id, f"best_{self._sweep.objective.metric}", value, result.best.time_ms)
        self._log_searched_numbers(run_id, result)
        trial = self._folder.trial(result.trial_id)
        for file in (trial.deepspeed, trial.log, trial.result):
            if file.exists():
                self._client.log_artifact(run_id, str(file))
        if trial.adapter.is_dir():
            self._client.log_artifacts(run_id, str(trial.adapter), "adapter")
        self._client.set_terminated(run_id, RUN_STATUS.get(result.status, "FAILED"))

    def _log_searched_numbers(self, run_id: str, result: TrialResult) -> None:
        """As metrics too: MLflow sorts parameters as text, 128 before 8 (3.17.2)."""
        values = {name: getattr(result.config, name) for name in self._sweep.domains}
        numbers = {name: value for name, value in values.items() if type(value) in (int, float)}
        metrics = [Metric(f"setting/{name}", value, 0, 0) for name, value in numbers.items()]
        self._client.log_batch(run_id, metrics=metrics)


class _TrackedTrial:
    """How much of a trial MLflow has."""

    def __init__(self) -> None:
        self.result: TrialResult | None = None
        self.run_id: str | None = None
        self.offset_bytes = 0
        self.carried: TrialStatus | None = None

    @property
    def is_running(self) -> bool:
        return self.result is not None and self.result.status is TrialStatus.RUNNING

    @property
    def is_behind(self) -> bool:
        return self.result is not None and self.carried is not self.result.status


def metrics_of(point: MetricPoint) -> list[Metric]:
    """A line of metrics.jsonl with its own time stamp: logged twice it is still one point."""
    return [
        Metric(name, float(value), point.time_ms, point.step)
        for name in METRICS
        if (value := getattr(point, name)) is not None
    ]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:300]
