"""What `evaluate:` asks for, once the trials have ended: one task of the cluster a trial, with a worker's resources.

A process of its own: memory and CUDA context are given back with it, whatever engine and ZeRO stage it trained under.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import ray
from mlflow import MlflowClient

from orchestrator.config.sweep_config import SweepConfig, is_score
from orchestrator.errors import counted, first_line
from orchestrator.reporting.recommendation import trial_to_take
from orchestrator.results.evaluation import Evaluation, evaluation_of, write_evaluation
from orchestrator.results.folders import SweepFolder
from orchestrator.results.records import SweepResult, TrialResult, TrialStatus
from orchestrator.sweep.mlflow_patience import twice
from orchestrator.sweep.mlflow_runs import is_deleted, key_of, log_latest
from orchestrator.sweep.trial_files import weights_on_this_node
from orchestrator.sweep.worker import GroupShape
from orchestrator.training import evaluation, model_source
from orchestrator.training.evaluation import EvaluationTask


def evaluate(
    sweep: SweepConfig,
    result: SweepResult,
    shape: GroupShape,
    folder: SweepFolder,
    wrote: Callable[[str], None],
    say: Callable[[str], None],
) -> bool:
    """Write evaluation.json of the best trial, or of all that completed; what goes wrong is said.

    wrote: is told the id of each trial that has one now.

    Returns False where it was interrupted. What `budget.hours` leaves out is said, and, where a score is an objective,
    in the report too.
    """
    if not (sweep.evaluate.prompts or sweep.evaluate.tasks):
        return True
    tasks = list(_tasks(sweep, result, folder))
    if not tasks:
        return True
    say(f"evaluating {counted(len(tasks), 'trained model')}")
    # As a worker, and so on the type of GPU that the trials ran on.
    others = shape.bundle
    cpus, gpus = others.pop("CPU"), others.pop("GPU", 0)
    # One call a process, so that its memory is free for the next.
    remote = ray.remote(num_cpus=cpus, num_gpus=gpus, resources=others, max_calls=1, max_retries=0)(_evaluate)
    waiting = {remote.remote(task, sweep.model): task.trial_id for task in tasks}
    until_s = time.monotonic() + sweep.budget.hours * 3600 if sweep.budget.hours else None
    try:
        while waiting:
            left_s = max(0.0, until_s - time.monotonic()) if until_s else None
            done, _ = ray.wait(list(waiting), num_returns=1, timeout=left_s)
            if not done:
                _cancel(waiting)
                say(
                    f"evaluation was ended after budget.hours, {sweep.budget.hours:g}, without "
                    f"{counted(len(waiting), 'trained model')}: run the same command again to have the rest"
                )
                return True
            _keep(done[0], waiting.pop(done[0]), folder, wrote, say)
    except KeyboardInterrupt:
        _cancel(waiting)
        say("evaluation was interrupted: run the same command again to have the rest")
        return False
    return True


def _cancel(waiting: Iterable[Any]) -> None:
    for left in waiting:
        ray.cancel(left, force=True)


def _evaluate(task: EvaluationTask, model: str) -> Evaluation:
    with weights_on_this_node(task.weights) as weights:
        here = replace(task, weights=str(weights))
        return evaluation.evaluate(here, model_source.materialize(model_source.resolve(model)))


def _tasks(sweep: SweepConfig, result: SweepResult, folder: SweepFolder) -> Iterator[EvaluationTask]:
    """Of the trials that are wanted and were not asked the same before."""
    for trial in wanted(sweep, result):
        have = evaluation_of(trial, folder)
        if trial.adapter and (have is None or have.asked != sweep.evaluate):
            weights = folder.location(folder.trial(trial.trial_id).root / trial.adapter)
            chats = evaluation.chats(sweep.data)
            best_ms = trial.best.time_ms if trial.best else None
            yield EvaluationTask(trial.trial_id, trial.config, sweep.evaluate, weights, chats, best_ms)


def wanted(sweep: SweepConfig, result: SweepResult) -> Iterable[TrialResult]:
    """The best trial, or every completed one, as where a score decides which is the best.

    A trial that the next run goes on with is not the best before it has ended.
    """
    if sweep.evaluate.trials == "all" or any(is_score(objective.metric) for objective in sweep.objectives):
        return [trial for trial in result.trials if trial.status is TrialStatus.COMPLETED]
    best = trial_to_take(result)
    return [best] if best and best.status.is_final else []


def scored(result: SweepResult, folder: SweepFolder) -> Iterator[TrialResult]:
    """The records that lack what their evaluation.json has, with it."""
    for trial in result.trials:
        found = evaluation_of(trial, folder)
        if found and found.scores != trial.scores:
            yield trial.model_copy(update={"scores": found.scores})


def _keep(
    done: Any, trial_id: str, folder: SweepFolder, wrote: Callable[[str], None], say: Callable[[str], None]
) -> None:
    try:
        write_evaluation(folder.trial(trial_id), ray.get(done))
        wrote(trial_id)
    except ray.exceptions.RayError as error:
        why = str(getattr(error, "cause", None) or error).strip().splitlines()
        say(f"trial {trial_id} could not be evaluated: {why[-1][:300] if why else type(error).__name__}")


def log(tracking_uri: str, result: SweepResult, folder: SweepFolder, say: Callable[[str], None]) -> None:
    """Put what there is on the trials' runs."""
    client = MlflowClient(tracking_uri)
    try:
        for trial in result.trials:
            twice(functools.partial(_log, client, trial, folder))
    except Exception as error:
        # Its stores' clients raise kinds of their own.
        say(f"MLflow lacks the evaluations ({first_line(error)[:300]}): run the same command again")


def _log(client: MlflowClient, trial: TrialResult, folder: SweepFolder) -> None:
    found = evaluation_of(trial, folder)
    # What a person has deleted stays so, and keeps no other trial's scores back.
    if found and trial.mlflow_run_id and not is_deleted(client.get_run(trial.mlflow_run_id)):
        client.log_artifact(trial.mlflow_run_id, str(folder.trial(trial.trial_id).evaluation))
        log_latest(client, trial.mlflow_run_id, {key_of(name): value for name, value in found.scores.items()})
