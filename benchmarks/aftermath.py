"""What must hold after any kills: results as without them, MLflow equal to the disk, nothing left."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from benchmarks.sweeps import environ
from orchestrator.results.folders import SweepFolder
from orchestrator.results.records import MetricPoint, SweepResult, TrialResult, TrialStatus
from orchestrator.results.storage import is_at_work, read_sweep
from orchestrator.sweep.mlflow_runs import metrics_of
from orchestrator.training.task import TrialTask


@dataclass(frozen=True, slots=True)
class Ended:
    """A trial that had ended, as it was on disk then."""

    record: TrialResult
    curve: bytes


def trials_of(folder: SweepFolder) -> tuple[TrialResult, ...]:
    """None before the sweep has written its first record."""
    return read_sweep(folder)[0].trials if folder.results_json.exists() else ()


def ended_trials(folder: SweepFolder) -> dict[str, Ended]:
    return {
        trial.trial_id: Ended(trial, folder.trial(trial.trial_id).metrics.read_bytes())
        for trial in trials_of(folder)
        if trial.status.is_final
    }


def changed(folder: SweepFolder, ended: dict[str, Ended]) -> list[str]:
    """Of trials that had ended: what is lost, or was run again."""
    now = {trial.trial_id: trial for trial in trials_of(folder)}
    wrong = []
    for trial_id, seen in ended.items():
        # Only its run in MLflow may have become known since.
        if trial_id not in now or _comparable(now[trial_id]) != _comparable(seen.record):
            wrong.append(f"trial {trial_id} had ended and its record is lost or another")
        if folder.trial(trial_id).metrics.read_bytes() != seen.curve:
            wrong.append(f"trial {trial_id} had ended and was run again")
    return wrong


def _comparable(record: TrialResult) -> dict[str, Any]:
    return record.model_dump(exclude={"mlflow_run_id"})


def wrong_in(folder: SweepFolder, trials: int, may_fail: int, threads: int, tracking_uri: str) -> Iterable[str]:
    """What an ended sweep's folder and MLflow should not look like.

    may_fail: so many trials may have had their own process killed twice.
    """
    sweep, damaged = read_sweep(folder)
    yield from (f"{one.file} is damaged: {one.why}" for one in damaged)
    if len(sweep.trials) != trials:
        yield f"{len(sweep.trials)} trials, not {trials}"
    unfinished = [trial for trial in sweep.trials if trial.status is not TrialStatus.COMPLETED]
    for trial in unfinished:
        if trial.status not in (TrialStatus.FAILED, TrialStatus.OUT_OF_MEMORY) or not trial.reason:
            yield f"trial {trial.trial_id} is {trial.status} ({trial.reason})"
    if len(unfinished) > may_fail:
        told = "; ".join(f"{trial.trial_id} {trial.status}: {trial.reason}" for trial in unfinished)
        yield f"{len(unfinished)} trials did not complete, and {may_fail} may have been killed twice ({told})"
    yield from _wrong_curves(folder, sweep, threads)
    yield from _wrong_in_mlflow(folder, sweep, tracking_uri)
    yield from _left_in(folder)


def _wrong_curves(folder: SweepFolder, sweep: SweepResult, threads: int) -> Iterable[str]:
    expected = plain_curves(folder, threads)
    for trial in sweep.trials:
        curve = [_figures(point) for point in folder.trial(trial.trial_id).read_metrics()]
        steps = [step for step, *_ in curve]
        last = trial.config.max_steps if trial.status is TrialStatus.COMPLETED else len(steps)
        if steps != list(range(1, last + 1)):
            twice = [step for step, times in Counter(steps).items() if times > 1]
            missing = sorted(set(range(1, last + 1)) - set(steps))
            yield f"trial {trial.trial_id}: steps {twice} twice, {missing} missing"
        elif json.loads(json.dumps(curve)) != expected[trial.trial_id][:last]:
            yield f"trial {trial.trial_id}: its curve is not that of a trial without interruption"


def _figures(point: MetricPoint) -> list[Any]:
    return [point.step, point.tokens, point.loss, point.eval_loss, point.grad_norm, point.learning_rate]


def plain_curves(folder: SweepFolder, threads: int) -> dict[str, list[list[Any]]]:
    """Every trial's curve as one plain process makes it, without Ray and without interruption.

    Kept beside the storages of all seeds, whose trials are the same.
    """
    out = folder.root.parent.parent / "reference.json"
    if not out.exists():
        command = [sys.executable, "-m", "benchmarks.aftermath", str(folder.root), str(out)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**environ(), "OMP_NUM_THREADS": str(threads)}
        )
        if done.returncode:
            raise RuntimeError(f"the trials without interruption failed:\n{done.stderr[-2000:]}")
    curves: dict[str, list[list[Any]]] = json.loads(out.read_text(encoding="utf-8"))
    return curves


def _train_plainly(folder: SweepFolder, out: Path, threads: int) -> None:
    from orchestrator.training import model_source, template  # noqa: F401

    sweep = read_sweep(folder)[0]
    model = str(model_source.materialize(model_source.resolve(sweep.model)))
    reference = SweepFolder(out.with_suffix(""))
    processes = []
    for trial in sweep.trials:
        root = str(reference.trial(trial.trial_id).root)
        task = TrialTask(trial.trial_id, trial.config, model, str(folder.data), root, "eval_loss", "min")
        # A process each: DeepSpeed keeps the groups of the process group that is gone (0.19.8, utils/groups.py).
        processes.append(multiprocessing.get_context("fork").Process(target=_train_one, args=(task,)))
    at_once = max(1, (os.cpu_count() or 1) // threads)
    for start in range(0, len(processes), at_once):
        for process in processes[start : start + at_once]:
            process.start()
        for process in processes[start : start + at_once]:
            process.join()
    names = [trial.trial_id for trial in sweep.trials]
    curves = {name: [_figures(point) for point in reference.trial(name).read_metrics()] for name in names}
    out.write_text(json.dumps(curves), encoding="utf-8")


def _train_one(task: TrialTask) -> None:
    from orchestrator.training import worker_process
    from orchestrator.training.task import WorkerPlace

    worker_process.run(task, WorkerPlace(0, 1, 0, "127.0.0.1", 0, task.trial_id), lambda _: None)


def _wrong_in_mlflow(folder: SweepFolder, sweep: SweepResult, tracking_uri: str) -> Iterable[str]:
    client = MlflowClient(tracking_uri)
    runs = [run for e in client.search_experiments() for run in client.search_runs([e.experiment_id])]
    parents = [run for run in runs if run.data.tags.get("kind") == "sweep"]
    children = {run.data.tags["trial_id"]: run for run in runs if run.data.tags.get("kind") == "trial"}
    if len(parents) != 1 or len(runs) != 1 + len(sweep.trials):
        yield f"MLflow has {len(parents)} parents and {len(runs) - len(parents)} trials, not 1 and {len(sweep.trials)}"
    for trial in sweep.trials:
        run = children.get(trial.trial_id)
        if run is None:
            yield f"MLflow lacks trial {trial.trial_id}"
            continue
        if run.data.tags.get("status") != trial.status.value:
            yield f"MLflow has trial {trial.trial_id} as {run.data.tags.get('status')}, the disk as {trial.status}"
        points = [metric for point in folder.trial(trial.trial_id).read_metrics() for metric in metrics_of(point)]
        for key in sorted({metric.key for metric in points}):
            there = [(m.step, m.timestamp, m.value) for m in client.get_metric_history(run.info.run_id, key)]
            here = [(m.step, m.timestamp, m.value) for m in points if m.key == key]
            if sorted(there) != sorted(here):
                yield f"trial {trial.trial_id}: {len(there)} points of {key} in MLflow, {len(here)} (or others) on disk"


def _left_in(folder: SweepFolder) -> Iterable[str]:
    if is_at_work(folder):
        yield "the folder's lock is still held"
    for path in sorted(folder.root.rglob("*")):
        name, inside = path.name, path.relative_to(folder.root).parts[0]
        half_written = name.startswith(".") and path != folder.lock and inside != folder.tune.name
        if half_written or (name.startswith("checkpoint-") and inside == "trials"):
            yield f"{path.relative_to(folder.root)} is left"


def left_on(address: str) -> list[str]:
    """Placement groups that a sweep left on a cluster that goes on."""
    code = f"import ray; ray.init('{address}'); print(ray.util.placement_group_table())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environ())
    if done.returncode:
        return [f"the cluster does not answer any more: {done.stderr[-300:]}"]
    return ["a placement group is left"] if "'CREATED'" in done.stdout else []


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="train the trials of a sweep in plain processes, for their curves")
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    _train_plainly(SweepFolder(arguments.folder), arguments.out, int(os.environ["OMP_NUM_THREADS"]))
