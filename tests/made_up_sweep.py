"""Sweeps that never ran: a real folder with any number of configurations and repeats, and every kind of end."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from orchestrator.config.search_space import configuration_id
from orchestrator.config.trial_config import TrialConfig
from orchestrator.planning.memory import MemoryEstimate, MemoryParts
from orchestrator.planning.plan import SweepPlan
from orchestrator.planning.planned_trial import PlannedTrial
from orchestrator.results.folders import SweepFolder
from orchestrator.results.records import (
    GitState,
    MetricPoint,
    PeakMemory,
    SweepResult,
    Timing,
    TrialResult,
    TrialStatus,
)
from orchestrator.results.storage import write_sweep

START_MS = 1_760_000_000_000
REASONS = {
    TrialStatus.STOPPED: "stopped by asha at step 60: others were better there",
    TrialStatus.INFEASIBLE: "needs 27.1 GiB of 24.0 GiB: lower micro_batch_size",
    TrialStatus.OUT_OF_MEMORY: "out of memory at step 1 with 23.1 GiB held; lower micro_batch_size (now 8)",
    TrialStatus.DIVERGED: "the loss became nan at step 41; lower learning_rate",
    TrialStatus.PREEMPTED: "its node went away; run the same command again",
    TrialStatus.FAILED: "RuntimeError: boom; the whole story is in log.txt",
    TrialStatus.CANCELLED: "interrupted (SIGINT): run the same command again to go on",
}
NEVER_RAN = (TrialStatus.PENDING, TrialStatus.INFEASIBLE)
StatusOf = Callable[[int, int], TrialStatus]
"""Of (configuration's place, repeat)."""


def all_completed(place: int, repeat: int) -> TrialStatus:
    return TrialStatus.COMPLETED


def made_up_trial(
    settings: Mapping[str, Any],
    repeat: int = 0,
    status: TrialStatus = TrialStatus.COMPLETED,
    objective: float | None = 2.5,
    memory_bytes: int | None = 2**30,
    step_time_s: float | None = 0.5,
    steps: int = 100,
    reason: str | None = None,
) -> TrialResult:
    """One record; `objective` is its eval_loss."""
    config, identity = _config(tuple(settings.items()), repeat)
    ran = status not in NEVER_RAN
    point = made_up_point(steps, objective, step_time_s, memory_bytes) if ran and objective is not None else None
    return TrialResult(
        trial_id=f"{identity}-{repeat}",
        configuration_id=identity,
        status=status,
        reason=reason or REASONS.get(status),
        config=config,
        repeat=repeat,
        seed=config.seed,
        best=point,
        last=point,
        steps=steps if ran else 0,
        tokens=steps * 1024 if ran else 0,
        tokens_per_s=1024 / step_time_s if ran and step_time_s else None,
        step_time_s=step_time_s if ran else None,
        peak_memory=PeakMemory(
            predicted_bytes=int(memory_bytes * 1.05) if memory_bytes else None,
            measured_bytes=memory_bytes if ran else None,
            kind="cuda_allocated",
        ),
        timing=Timing(
            startup_s=9, model_s=4, training_s=steps * (step_time_s or 0), evaluation_s=6, saving_s=1, total_s=80
        )
        if ran
        else Timing(),
        hosts=("node-1",) if ran else (),
        devices=("NVIDIA A10G",) if ran else (),
        adapter="adapter" if ran else None,
        versions={"python": "3.11.9", "torch": "2.13.0", "orchestrator": "0.1.0"},
        git=GitState(commit="0123456789abcdef0123456789abcdef01234567", dirty=True),
    )


def _timing(training_s: float) -> Timing:
    total_s = training_s + 24
    return Timing(startup_s=9, data_s=1, model_s=4, training_s=training_s, evaluation_s=6, saving_s=1, total_s=total_s)


@cache
def _config(settings: tuple[tuple[str, Any], ...], repeat: int) -> tuple[TrialConfig, str]:
    base = TrialConfig(**dict(settings))
    return base.model_copy(update={"seed": base.seed + repeat}), configuration_id(base)


def made_up_point(
    step: int, eval_loss: float | None, step_time_s: float | None = 0.5, memory_bytes: int | None = 2**30
) -> MetricPoint:
    return MetricPoint(
        step=step,
        tokens=step * 1024,
        seconds=step * (step_time_s or 0.0),
        loss=eval_loss + 0.05 if eval_loss is not None else 3.0,
        eval_loss=eval_loss,
        learning_rate=2e-4,
        grad_norm=0.7,
        tokens_per_s=1024 / step_time_s if step_time_s else None,
        step_time_s=step_time_s,
        peak_memory_bytes=memory_bytes,
        time_ms=START_MS + step * 500,
    )


def made_up_sweep(trials: Sequence[TrialResult], searched: Sequence[str] = ("rank",), **fields: Any) -> SweepResult:
    """A sweep around the trials; `fields` replace what it says of itself."""
    known: dict[str, Any] = {
        "name": "made-up",
        "question": "How high a LoRA rank pays for itself?",
        "sweep_id": "abc123",
        "model": "builtin:tiny-llama",
        "objective_metric": "eval_loss",
        "objective_mode": "min",
        "searched": tuple(searched),
        "started_ms": START_MS,
        "ended_ms": START_MS + 3_600_000,
        "data_hash": "d41d8cd98f00b204",
    }
    return SweepResult(**{**known, **fields}, trials=tuple(trials))


def made_up_plan(sweep: SweepResult) -> SweepPlan:
    """A plan of the sweep's trials, each predicted as its record says, two GPUs and 40 s each."""
    trials = []
    for trial in sweep.trials:
        assert trial.peak_memory
        predicted_bytes = trial.peak_memory.predicted_bytes or 0
        parts = MemoryParts(predicted_bytes - 2**28, 0, 0, 0, 2**28, 0, 0, 0)
        memory = MemoryEstimate(predicted_bytes, None, predicted_bytes, None, None, parts)
        names = {"trial_id": trial.trial_id, "configuration_id": trial.configuration_id, "repeat": trial.repeat}
        trials.append(PlannedTrial(**names, config=trial.config, memory=memory, seconds=40.0))
    return SweepPlan(
        name=sweep.name,
        model=sweep.model,
        hardware="2 × A10G, 24 GiB each",
        workers_per_trial=2,
        gpus_per_worker=1,
        concurrent=1,
        worker_memory_bytes=24 * 2**30,
        searched=sweep.searched,
        trials=tuple(trials),
        runs=len(trials),
        refused=0,
        makespan_s=(100.0, 200.0, 300.0),
        gpu_hours=(0.1, 0.2, 0.3),
        cost=(0.3, 0.6, 0.9),
        warnings=(),
    )


def simulated(
    true_means: Sequence[float],
    repeats: int,
    seed: int,
    noise_sd: float = 0.02,
    seed_sd: float = 0.05,
    configurations: Sequence[Mapping[str, Any]] | None = None,
    status_of: StatusOf = all_completed,
) -> SweepResult:
    """A sweep with a known truth: objective = true mean + the seed's own shift + noise; later ones cost more."""
    rng = random.Random(seed)
    shifts = [rng.gauss(0, seed_sd) for _ in range(repeats)]
    configurations = configurations or [{"rank": 2 ** (place + 2)} for place in range(len(true_means))]
    trials = [
        made_up_trial(
            settings,
            repeat,
            status_of(place, repeat),
            true_means[place] + shifts[repeat] + rng.gauss(0, noise_sd),
            memory_bytes=int(2**30 * (1 + 0.25 * place)),
            step_time_s=0.4 * (1 + 0.1 * place),
        )
        for repeat in range(repeats)
        for place, settings in enumerate(configurations)
    ]
    return made_up_sweep(trials, searched=tuple(configurations[0]))


def write_made_up(root: Path, sweep: SweepResult, evaluations: int = 10) -> SweepFolder:
    """The sweep's folder, with a curve that falls to each trial's objective."""
    folder = SweepFolder(root)
    for trial in sweep.trials:
        where = folder.trial(trial.trial_id)
        where.root.mkdir(parents=True, exist_ok=True)
        # Plainly: a thousand waits for the disk would take longer than the tests.
        where.result.write_text(trial.model_dump_json(indent=1), encoding="utf-8")
        if trial.steps and trial.best:
            where.metrics.write_text("\n".join(_curve(trial, evaluations)) + "\n", encoding="utf-8")
    write_sweep(folder, sweep)
    return folder


def _curve(trial: TrialResult, evaluations: int) -> Iterator[str]:
    assert trial.best
    assert trial.best.eval_loss is not None
    for i in range(1, evaluations + 1):
        step = round(trial.steps * i / evaluations)
        above = 1.2 * (math.exp(-4 * i / evaluations) - math.exp(-4))
        yield made_up_point(step, trial.best.eval_loss + above, trial.step_time_s).model_dump_json()
