"""Ray Tune at work: the queue of trials, the slots that take them, the rules that stop them."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from typing import Any, Literal

import ray
from ray import tune
from ray.tune.progress_reporter import TrialProgressCallback
from ray.util.placement_group import NODE_ID_LABEL_KEY

from orchestrator.errors import StorageError
from orchestrator.planning import budget
from orchestrator.results.files import is_storage_failure
from orchestrator.results.folders import SweepFolder
from orchestrator.results.records import TrialResult, TrialStatus
from orchestrator.sweep.generations import Generations, last_step
from orchestrator.sweep.preparation import Prepared
from orchestrator.sweep.recorder import Recorder
from orchestrator.sweep.scheduler import RuleScheduler
from orchestrator.sweep.stopper import Stopper
from orchestrator.sweep.suggestions import NewRecord, Suggestions
from orchestrator.sweep.trial import TrialOnWorkers
from orchestrator.sweep.trial_queue import TrialQueue
from orchestrator.sweep.worker_group import CLOSE_LIMIT_S, HURRIED_CLOSE_LIMIT_S
from orchestrator.training.task import TrialTask

Isolation = Literal["warm", "fresh"]
Search = Suggestions | Generations


def search_of(
    prepared: Prepared,
    folder: SweepFolder,
    recorder: Recorder,
    new_record: NewRecord,
    forget_checkpoints: Callable[[str], None],
) -> Search:
    """What proposes trials while the sweep runs; of a grid nothing."""
    if prepared.sweep.scheduler.pbt:
        return Generations(prepared, recorder, new_record, forget_checkpoints)
    return Suggestions(prepared, folder, recorder, new_record)


def launch(
    prepared: Prepared,
    folder: SweepFolder,
    recorder: Recorder,
    search: Search,
    scheduler: RuleScheduler,
    callbacks: list[tune.Callback],
    stopper: Stopper,
    isolation: Isolation,
) -> None:
    """Run all that is pending, and what an adaptive search proposes; returns when nothing is left, or it was stopped.

    What the recorder could not store is its `storage_error` then.
    """
    waiting = sum(record.status is TrialStatus.PENDING for record in recorder.records.values())
    queue = _queue(prepared, folder, recorder, search)
    # Tune takes many seconds to find that there is nothing to do. What the budget has no room for is not proposed.
    if stopper.stop_all() or queue.is_at_end():
        return
    trainable = tune.with_parameters(
        TrialOnWorkers,
        board=prepared.board,
        groups=prepared.groups,
        shape=prepared.shape,
        keeps_group=isolation == "warm",
    )
    tuner = tune.Tuner(
        tune.with_resources(trainable, _slot()),
        tune_config=tune.TuneConfig(
            search_alg=queue,
            # An adaptive search ends by itself.
            num_samples=-1 if prepared.sweep.search.is_adaptive else waiting,
            scheduler=scheduler,
            max_concurrent_trials=prepared.slots,
            reuse_actors=True,
            trial_name_creator=_name,
            trial_dirname_creator=_name,
        ),
        run_config=_run_config(folder, [*callbacks, _NoProgress()], stopper),
    )
    try:
        tuner.fit()
    except Exception as error:
        # Tune writes beside our records, and stumbles over the same disk.
        if stopper.broken() is None and not is_storage_failure(error):
            raise
        if stopper.broken() is None:
            recorder.storage_error = StorageError(f"cannot write to {folder.root} ({error})")
    remove_in_its_place(folder)
    with contextlib.suppress(ray.exceptions.RayActorError):
        ray.get(prepared.groups.close_all.remote(HURRIED_CLOSE_LIMIT_S if stopper.interrupted else CLOSE_LIMIT_S))


def remove_in_its_place(folder: SweepFolder) -> None:
    """Where the folder was moved away Tune begins it anew, with its own state: brought back, it would lie inside of
    that.
    """
    if not folder.sweep_file.exists():
        shutil.rmtree(folder.tune, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.root.rmdir()


class _NoProgress(TrialProgressCallback):
    """Stands in for Tune's own, which keeps each trial for the lines that it would print: progress is ours to show."""

    def log_result(self, trial: Any, result: dict[str, Any], error: bool = False) -> None:
        pass

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        pass


def _slot() -> tune.PlacementGroupFactory:
    """A slot takes nothing: its workers do, in groups of their own, and there are never more slots than groups fit.

    One that held a CPU could starve its own workers. Tune wants something (ray 2.60.0): a byte of memory. It lies on
    the driver's node: another would take the slot with it when it goes, and stop a trial whose workers lie elsewhere;
    and with a slot a node with GPUs is never idle.
    """
    here = ray.get_runtime_context().get_node_id()
    return tune.PlacementGroupFactory([{"memory": 1}], bundle_label_selector=[{NODE_ID_LABEL_KEY: here}])


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


def _queue(prepared: Prepared, folder: SweepFolder, recorder: Recorder, search: Search) -> TrialQueue:
    sweep = prepared.sweep
    automatic = {trial.trial_id for trial in sweep.trials() if trial.config.micro_batch_size == "auto"}

    def task_of(record: TrialResult) -> TrialTask:
        chosen = record.suggestion and {**sweep.base, **record.suggestion.settings}.get("micro_batch_size", "auto")
        halves = chosen == "auto" if chosen else record.trial_id in automatic
        # Its parent's optimizer counts in micro-batches of this size.
        halves = halves and record.started_from is None
        return _task(record, prepared, folder, halves_micro_batch=halves)

    return TrialQueue(
        recorder,
        task_of,
        search.more,
        lambda config: prepared.estimate(config).needed_bytes,
        prepared.plan.worker_memory_bytes,
        prepared.shape.workers,
    )


def _task(record: TrialResult, prepared: Prepared, folder: SweepFolder, *, halves_micro_batch: bool) -> TrialTask:
    parent = record.started_from
    return TrialTask(
        trial_id=record.trial_id,
        config=record.config,
        model_folder="",  # each node has its own: the worker fills it in
        data_folder=folder.location(folder.data),
        trial_folder=folder.location(folder.trial(record.trial_id).root),
        best_metric=prepared.sweep.best_by.metric,
        best_mode=prepared.sweep.best_by.mode,
        gpu_memory_fraction=prepared.gpu_memory_fraction,
        memory_limit_bytes=prepared.sweep.resources.memory_per_worker,
        halves_micro_batch=halves_micro_batch,
        cost_per_s=budget.cost(prepared.sweep.budget, prepared.shape.gpus / 3600) or None,
        time_limit_s=hours * 3600 if (hours := prepared.sweep.budget.trial_hours) else None,
        parent_folder=folder.location(folder.trial(parent.trial_id).root) if parent else None,
        first_step=parent.step if parent else 0,
        last_step=last_step(prepared.sweep, record),
    )
