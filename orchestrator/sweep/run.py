"""One sweep from its file to its report: plan, launch, resume, finish."""

from __future__ import annotations

import functools
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray
from ray import tune

from orchestrator.config.storage_address import is_remote
from orchestrator.config.sweep_config import SweepConfig
from orchestrator.config.sweep_file import to_yaml
from orchestrator.config.trial_config import TrialConfig
from orchestrator.errors import StorageError
from orchestrator.planning.plan import PlannedTrial
from orchestrator.reporting import report, statistics
from orchestrator.reporting.findings import Report
from orchestrator.reporting.recommendation import trial_to_take
from orchestrator.results import provenance
from orchestrator.results.records import PeakMemory, Suggestion, SweepResult, TrialResult, TrialStatus
from orchestrator.results.remote import sweep_folder
from orchestrator.results.storage import (
    SweepFolder,
    is_storage_failure,
    read_sweep,
    write_atomically,
    write_result,
    write_sweep,
)
from orchestrator.sweep import cluster, evaluation, logged_model, system_metrics
from orchestrator.sweep.callbacks import Callbacks
from orchestrator.sweep.carrier import Carrier, carried
from orchestrator.sweep.folder_lock import only_one
from orchestrator.sweep.gauges import Gauges
from orchestrator.sweep.preparation import Prepared, prepare
from orchestrator.sweep.progress import Progress
from orchestrator.sweep.recorder import Recorder
from orchestrator.sweep.resume import Earlier, gone_on_with, kept, read_earlier, require_same_question, with_time_spent
from orchestrator.sweep.scheduler import RuleScheduler
from orchestrator.sweep.stopper import Stopper, signals_to, sigterm_like_ctrl_c
from orchestrator.sweep.suggestions import NewRecord, Suggestions, known_at_start
from orchestrator.sweep.tracking import Tracker, tracking_uri
from orchestrator.sweep.trial import TrialOnWorkers
from orchestrator.sweep.trial_queue import TrialQueue
from orchestrator.training.inputs import FoundModel
from orchestrator.training.task import TrialTask

Isolation = Literal["warm", "fresh"]
TRACKING_LIMIT_S = 60.0
INTERRUPTED_TRACKING_LIMIT_S = 5.0
"""Kubernetes gives 30 s from SIGTERM to SIGKILL; what MLflow lacks is on disk, and the next run carries it over."""
# A slot takes nothing: its workers do, in placement groups of their own, and there are never more slots than groups
# that fit. A slot that held a CPU could starve its own workers. Tune wants something (ray 2.60.0): a byte of memory.
SLOT = tune.PlacementGroupFactory([{"memory": 1}])


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a sweep ended."""

    sweep: SweepResult
    folder: SweepFolder
    report: Report
    tracked: bool
    """Whether MLflow has everything; what it lacks is on disk, and the next `run` carries it over."""

    tracking_uri: str

    @property
    def exit_code(self) -> int:
        """The contract's: 130 interrupted, 1 with trials that failed, 0 otherwise."""
        if self.sweep.interrupted:
            return 130
        return int(any(trial.status in (TrialStatus.FAILED, TrialStatus.PREEMPTED) for trial in self.sweep.trials))


def run(
    sweep: SweepConfig, model: FoundModel, address: str | None, isolation: Isolation, say: Callable[[str], None]
) -> Outcome:
    """Run a sweep, or go on with it where its folder has a part already; `model` is the sweep's, as `inputs` found it.

    Raises:
        InputError: it cannot be run as it is written; nothing was started.
        UnreachableError: the cluster, the tracking server or the storage.
    """
    if cluster.runs_in_a_job():
        sweep = _lasting(sweep)
    folder = sweep_folder(sweep.storage, sweep.name)
    if sweep.search.warm_start:
        # What it teaches is read later; that it is there is known before anything starts.
        read_sweep(SweepFolder(Path(sweep.search.warm_start).expanduser()))
    with only_one(folder), sigterm_like_ctrl_c(), carried(folder) as carrier:
        earlier = read_earlier(folder)
        if earlier:
            require_same_question(folder, earlier.sweep, sweep)
        try:
            ended = {name for name, trial in earlier.trials.items() if trial.status.is_final} if earlier else ()
            prepared = prepare(sweep, model, folder, address, ended, say)
            return _run_prepared(prepared, folder, carrier, earlier, isolation, say)
        finally:
            cluster.disconnect()


def _lasting(sweep: SweepConfig) -> SweepConfig:
    """A relative storage stands in the home folder, where a resubmitted job finds it again."""
    if is_remote(sweep.storage):
        return sweep
    return sweep.model_copy(update={"storage": str(Path.home() / Path(sweep.storage).expanduser())})


def _run_prepared(
    prepared: Prepared,
    folder: SweepFolder,
    carrier: Carrier,
    earlier: Earlier | None,
    isolation: Isolation,
    say: Callable[[str], None],
) -> Outcome:
    sweep = prepared.sweep
    if earlier:
        require_same_question(folder, earlier.sweep, sweep, knows_hardware=True)
    started_at = time.time()
    made_with = {"versions": provenance.versions(), "git": provenance.git_state(Path.cwd())}
    new_record = functools.partial(_new_record, prepared, made_with)
    records = _records(prepared, folder, earlier, new_record)
    result = _sweep_result(prepared, earlier, records, started_at)
    tracker = Tracker(sweep, result.sweep_id, folder)
    result = result.model_copy(update={"mlflow_run_id": tracker.parent_run_id})
    write_atomically(folder.sweep_file, provenance.without_secret(to_yaml(sweep)))
    write_atomically(folder.plan, prepared.plan.model_dump_json(indent=1) + "\n")
    for record in records.values():
        write_result(folder, record)
    write_sweep(folder, result)
    carrier.push()
    label = _labeller(result)
    progress = Progress(
        folder,
        records.values(),
        label,
        sweep.primary.metric,
        sweep.primary.mode,
        prepared.slots,
        {trial.trial_id: trial.seconds or 0.0 for trial in prepared.plan.trials},
        sweep.budget.hours,
    )
    gauges = Gauges(sweep.name, records.values(), sweep.primary.metric, sweep.primary.mode)
    callbacks = Callbacks(say)
    listeners = (carrier.track, tracker.track, gauges.track, progress, callbacks.track)
    predicted = functools.partial(_recorded_bytes, prepared)
    scheduler = RuleScheduler(sweep)
    if earlier:
        scheduler.hear_again(folder, records.values())
    recorder = Recorder(
        folder, records, started_at, prepared.board, scheduler.reasons, predicted, carrier.fetch, listeners
    )
    gpus = prepared.shape.workers * prepared.shape.gpus_per_worker
    stopper = Stopper(
        prepared.board, sweep.budget, lambda: recorder.trial_seconds() * gpus / 3600, lambda: recorder.storage_error
    )
    for record in records.values():
        if record.status is not TrialStatus.PENDING:
            tracker.track(record)
    _say_start(records, prepared, say)
    with progress, signals_to(stopper), system_metrics.logged(tracking_uri(sweep), tracker.parent_run_id):
        _tune(prepared, folder, recorder, new_record, scheduler, [recorder, progress], stopper, isolation)
    recorder.cancel_rest(stopper.reason or "the sweep ended before it: run the same command again")
    if recorder.storage_error:
        tracker.finish(INTERRUPTED_TRACKING_LIMIT_S)
        raise StorageError(
            f"the sweep was stopped, since nothing can be kept any more: {recorder.storage_error}. What had ended "
            "before is safe: run the same command again to go on"
        )
    outcome = _finish(prepared, result, recorder, tracker, folder, stopper, say)
    callbacks.sweep_ended(outcome.sweep, folder.root)
    return outcome


def _labeller(result: SweepResult) -> Callable[[TrialResult], str]:
    return lambda record: statistics.label(record, result.searched)


def _say_start(records: Mapping[str, TrialResult], prepared: Prepared, say: Callable[[str], None]) -> None:
    pending = sum(record.status is TrialStatus.PENDING for record in records.values())
    refused = sum(record.status is TrialStatus.INFEASIBLE for record in records.values())
    done = len(records) - pending - refused
    say(f"{pending} trials to run, {prepared.slots} at a time; {refused} refused; {done} done before")


def _records(
    prepared: Prepared, folder: SweepFolder, earlier: Earlier | None, new_record: NewRecord
) -> dict[str, TrialResult]:
    """What each trial starts with: as it ended before, refused, or pending, with what it had when it was cut off."""
    before = earlier.trials if earlier else {}
    records = {}
    for planned, suggestion in known_at_start(prepared, before.values()):
        old = before.get(planned.trial_id)
        if old and _stays(old, prepared.plan.worker_memory_bytes):
            records[planned.trial_id] = old
            continue
        new = new_record(planned, suggestion)
        records[planned.trial_id] = (
            with_time_spent(old, gone_on_with(old, new, folder.trial(planned.trial_id))) if old else new
        )
    return records | kept(earlier, frozenset(records)) if earlier else records


def _stays(record: TrialResult, available_bytes: int) -> bool:
    """Whether an end is final: refusals are made anew, and what ran out of memory may fit where there is more."""
    if record.status is TrialStatus.OUT_OF_MEMORY and record.peak_memory and record.peak_memory.available_bytes:
        return available_bytes <= record.peak_memory.available_bytes
    return record.status.is_final and record.status is not TrialStatus.INFEASIBLE


def _recorded_bytes(prepared: Prepared, config: TrialConfig) -> int:
    """What a record says was predicted: of the kind of memory that is measured here."""
    memory = prepared.estimate(config)
    allocated = memory.device_bytes if prepared.memory_kind == "resident" else memory.allocated_bytes
    assert allocated is not None
    return allocated


def _new_record(
    prepared: Prepared, made_with: Mapping[str, Any], planned: PlannedTrial, suggestion: Suggestion | None
) -> TrialResult:
    predicted = _recorded_bytes(prepared, planned.config) if planned.memory else None
    return TrialResult(
        trial_id=planned.trial_id,
        configuration_id=planned.configuration_id,
        status=TrialStatus.INFEASIBLE if planned.reasons else TrialStatus.PENDING,
        reason="; ".join(planned.reasons) or None,
        config=planned.config,
        repeat=planned.repeat,
        seed=planned.config.seed,
        suggestion=suggestion,
        **made_with,
        notes=planned.notes,
        predicted_step_time_s=prepared.step_seconds(planned.config).expected if planned.memory else None,
        peak_memory=PeakMemory(
            predicted_bytes=predicted, available_bytes=prepared.plan.worker_memory_bytes, kind=prepared.memory_kind
        ),
    )


def _sweep_result(
    prepared: Prepared, earlier: Earlier | None, records: Mapping[str, TrialResult], started_at: float
) -> SweepResult:
    sweep = prepared.sweep
    before = earlier.result if earlier else None
    searched = (*(before.searched if before else ()), *sweep.domains)
    return SweepResult(
        name=sweep.name,
        question=sweep.question,
        sweep_id=(earlier and earlier.sweep_id) or uuid.uuid4().hex[:12],
        model=sweep.model,
        objective_metric=sweep.primary.metric,
        objective_mode=sweep.primary.mode,
        objectives=tuple((objective.metric, objective.mode) for objective in sweep.objectives),
        constraints=sweep.constraints,
        searched=tuple(dict.fromkeys(searched)),
        started_ms=before.started_ms if before else int(started_at * 1000),
        data_hash=prepared.data_hash,
        trials=tuple(records.values()),
    )


def _tune(
    prepared: Prepared,
    folder: SweepFolder,
    recorder: Recorder,
    new_record: NewRecord,
    scheduler: RuleScheduler,
    callbacks: list[tune.Callback],
    stopper: Stopper,
    isolation: Isolation,
) -> None:
    waiting = sum(record.status is TrialStatus.PENDING for record in recorder.records.values())
    if not waiting and not prepared.sweep.search.is_adaptive:
        return
    trainable = tune.with_parameters(
        TrialOnWorkers,
        board=prepared.board,
        groups=prepared.groups,
        workers=prepared.shape.workers,
        keeps_group=isolation == "warm",
    )
    tuner = tune.Tuner(
        tune.with_resources(trainable, SLOT),
        tune_config=tune.TuneConfig(
            search_alg=_queue(prepared, folder, recorder, new_record),
            # An adaptive search ends by itself.
            num_samples=-1 if prepared.sweep.search.is_adaptive else waiting,
            scheduler=scheduler,
            max_concurrent_trials=prepared.slots,
            reuse_actors=True,
            trial_name_creator=_name,
            trial_dirname_creator=_name,
        ),
        run_config=_run_config(folder, callbacks, stopper),
    )
    try:
        tuner.fit()
    except Exception as error:
        # Tune writes beside our records, and stumbles over the same disk.
        if recorder.storage_error is None and not is_storage_failure(error):
            raise
        recorder.storage_error = recorder.storage_error or StorageError(f"cannot write to {folder.root} ({error})")
    ray.get(prepared.groups.close_all.remote())


def _name(trial: Any) -> str:
    return str(trial.config["trial_id"])


def _run_config(folder: SweepFolder, callbacks: list[tune.Callback], stopper: Stopper) -> tune.RunConfig:
    return tune.RunConfig(
        name=folder.tune.name,
        storage_path=str(folder.root),
        callbacks=callbacks,
        stop=stopper,
        verbose=0,
        # Trials save themselves; Tune's own checkpoint would only be asked for and thrown away.
        checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        failure_config=tune.FailureConfig(max_failures=2),
    )


def _queue(prepared: Prepared, folder: SweepFolder, recorder: Recorder, new_record: NewRecord) -> TrialQueue:
    sweep = prepared.sweep
    automatic = {trial.trial_id for trial in sweep.trials() if trial.config.micro_batch_size == "auto"}

    def task_of(record: TrialResult) -> TrialTask:
        chosen = record.suggestion and {**sweep.base, **record.suggestion.settings}.get("micro_batch_size", "auto")
        halves = chosen == "auto" if chosen else record.trial_id in automatic
        return _task(record, prepared, folder, halves_micro_batch=halves)

    return TrialQueue(
        recorder,
        task_of,
        Suggestions(prepared, folder, recorder, new_record).more,
        lambda config: prepared.estimate(config).device_bytes,
        prepared.plan.worker_memory_bytes,
        prepared.shape.workers,
    )


def _task(record: TrialResult, prepared: Prepared, folder: SweepFolder, *, halves_micro_batch: bool) -> TrialTask:
    return TrialTask(
        trial_id=record.trial_id,
        config=record.config,
        model_folder="",  # each node has its own: the worker fills it in
        data_folder=folder.location(folder.data),
        trial_folder=folder.location(folder.trial(record.trial_id).root),
        objective_metric=prepared.sweep.primary.metric,
        objective_mode=prepared.sweep.primary.mode,
        gpu_memory_fraction=prepared.gpu_memory_fraction,
        memory_limit_bytes=prepared.sweep.resources.memory_per_worker,
        halves_micro_batch=halves_micro_batch,
        time_limit_s=hours * 3600 if (hours := prepared.sweep.budget.trial_hours) else None,
    )


def _finish(
    prepared: Prepared,
    result: SweepResult,
    recorder: Recorder,
    tracker: Tracker,
    folder: SweepFolder,
    stopper: Stopper,
    say: Callable[[str], None],
) -> Outcome:
    """Write results and report, then give MLflow a bounded time to have it all."""
    sweep = prepared.sweep
    ended = {"ended_ms": int(time.time() * 1000), "interrupted": stopper.interrupted}
    result = result.model_copy(update={"trials": tuple(recorder.records.values()), **ended})
    if not stopper.interrupted:
        evaluation.evaluate(sweep, result, prepared.shape, folder, say)
    say("writing the report")
    # Before MLflow is waited for: what was measured is safe whatever happens then.
    write_sweep(folder, result)
    made = report.build(folder)
    write_atomically(folder.report, report.render_html(made))
    try:
        tracked = tracker.finish(INTERRUPTED_TRACKING_LIMIT_S if stopper.interrupted else TRACKING_LIMIT_S)
    except KeyboardInterrupt:
        tracked = False
    for record in list(recorder.records.values()):
        run_id = tracker.run_id(record.trial_id)
        if run_id and record.mlflow_run_id is None:
            recorder.save(record.model_copy(update={"mlflow_run_id": run_id}))
    result = result.model_copy(update={"trials": tuple(recorder.records.values())})
    write_sweep(folder, result)
    if tracked:
        best = trial_to_take(result)
        tracked = tracker.close_parent(result, best)
        evaluation.log(tracking_uri(sweep), result, folder, say)
        if best and best.mlflow_run_id and not result.interrupted:
            logged_model.log_best(sweep, result, best, folder, say)
    return Outcome(result, folder, made, tracked, tracking_uri(sweep))
