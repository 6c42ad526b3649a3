"""Every trial before anything starts: does it run, what memory, what time, what money."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

from orchestrator.config.constraint import parse
from orchestrator.config.sweep_config import (
    AshaConfig,
    BudgetConfig,
    SweepConfig,
)
from orchestrator.errors import InputError, ModelError, cut
from orchestrator.planning import budget
from orchestrator.planning.compatibility import missing_targets
from orchestrator.planning.concurrency import max_concurrent, packed_share
from orchestrator.planning.hardware import GIB, Hardware
from orchestrator.planning.makespan import Simulated, Work, simulate
from orchestrator.planning.memory import outside_torch_bytes
from orchestrator.planning.model_shape import ModelShape
from orchestrator.planning.pace import Pace
from orchestrator.planning.plan_warnings import (
    assumed_host,
    assumptions,
    never_used,
    no_gpu,
    points_left_out,
    too_few,
    warnings,
)
from orchestrator.planning.planned_trial import (
    NO_PACE,
    Frozen,
    PlannedTrial,
    gpus_of_a_trial,
    grace_steps,
    plan_trial,
    refused,
)
from orchestrator.planning.room import (
    WorkerShape,
    bound_bytes,
    memory_for_a_worker,
    placement,
    sharing,
    worker_shape,
)
from orchestrator.planning.step_time import Placement, Range, step_seconds


class SweepPlan(Frozen):
    """plan.json."""

    schema_version: Literal[1] = 1
    name: str
    model: str
    hardware: str
    workers_per_trial: int
    gpus_per_worker: float
    gpu_shared_by: int = 1
    """Trials at a time on a GPU."""
    concurrent: int
    worker_memory_bytes: int
    """What one worker may take of its device."""
    searched: tuple[str, ...]
    asked: tuple[str, ...] = ()
    """What the sweep looks for beyond the best of one objective: objectives, constraints and who stops trials early."""
    trials: tuple[PlannedTrial, ...]
    proposed_by: str | None = None
    """The adaptive search that will propose the trials one by one: those here are random examples of its space."""
    begins_with_points: bool = False
    """Whether the first of those examples are its `search.points`, which it tries first."""
    launches: int | None = None
    """Trials that it may launch in all, of a population those of every generation; None: `trials` are all."""
    runs: int
    refused: int
    makespan_s: tuple[float, float, float]
    """Low, expected and high: under the scheduler, so many trials at a time."""
    gpu_hours: tuple[float, float, float]
    cost: tuple[float, float, float] | None
    measured: int = 0
    """Trials on such a device by whose speed the times are corrected."""
    assumptions: tuple[str, ...] = ()
    """What the times take for granted, and nobody has measured."""
    warnings: tuple[str, ...]


def plan_sweep(sweep: SweepConfig, model: ModelShape, hardware: Hardware, pace: Pace = NO_PACE) -> SweepPlan:
    """Plan all trials of a sweep whose hardware defaults are filled in; `pace` is what was measured before.

    Raises:
        InputError: it counts money, and no trial holds a GPU that has a price; or it asks for none of the GPUs there.
    """
    shape, wanted = worker_shape(sweep.resources, hardware), sweep.trials()
    shape = replace(shape, bound_bytes=bound_bytes(sweep.constraints))
    if sweep.resources.gpus_per_worker == "auto" and hardware.device == "cuda" and shape.workers == 1:
        shape = replace(shape, gpus_per_worker=packed_share(wanted, sweep, model, hardware, shape))
    if not shape.gpus_per_worker:
        _require_no_money(sweep)
    concurrent = max_concurrent(wanted, sweep.resources, model, hardware, shape)
    memory_bytes = memory_for_a_worker(hardware, shape, concurrent)
    proposes = sweep.search.is_adaptive
    # However they lie on the nodes, unless more come when asked: `run` looks at each node, and refuses the whole sweep.
    may_grow = sweep.resources.scale_up_minutes is not None
    never_starts = () if may_grow else too_few(shape, replace(hardware, nodes=1), may_grow=False)

    def planned(shape: WorkerShape) -> tuple[PlannedTrial, ...]:
        if never_starts:
            return tuple(refused(trial, never_starts) for trial in wanted)
        each = (plan_trial(trial, model, hardware, shape, memory_bytes, pace) for trial in wanted)
        return tuple(_with_cost(trial, sweep.budget) for trial in each)

    trials = planned(shape)
    # What is refused takes no place; whether a trial is refused does not hang on how many run at a time.
    runnable = len(wanted) if proposes else sum(not trial.reasons for trial in trials)
    concurrent = max(1, min(concurrent, runnable))
    shape = replace(shape, gpu_shared_by=sharing(shape.gpus_per_worker, concurrent))
    if shape.gpu_shared_by > 1:
        trials = planned(shape)
    running = [trial for trial in trials if not trial.reasons]
    launched, taken = _simulated(sweep, trials, model, hardware, shape, concurrent, pace)
    makespan, hours = taken.makespan_s, taken.trials_s.times(gpus_of_a_trial(hardware, shape) / 3600)
    return SweepPlan(
        name=sweep.name,
        model=sweep.model,
        hardware=_describe(hardware),
        workers_per_trial=shape.workers,
        gpus_per_worker=shape.gpus_per_worker,
        gpu_shared_by=shape.gpu_shared_by,
        concurrent=concurrent,
        worker_memory_bytes=memory_bytes,
        searched=tuple(sweep.domains),
        asked=_asked(sweep),
        trials=trials,
        proposed_by=sweep.search.algorithm if proposes else None,
        begins_with_points=proposes and bool(sweep.points),
        launches=launched if proposes else None,
        runs=len(running),
        refused=len(trials) - len(running),
        makespan_s=(makespan.low, makespan.expected, makespan.high),
        gpu_hours=(hours.low, hours.expected, hours.high),
        cost=_costs(sweep.budget, hours) if hardware.device == "cuda" else None,
        measured=len(pace.steps),
        assumptions=assumptions(running, sweep.model, placement(hardware, shape).nodes, pace)
        + assumed_host(running, model, hardware, shape),
        warnings=_of_places(shape, hardware, may_grow=may_grow, is_refused=bool(never_starts))
        + points_left_out(sweep)
        + warnings(sweep, running, makespan, hours, pace.once_s),
    )


def _of_places(shape: WorkerShape, hardware: Hardware, *, may_grow: bool, is_refused: bool) -> tuple[str, ...]:
    """What to say of GPUs and CPUs that trials do not find, or leave unused; not what refuses every trial already."""
    told = no_gpu(hardware, shape) or (() if is_refused else too_few(shape, hardware, may_grow=may_grow))
    return told + never_used(shape, hardware)


def _simulated(
    sweep: SweepConfig,
    trials: Sequence[PlannedTrial],
    model: ModelShape,
    hardware: Hardware,
    shape: WorkerShape,
    concurrent: int,
    pace: Pace,
) -> tuple[int, Simulated]:
    """How many trials are launched, and what they take under the scheduler."""
    running = [trial for trial in trials if not trial.reasons]
    # An adaptive search proposes another where one is refused: all its trials run.
    proposes = sweep.search.is_adaptive
    launched = list(itertools.islice(itertools.cycle(running), len(trials))) if proposes else running
    # Hyperband's first bracket, which most trials are in, is ASHA; nobody can say whom the other rules will stop.
    asha = sweep.scheduler.asha or sweep.scheduler.hyperband
    works = [
        _work(trial, f"{trial.configuration_id} {place // len(running)}", pace.once_s, asha, sweep.budget)
        for place, trial in enumerate(launched)
    ]
    if pbt := sweep.scheduler.pbt:
        works = [part for work in works for part in _generations(work, pbt.interval_steps)]
    alone = _alone(running, model, hardware, shape)
    taken = simulate(works, concurrent, asha.reduction_factor if asha else None, shape.gpu_shared_by, alone)
    return len(works), taken


def _asked(sweep: SweepConfig) -> tuple[str, ...]:
    told = []
    if len(sweep.objectives) > 1:
        told.append(f"objectives {', '.join(f'{one.metric} ({one.mode})' for one in sweep.objectives)}")
    if sweep.constraints:
        told.append(f"constraint{'s' if len(sweep.constraints) > 1 else ''} {', '.join(sweep.constraints)}")
    if stops := [name for name, part in sweep.scheduler if part and name != "fifo"]:
        told.append(f"scheduler {' and '.join(stops)}")
    return tuple(told)


def _require_no_money(sweep: SweepConfig) -> None:
    """What is priced are GPU-hours: without a GPU nothing would ever cost enough."""
    counted = [name for name, part in sweep.scheduler if getattr(part, "grace_cost", None)]
    if counted:
        told = f"scheduler.{counted[0]}.grace_cost counts GPU-hours"
        raise InputError(f"{told}, and no trial holds a GPU here: use grace_seconds")
    asked = [f"objective {one.metric}" for one in sweep.objectives if one.metric == "cost"]
    asked += [f"constraint {text}" for text in sweep.constraints if parse(text).metric == "cost"]
    if asked:
        raise InputError(f"{asked[0]} counts GPU-hours, and no trial holds a GPU here: use step_time_s")
    if sweep.search.min_gain_per_cost:
        raise InputError(
            "search.min_gain_per_cost counts GPU-hours, and no trial holds a GPU here: use min_gain_per_hour"
        )


def _alone(running: Sequence[PlannedTrial], model: ModelShape, hardware: Hardware, shape: WorkerShape) -> float:
    """The mean share of a trial's step that is left where it has a shared GPU for itself."""
    if shape.gpu_shared_by == 1 or not running:
        return 1.0
    shared = placement(hardware, shape)
    whole = replace(shared, gpu_shared_by=1)

    def step_s(trial: PlannedTrial, where: Placement) -> float:
        return step_seconds(trial.config, model, hardware, where).expected

    return sum(step_s(trial, whole) / step_s(trial, shared) for trial in running) / len(running)


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


def _work(
    trial: PlannedTrial, configuration: str, once_s: Range, asha: AshaConfig | None, limits: BudgetConfig
) -> Work:
    """Its evaluations are spread over its steps: who is stopped early makes fewer."""
    assert trial.seconds is not None
    assert trial.seconds_range is not None
    whole = Range(trial.seconds_range[0], trial.seconds, trial.seconds_range[1])
    steps = trial.config.max_steps
    grace = grace_steps(asha, trial) if asha else steps
    step_s, limit_s = whole.plus(once_s.times(-1)).times(1 / steps), (limits.trial_hours or math.inf) * 3600
    return Work(once_s, step_s, steps, trial.config.eval_every, grace, configuration, limit_s)


def _generations(work: Work, interval_steps: int) -> Iterator[Work]:
    """A member's trials: each of them begins anew and trains for an interval."""
    for first in range(0, work.steps, interval_steps):
        yield replace(work, steps=min(interval_steps, work.steps - first), grace_steps=interval_steps)


def gpu_memory_fraction(plan: SweepPlan, hardware: Hardware) -> float | None:
    """What torch may allocate of a GPU that trials share, so that none takes its neighbours' memory; None: all.

    Every process has a CUDA context besides, and NCCL's memory, which torch does not count.
    """
    if hardware.gpu_memory_bytes is None or not 0 < plan.gpus_per_worker < 1:
        return None
    outside_bytes = outside_torch_bytes("deepspeed", 1, hardware)
    return max(0.0, plan.worker_memory_bytes - outside_bytes) / hardware.gpu_memory_bytes


def require_targets(sweep: SweepConfig, model: ModelShape) -> None:
    """A module that the model does not have is a slip of the pen in every trial, not one trial's refusal.

    Raises:
        ModelError: names the modules that it has.
    """
    for trial in sweep.trials():
        if reason := missing_targets(trial.config, model):
            raise ModelError(f"model {cut(sweep.model)}: {reason}")
