"""Every trial before anything starts: does it run, what memory, what time, what money."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from orchestrator.config.search_space import Trial
from orchestrator.config.sweep_config import AshaConfig, BudgetConfig, ResourcesConfig, SweepConfig
from orchestrator.config.trial_config import TrialConfig
from orchestrator.errors import ModelError
from orchestrator.planning import budget
from orchestrator.planning.compatibility import Case, missing_targets, notes, refusals
from orchestrator.planning.hardware import GIB, Hardware
from orchestrator.planning.memory import MemoryEstimate, estimate_on
from orchestrator.planning.model_shape import ModelShape
from orchestrator.planning.step_time import Range, step_seconds

STARTUP_S = 3.0
"""Seconds of a trial that are not training, on a warm worker group: model, evaluations, saving."""
LOW_RANK = 8
"""Named where a higher rank does not fit."""
FIRST_START_S = 20.0
"""Seconds from the command to a slot's first step: Ray, worker groups, imports, once a sweep (2 CPU cores)."""
SPARE = 0.97
"""Share of a GPU's memory that a trial may be planned to take: the driver keeps some for itself."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class PlannedTrial(_Part):
    """One trial: it runs, or `reasons` says why it does not."""

    trial_id: str
    configuration_id: str
    config: TrialConfig
    """`micro_batch_size` is a number, unless the trial is refused."""
    repeat: int
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    memory: MemoryEstimate | None = None
    seconds: float | None = None
    """Expected, on a warm worker group, to its last step."""
    seconds_range: tuple[float, float] | None = None
    gpu_hours: float | None = None
    """Expected, likewise."""
    cost: float | None = None
    """Expected; None where `budget.price_per_gpu_hour` is not named."""


class SweepPlan(_Part):
    """plan.json."""

    schema_version: Literal[1] = 1
    name: str
    model: str
    hardware: str
    workers_per_trial: int
    gpus_per_worker: float
    concurrent: int
    worker_memory_bytes: int
    """What one worker may take of its device."""
    searched: tuple[str, ...]
    trials: tuple[PlannedTrial, ...]
    proposed_by: str | None = None
    """The adaptive search that will propose the trials one by one: those here are random examples of its space."""
    runs: int
    refused: int
    makespan_s: tuple[float, float, float]
    """Low, expected and high: under the scheduler, so many trials at a time."""
    gpu_hours: tuple[float, float, float]
    cost: tuple[float, float, float] | None
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class WorkerShape:
    """What one trial takes."""

    workers: int
    gpus_per_worker: float
    cpus_per_worker: float


def worker_shape(resources: ResourcesConfig, hardware: Hardware) -> WorkerShape:
    """The shape that the sweep file asks for on this hardware; `auto` is a whole GPU, until the trials are known."""
    gpus = resources.gpus_per_worker
    if not isinstance(gpus, float | int):
        gpus = 1.0 if hardware.device == "cuda" else 0.0
    return WorkerShape(resources.workers_per_trial, float(gpus), resources.cpus_per_worker)


def packed_share(trials: Sequence[Trial], model: ModelShape, hardware: Hardware, whole: WorkerShape) -> float:
    """The share of a GPU that lets as many workers on each as the largest trial's memory allows.

    `micro_batch_size: auto` takes what a whole GPU holds, so that only trials with a number are packed.
    """
    memory_bytes = memory_for_a_worker(hardware, whole, 1, None)
    planned = [plan_trial(trial, model, hardware, whole, memory_bytes) for trial in trials]
    needed = [trial.memory.device_bytes for trial in planned if trial.memory and not trial.reasons]
    # Ray counts a GPU in ten-thousandths: rounded up, three thirds would not fit on it.
    return math.floor(10_000 / max(1, memory_bytes // max(needed, default=memory_bytes))) / 10_000


def max_concurrent(resources: ResourcesConfig, shape: WorkerShape, hardware: Hardware) -> int:
    """Trials at a time; at least one, since what cannot fit at all is told when the cluster is joined."""
    by_cpu = hardware.cpus / shape.cpus_per_worker
    by_gpu = hardware.gpus / shape.gpus_per_worker if shape.gpus_per_worker else math.inf
    room = max(1, int(min(by_cpu, by_gpu)) // shape.workers)
    return room if resources.max_concurrent == "auto" else min(room, resources.max_concurrent)


def plan_trial(
    trial: Trial, model: ModelShape, hardware: Hardware, shape: WorkerShape, memory_bytes: int
) -> PlannedTrial:
    """Decide about one trial, which may take `memory_bytes` a worker."""
    case = Case(trial.config, model, hardware, shape.workers)
    reasons = refusals(case)
    if reasons:
        return _planned(trial, trial.config, reasons=reasons)
    config = with_micro_batch(trial.config, model, hardware, shape.workers, memory_bytes)
    memory = estimate_on(config, model, shape.workers, hardware)
    if memory.device_bytes > memory_bytes:
        reason = _does_not_fit(config, model, hardware, shape, memory, memory_bytes)
        return _planned(trial, config, reasons=(reason,), memory=memory)
    step = step_seconds(config, model, hardware, shape.workers, shape.cpus_per_worker)
    whole = step.times(config.max_steps)
    return _planned(
        trial,
        config,
        notes=notes(case),
        memory=memory,
        seconds=whole.expected + STARTUP_S,
        seconds_range=(whole.low + STARTUP_S, whole.high + STARTUP_S),
        gpu_hours=(whole.expected + STARTUP_S) * shape.workers * shape.gpus_per_worker / 3600,
    )


def _planned(trial: Trial, config: TrialConfig, **more: object) -> PlannedTrial:
    # The config is validated already: model_construct keeps a thousand trials within a fraction of a second.
    fields = {"trial_id": trial.trial_id, "configuration_id": trial.configuration_id, "repeat": trial.repeat}
    return PlannedTrial.model_construct(**fields, config=config, **more)  # type: ignore[arg-type]


def with_micro_batch(
    config: TrialConfig, model: ModelShape, hardware: Hardware, workers: int, memory_bytes: int
) -> TrialConfig:
    """`auto` becomes the largest divisor of a worker's share of the global batch that fits; 1 where none does."""
    if config.micro_batch_size != "auto":
        return config
    share = config.global_batch_size // workers
    for micro in (n for n in range(share, 0, -1) if share % n == 0):
        tried = config.model_copy(update={"micro_batch_size": micro})
        if estimate_on(tried, model, workers, hardware).device_bytes <= memory_bytes:
            return tried
    return config.model_copy(update={"micro_batch_size": 1})


def _does_not_fit(
    config: TrialConfig,
    model: ModelShape,
    hardware: Hardware,
    shape: WorkerShape,
    memory: MemoryEstimate,
    memory_bytes: int,
) -> str:
    reason = (
        f"needs about {memory.device_bytes / GIB:.1f} GiB of memory a worker, of which {memory.parts.biggest} takes "
        f"{getattr(memory.parts, memory.parts.biggest) / GIB:.1f} GiB, and {memory_bytes / GIB:.1f} GiB are there"
    )
    fitting = [
        changes
        for changes in _cheaper(config)
        if _fits(_changed(config, changes), model, hardware, shape, memory_bytes)
    ]
    if not fitting:
        return f"{reason}; use a smaller model"
    shortest = [changes for changes in fitting if len(changes) == len(fitting[0])]
    return f"{reason}; fits with " + ", or ".join(" and ".join(c.told for c in changes) for changes in shortest)


@dataclass(frozen=True, slots=True)
class _Change:
    """A cheaper setting, as a hint names it."""

    told: str
    settings: dict[str, Any]


def _cheaper(config: TrialConfig) -> list[tuple[_Change, ...]]:
    """Single changes first, those that alter the result least in front; then more and more of them together."""
    changes: list[_Change] = []
    micro = config.micro_batch_size
    if isinstance(micro, int) and micro > 1:
        changes.append(_Change("micro_batch_size 1", {"micro_batch_size": 1}))
    if not config.gradient_checkpointing:
        changes.append(_Change("gradient_checkpointing", {"gradient_checkpointing": True}))
    if not config.precision.is_quantized and not config.trains_all_weights:
        changes.append(_Change("precision nf4", {"precision": "nf4"}))
    if config.zero_stage < 3:
        changes.append(_Change("zero_stage 3", {"zero_stage": 3, "engine": "deepspeed"}))
    if isinstance(config.rank, int) and config.rank > LOW_RANK:
        changes.append(_Change(f"rank {LOW_RANK}", {"rank": LOW_RANK}))
    together = [tuple(changes[: i + 1]) for i in range(1, len(changes))]
    return [(change,) for change in changes] + together


def _changed(config: TrialConfig, changes: Sequence[_Change]) -> TrialConfig:
    raw = config.model_dump()
    for change in changes:
        raw |= change.settings
    return TrialConfig.model_validate(raw)


def _fits(config: TrialConfig, model: ModelShape, hardware: Hardware, shape: WorkerShape, memory_bytes: int) -> bool:
    if refusals(Case(config, model, hardware, shape.workers)):
        return False
    return estimate_on(config, model, shape.workers, hardware).device_bytes <= memory_bytes


def memory_for_a_worker(hardware: Hardware, shape: WorkerShape, concurrent: int, limit_bytes: int | None) -> int:
    """Bytes that one worker may take: its share of a GPU, or of the host's memory, and no more than the limit."""
    if hardware.device == "cuda":
        assert hardware.gpu_memory_bytes is not None
        share = shape.gpus_per_worker if 0 < shape.gpus_per_worker < 1 else 1.0
        there = hardware.gpu_memory_bytes * share * SPARE
    else:
        workers_a_node = max(1, math.ceil(concurrent * shape.workers / hardware.nodes))
        there = hardware.host_memory_bytes * 0.9 / workers_a_node
    return int(min(there, limit_bytes or there))


def require_targets(sweep: SweepConfig, model: ModelShape) -> None:
    """A module that the model does not have is a slip of the pen in every trial, not one trial's refusal.

    Raises:
        ModelError: names the modules that it has.
    """
    for trial in sweep.trials():
        if reason := missing_targets(trial.config, model):
            raise ModelError(f"model {sweep.model}: {reason}")


def plan_sweep(sweep: SweepConfig, model: ModelShape, hardware: Hardware) -> SweepPlan:
    """Plan all trials of a sweep whose hardware defaults are filled in."""
    shape = worker_shape(sweep.resources, hardware)
    if sweep.resources.gpus_per_worker == "auto" and hardware.device == "cuda":
        shape = replace(shape, gpus_per_worker=packed_share(sweep.trials(), model, hardware, shape))
    concurrent = max_concurrent(sweep.resources, shape, hardware)
    memory_bytes = memory_for_a_worker(hardware, shape, concurrent, sweep.resources.memory_per_worker)
    trials = tuple(
        _with_cost(plan_trial(trial, model, hardware, shape, memory_bytes), sweep.budget) for trial in sweep.trials()
    )
    running = [trial for trial in trials if not trial.reasons]
    seconds = _trial_seconds(running, sweep)
    first_s = FIRST_START_S if running else 0.0
    # An adaptive search proposes another where one is refused: all its trials run.
    more = len(trials) / len(running) if running and sweep.search.is_adaptive else 1.0
    makespan = Range(*(first_s + more * _packed(s, concurrent) for s in seconds))
    gpus = shape.workers * shape.gpus_per_worker
    hours = Range(*map(sum, seconds)).times(more * gpus / 3600)
    return SweepPlan(
        name=sweep.name,
        model=sweep.model,
        hardware=_describe(hardware),
        workers_per_trial=shape.workers,
        gpus_per_worker=shape.gpus_per_worker,
        concurrent=concurrent,
        worker_memory_bytes=memory_bytes,
        searched=tuple(sweep.domains),
        trials=trials,
        proposed_by=sweep.search.algorithm if sweep.search.is_adaptive else None,
        runs=len(running),
        refused=len(trials) - len(running),
        makespan_s=(makespan.low, makespan.expected, makespan.high),
        gpu_hours=(hours.low, hours.expected, hours.high),
        cost=_costs(sweep.budget, hours),
        warnings=_warnings(sweep, running, makespan, hours),
    )


def _with_cost(trial: PlannedTrial, limits: BudgetConfig) -> PlannedTrial:
    if trial.gpu_hours is None or limits.price_per_gpu_hour is None:
        return trial
    return trial.model_copy(update={"cost": budget.cost(limits, trial.gpu_hours)})


def _costs(limits: BudgetConfig, hours: Range) -> tuple[float, float, float] | None:
    low, expected, high = (budget.cost(limits, h) for h in (hours.low, hours.expected, hours.high))
    return None if low is None or expected is None or high is None else (low, expected, high)


def _describe(hardware: Hardware) -> str:
    if hardware.device == "cpu":
        return f"{hardware.cpus} CPU cores, {hardware.host_memory_bytes / GIB:.0f} GiB"
    return f"{hardware.gpus} × {hardware.gpu_name}, {(hardware.gpu_memory_bytes or 0) / GIB:.0f} GiB each"


def _trial_seconds(trials: Sequence[PlannedTrial], sweep: SweepConfig) -> tuple[list[float], list[float], list[float]]:
    """Each trial's seconds, low, expected and high: ASHA ends so many at each rung."""
    low, expected, high = [], [], []
    for trial, share in zip(trials, _shares(trials, sweep), strict=True):
        assert trial.seconds is not None
        assert trial.seconds_range is not None
        low.append(trial.seconds_range[0] * share)
        expected.append(trial.seconds * share)
        # At worst the scheduler stops nobody: every trial came after those that it beats.
        high.append(trial.seconds_range[1])
    return low, expected, high


def _packed(seconds: Sequence[float], concurrent: int) -> float:
    """The length of all trials, so many at a time: each takes the first slot that is free."""
    free = [0.0] * max(1, min(concurrent, len(seconds)))
    for trial_s in seconds:
        first = min(range(len(free)), key=free.__getitem__)
        free[first] += trial_s
    return max(free, default=0.0)


def _shares(trials: Sequence[PlannedTrial], sweep: SweepConfig) -> list[float]:
    """The share of its steps that each trial is expected to train: all under fifo; under ASHA the n-th best goes on
    to rung k where n is among the first 1 / factor^k, and which trial that is nobody knows before."""
    # Hyperband's first bracket, which most trials are in, is ASHA; nobody can say whom the other rules will stop.
    asha = sweep.scheduler.asha or sweep.scheduler.hyperband
    if asha is None:
        return [1.0] * len(trials)
    shares = []
    for place, trial in enumerate(trials, 1):
        steps, goes_on = trial.config.max_steps, len(trials) / asha.reduction_factor
        reached = min(_grace_steps(asha, trial), steps)
        # The place in a shuffled order stands for the rank: each share of places is equally likely.
        while place <= goes_on and reached < steps:
            reached, goes_on = min(steps, reached * asha.reduction_factor), goes_on / asha.reduction_factor
        shares.append(reached / steps)
    return shares


def _grace_steps(asha: AshaConfig, trial: PlannedTrial) -> float:
    """The grace that a trial gets, as optimizer steps: tokens at full sequences, seconds as the plan expects them."""
    grace, unit = asha.grace
    config = trial.config
    if unit == "tokens":
        return grace / (config.global_batch_size * config.sequence_length)
    return grace / (trial.seconds or grace) * config.max_steps if unit == "seconds" else grace


def _warnings(sweep: SweepConfig, running: Sequence[PlannedTrial], makespan: Range, hours: Range) -> tuple[str, ...]:
    told: tuple[str, ...] = () if running else ("no trial of this sweep can run: see the reasons above",)
    asha = sweep.scheduler.asha
    if asha and running and all(trial.config.max_steps <= _grace_steps(asha, trial) for trial in running):
        grace, unit = asha.grace
        told += (f"asha stops nobody: no trial has more steps than grace_{unit} ({grace:g}); lower it",)
    return told + budget.shortfalls(sweep.budget, makespan.times(1 / 3600), hours)
