"""A training that computes nothing, put in the real one's place without a switch in the package.

Ray calls `runtime_env_hook` in the driver where RAY_RUNTIME_ENV_HOOK names it. From that, every Ray worker of the job
calls `replace_training` before its first task, and forks `trivial_child` where it would fork `run_child`. That does
all that `run_child` does (log, process group, ledger, reports, end), with `training_loop.train` replaced. No adapter is
saved.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.results.folders import TrialFolder
from orchestrator.results.records import MetricPoint
from orchestrator.training.task import TrialProgress, TrialTask, WorkerPlace

if TYPE_CHECKING:
    from orchestrator.training.ledger import Ledger

SLEEP_S = 0.02


def runtime_env_hook(runtime_env: dict[str, Any] | None) -> dict[str, Any]:
    """What `ray.init` makes of the job's runtime environment."""
    return {**(runtime_env or {}), "worker_process_setup_hook": f"{__name__}.replace_training"}


def replace_training() -> None:
    """In a Ray worker, before `worker_group` is imported and takes `run_child` from here."""
    from orchestrator.training import child

    child.run_child = trivial_child


def trivial_child(task: TrialTask, place: WorkerPlace, reports: Connection) -> None:
    """A trial's process, forked from the real template, where nothing was replaced before."""
    from orchestrator.training import child, training_loop

    training_loop.train = trivial_training
    child.run_child(task, place, reports)


def trivial_training(
    task: TrialTask,
    place: WorkerPlace,  # noqa: ARG001
    ledger: Ledger,
    report: Callable[[TrialProgress], None],
) -> TrialProgress:
    """In place of `training_loop.train`: sleeps, writes its curve and reports as that does; losses are made up."""
    from orchestrator.training.ledger import open_metrics
    from orchestrator.training.training_loop import evaluates, write_point

    with open_metrics(TrialFolder(Path(task.trial_folder)).metrics) as metrics:
        for step in range(1, task.config.max_steps + 1):
            with ledger.phase("training"):
                time.sleep(SLEEP_S)
            evaluated = evaluates(task.config, step)
            ledger.last = point_at(step, task.config.learning_rate, ledger.seconds["training"], evaluated)
            if evaluated and ledger.last.improves(ledger.best, task.best_metric, task.best_mode):
                ledger.best = ledger.last
            write_point(metrics, ledger.last)
            if evaluated:
                report(ledger.progress())
    return ledger.progress()


def point_at(step: int, learning_rate: float, seconds: float, evaluated: bool) -> MetricPoint:
    """As the real loop would write it; the best learning rate is 1e-3."""
    loss = abs(math.log10(learning_rate) + 3) + 5 / step
    return MetricPoint(
        step=step,
        tokens=100 * step,
        seconds=seconds,
        loss=loss,
        eval_loss=loss if evaluated else None,
        learning_rate=learning_rate,
        grad_norm=1.0,
        tokens_per_s=100 / SLEEP_S,
        step_time_s=SLEEP_S,
        peak_memory_bytes=2**28 if evaluated else None,
        time_ms=int(time.time() * 1000),
    )


def progress_at(point: MetricPoint) -> TrialProgress:
    """As an evaluation tells it."""
    return TrialProgress(
        last=point,
        best=point,
        trainable_parameters=1000,
        startup_s=0.1,
        data_s=0.1,
        model_s=0.1,
        training_s=point.seconds,
        evaluation_s=0.0,
        saving_s=0.0,
        peak_memory_bytes=2**28,
        reserved_bytes=None,
        memory_kind="resident",
        device="cpu",
        host="here",
        has_adapter=False,
    )
