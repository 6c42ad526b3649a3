"""Every trial before anything starts: does it run, what memory, what time, what money."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Literal

from pydantic import BaseModel, ConfigDict

from orchestrator.config.constraint import parse
from orchestrator.config.search_space import Trial
from orchestrator.config.sweep_config import (
    AshaConfig,
    BudgetConfig,
    ExtrapolationConfig,
    MedianConfig,
    ResourcesConfig,
    SweepConfig,
)
from orchestrator.config.sweep_file import shown_as_yaml
from orchestrator.config.trial_config import TrialConfig
from orchestrator.errors import InputError, ModelError, apart, counted, cut
from orchestrator.planning import budget
from orchestrator.planning.cheaper import for_memory, what_fits
from orchestrator.planning.compatibility import Case, missing_targets, refusals
from orchestrator.planning.hardware import GIB, NAMED_HOST_BYTES, Hardware
from orchestrator.planning.makespan import Work, simulate
from orchestrator.planning.memory import MemoryEstimate, estimate_on, loading_bytes_on, outside_torch_bytes
from orchestrator.planning.model_shape import ModelShape
from orchestrator.planning.notes import experts_stay_unquantised, host_bytes_a_node, notes
from orchestrator.planning.pace import Pace
from orchestrator.planning.room import (
    HOST_SHARE,
    MOST_SHARES,
    WorkerShape,
    bound_bytes,
    memory_for_a_worker,
    more_room,
    placement,
    rooms_of,
    share_of_gpu,
    sharing,
    trials_that_fit,
    worker_shape,
)
from orchestrator.planning.step_time import NODE_LINK_BYTES_PER_S, Placement, Range, step_seconds

NO_PACE = Pace()
TIGHT = (
    "fits with little to spare: torch's allocator has to give memory back again and again, which takes time; "
    "any cheaper setting gives it room"
)


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


def packed_share(
    trials: Sequence[Trial], sweep: SweepConfig, model: ModelShape, hardware: Hardware, whole: WorkerShape
) -> float:
    """What `auto` is of a GPU: 1 divided by the trials at a time on it, by which they are charged too.

    As many as the largest trial's memory allows, and no more than there are for each GPU: a smaller share would leave a
    part of the GPU to nobody, and charge nobody for it. `micro_batch_size: auto` takes what a whole GPU holds, so that
    only trials with a number are packed.
    """
    memory_bytes = memory_for_a_worker(hardware, replace(whole, limit_bytes=None), 1)
    planned = [plan_trial(trial, model, hardware, whole, memory_bytes) for trial in trials]
    needed = [
        max(trial.memory.device_bytes, loading_bytes_on(trial.config, model, 1, hardware))
        for trial in planned
        if trial.memory and not trial.reasons
    ]
    by_memory = memory_bytes // max(needed, default=memory_bytes)
    by_cpus = sum(rooms_of(hardware, replace(whole, gpus_per_worker=1 / MOST_SHARES)))
    to_run = len(trials) if sweep.search.is_adaptive else len(needed)
    at_once = min(by_cpus, _wanted_at_once(sweep.resources, to_run))
    on_each = max(1, min(by_memory, math.ceil(at_once / max(1, hardware.gpus))))
    return share_of_gpu(on_each)


def _wanted_at_once(resources: ResourcesConfig, trials: int) -> int:
    """Of so many trials, wherever there is room."""
    return trials if resources.max_concurrent == "auto" else min(resources.max_concurrent, trials)


def max_concurrent(
    trials: Sequence[Trial], resources: ResourcesConfig, model: ModelShape, hardware: Hardware, shape: WorkerShape
) -> int:
    """Of all trials so many at a time; at least one, since what cannot fit at all is told when the cluster is joined.

    On CPUs, whose trials share the host's memory, `auto` leaves each enough for the largest that fits on a node alone.
    """
    rooms = rooms_of(hardware, shape)
    on_one_node = max(rooms) >= shape.workers
    room = trials_that_fit(rooms, shape.workers, on_one_node=on_one_node)
    at_once = max(1, min(room, _wanted_at_once(resources, len(trials))))
    if resources.max_concurrent != "auto" or hardware.device == "cuda":
        return at_once
    alone_bytes = memory_for_a_worker(hardware, shape, 1)
    needed = _needed_bytes(trials, model, hardware, shape.workers, alone_bytes)
    if not needed:
        return at_once
    by_memory = int(hardware.host_memory_bytes * HOST_SHARE) // max(needed)
    rooms = [min(has, by_memory) for has in rooms]
    return max(1, min(len(needed), trials_that_fit(rooms, shape.workers, on_one_node=on_one_node)))


def _needed_bytes(
    trials: Sequence[Trial], model: ModelShape, hardware: Hardware, workers: int, memory_bytes: int
) -> list[int]:
    """What a worker takes of each trial that runs in so much memory, with the smallest micro-batch of `auto`.

    Estimated once for all that differ only in what memory does not depend on.
    """

    @cache
    def needed(config: TrialConfig) -> int | None:
        if config.micro_batch_size == "auto":
            config = config.model_copy(update={"micro_batch_size": 1})
        if refusals(Case(config, model, hardware, workers)):
            return None
        taken = estimate_on(config, model, workers, hardware).device_bytes
        return taken if taken <= memory_bytes else None

    return [taken for trial in trials if (taken := needed(for_memory(trial.config))) is not None]


def plan_trial(
    trial: Trial, model: ModelShape, hardware: Hardware, shape: WorkerShape, memory_bytes: int, pace: Pace = NO_PACE
) -> PlannedTrial:
    """Decide about one trial, which may take `memory_bytes` a worker."""
    case = Case(trial.config, model, hardware, shape.workers)
    reasons = refusals(case)
    if reasons:
        return _planned(trial, trial.config, reasons=reasons)
    config = with_micro_batch(trial.config, model, hardware, shape.workers, memory_bytes, shape.bound_bytes)
    memory = estimate_on(config, model, shape.workers, hardware)
    if max(memory.needed_bytes, loading_bytes_on(config, model, shape.workers, hardware)) > memory_bytes:
        told = _does_not_fit(replace(case, config=config), shape, memory, memory_bytes)
        return _planned(trial, config, reasons=(told,), memory=memory)
    step = step_seconds(
        config, model, hardware, placement(hardware, shape), pace.correction(config, shape.gpu_shared_by)
    )
    whole = step.times(config.max_steps).plus(pace.once_s + pace.evaluations_s(config))
    return _planned(
        trial,
        config,
        notes=notes(case) + ((TIGHT,) if memory.device_bytes > memory_bytes else ()),
        memory=memory.within(memory_bytes),
        seconds=whole.expected,
        seconds_range=(whole.low, whole.high),
        gpu_hours=whole.expected * _gpus_of_a_trial(hardware, shape) / 3600,
    )


def _gpus_of_a_trial(hardware: Hardware, shape: WorkerShape) -> float:
    """None where the plan's times are a CPU's, which say nothing of a GPU's."""
    return shape.workers * shape.gpus_per_worker if hardware.device == "cuda" else 0.0


def _planned(trial: Trial, config: TrialConfig, **more: object) -> PlannedTrial:
    # The config is validated already: model_construct keeps a thousand trials within a fraction of a second.
    fields = {"trial_id": trial.trial_id, "configuration_id": trial.configuration_id, "repeat": trial.repeat}
    return PlannedTrial.model_construct(**fields, config=config, **more)  # type: ignore[arg-type]


def with_micro_batch(
    config: TrialConfig,
    model: ModelShape,
    hardware: Hardware,
    workers: int,
    memory_bytes: int,
    bound_bytes: float = math.inf,
) -> TrialConfig:
    """`auto` becomes the largest divisor of a worker's share of the global batch that fits, and of which no more than
    the bound is measured; 1 where none does.

    With room for all that the allocator is expected to keep: what is ours to choose is not chosen tightly.
    """
    if config.micro_batch_size != "auto":
        return config
    share = config.global_batch_size // workers
    for micro in (n for n in range(share, 0, -1) if share % n == 0):
        tried = config.model_copy(update={"micro_batch_size": micro})
        memory = estimate_on(tried, model, workers, hardware)
        if memory.device_bytes <= memory_bytes and memory.measured_bytes <= bound_bytes:
            return tried
    return config.model_copy(update={"micro_batch_size": 1})


def _does_not_fit(case: Case, shape: WorkerShape, memory: MemoryEstimate, memory_bytes: int) -> str:
    """Why, and what would: fewer at a time first, which changes nothing of the trial."""
    needed_bytes = memory.needed_bytes
    of_which = f", of which {getattr(memory.parts, memory.parts.biggest) / GIB:.1f} GiB for {memory.parts.biggest}"
    if needed_bytes <= memory_bytes:
        needed_bytes = loading_bytes_on(case.config, case.shape, case.workers, case.hardware)
        of_which = (
            f" while it loads, since under ZeRO-3 each loads the whole model where precision is {case.config.precision}"
        )
    needed = f"{apart(needed_bytes, [memory_bytes], GIB, 1)} GiB"
    there = f"{apart(memory_bytes, [needed_bytes], GIB, 1)} GiB"
    is_limited = shape.limit_bytes is not None and shape.limit_bytes <= memory_bytes
    allowed = f"resources.memory_per_worker allows {there}" if is_limited else f"{there} are there"
    reason = f"needs about {needed} of memory a worker{of_which}, and {allowed}"
    if unquantised := experts_stay_unquantised(case):
        reason += f" ({unquantised})"
    # Workers cannot share a GPU.
    most_workers = sum(rooms_of(case.hardware, shape)) if shape.gpus_per_worker == 1 else case.workers
    fits = [more_room(case.hardware, shape, needed_bytes), what_fits(case, memory_bytes, most_workers)]
    told = ", or ".join(hint for hint in fits if hint)
    return f"{reason}; fits with {told}" if told else f"{reason}; use a smaller model"


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
    never_starts = () if may_grow else _too_few(shape, replace(hardware, nodes=1), may_grow=False)

    def planned(shape: WorkerShape) -> tuple[PlannedTrial, ...]:
        if never_starts:
            return tuple(_planned(trial, trial.config, reasons=never_starts) for trial in wanted)
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
    # An adaptive search proposes another where one is refused: all its trials run.
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
    no_gpu = _no_gpu(hardware, shape)
    makespan, hours = taken.makespan_s, taken.trials_s.times(_gpus_of_a_trial(hardware, shape) / 3600)
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
        launches=len(works) if proposes else None,
        runs=len(running),
        refused=len(trials) - len(running),
        makespan_s=(makespan.low, makespan.expected, makespan.high),
        gpu_hours=(hours.low, hours.expected, hours.high),
        cost=_costs(sweep.budget, hours) if hardware.device == "cuda" else None,
        measured=len(pace.steps),
        assumptions=_assumptions(running, placement(hardware, shape).nodes, pace)
        + _assumed_host(running, model, hardware, shape),
        warnings=no_gpu
        + (() if never_starts or no_gpu else _too_few(shape, hardware, may_grow=may_grow))
        + _never_used(shape, hardware)
        + points_left_out(sweep)
        + _warnings(sweep, running, makespan, hours, pace.once_s),
    )


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
    trial: PlannedTrial, configuration: str, once_s: float, asha: AshaConfig | None, limits: BudgetConfig
) -> Work:
    """Its evaluations are spread over its steps: who is stopped early makes fewer."""
    assert trial.seconds is not None
    assert trial.seconds_range is not None
    whole = Range(trial.seconds_range[0], trial.seconds, trial.seconds_range[1])
    steps = trial.config.max_steps
    grace_steps = _grace_steps(asha, trial) if asha else steps
    step_s, limit_s = whole.plus(-once_s).times(1 / steps), (limits.trial_hours or math.inf) * 3600
    return Work(once_s, step_s, steps, trial.config.eval_every, grace_steps, configuration, limit_s)


def _generations(work: Work, interval_steps: int) -> Iterator[Work]:
    """A member's trials: each of them begins anew and trains for an interval."""
    for first in range(0, work.steps, interval_steps):
        yield replace(work, steps=min(interval_steps, work.steps - first), grace_steps=interval_steps)


def _assumptions(running: Sequence[PlannedTrial], nodes: int, pace: Pace) -> tuple[str, ...]:
    """Until trials were measured here, whose times have all of it in them."""
    if pace.steps:
        return ()
    told = []
    if any(not trial.config.packing for trial in running):
        told.append("rows fill sequence_length: shorter ones take less time, and less memory where none is as long")
    if any(trial.config.attention == "flash_attention_2" for trial in running):
        told.append(
            "flash_attention_2 takes the time and, but for masks, the memory of sdpa, which writes no scores either"
        )
    if running and nodes > 1:
        speed = f"{NODE_LINK_BYTES_PER_S * 8 / 1e9:.0f} Gb/s"
        told.append(f"{speed} between the {nodes} nodes that a trial's workers lie on")
    return tuple(told)


def _assumed_host(
    running: Sequence[PlannedTrial], model: ModelShape, hardware: Hardware, shape: WorkerShape
) -> tuple[str, ...]:
    """Of a GPU that is only named, on whose nodes nobody has looked."""
    offloading = [trial.config for trial in running if trial.config.offload != "none"]
    if not offloading or not hardware.is_assumed:
        return ()
    most = max(host_bytes_a_node(Case(config, model, hardware, shape.workers)) for config in offloading)
    return (
        f"{hardware.host_memory_bytes / GIB:.0f} GiB of host memory a node ({NAMED_HOST_BYTES / GIB:.0f} GiB a GPU), "
        f"of which a trial that offloads takes at least {most / GIB:.1f} GiB",
    )


def _too_few(shape: WorkerShape, hardware: Hardware, *, may_grow: bool) -> tuple[str, ...]:
    if sum(rooms_of(hardware, shape)) >= shape.workers:
        return ()
    each = f"{counted(shape.cpus_per_worker, 'CPU')} and {counted(shape.gpus_per_worker, 'GPU')} each"
    there = f"{counted(hardware.cpus, 'CPU')} and {counted(hardware.gpus, 'GPU')}"
    if hardware.nodes > 1:
        there += f" on {hardware.nodes} nodes"
    return (
        f"a trial takes {counted(shape.workers, 'worker')} of {each}, and the cluster has {there}: not one can start "
        "there; lower resources, name the cluster's GPUs with --gpu and --gpus"
        + ("" if may_grow else ", or give resources.scale_up_minutes where nodes come when asked"),
    )


def _no_gpu(hardware: Hardware, shape: WorkerShape) -> tuple[str, ...]:
    """Where nodes with GPUs come when asked, and only a CPU is here to plan for."""
    if hardware.device != "cpu" or not shape.gpus_per_worker:
        return ()
    return (
        "no GPU here, and resources.gpus_per_worker asks for some: times are those of this machine's CPUs, and no "
        "GPU-hours or cost are told; name the GPU with --gpu (and --gpus)",
    )


def _never_used(shape: WorkerShape, hardware: Hardware) -> tuple[str, ...]:
    """GPUs that no trial of this shape can take, however many wait."""
    if hardware.device != "cuda" or shape.gpus_per_worker < 1:
        return ()
    rooms = rooms_of(hardware, shape)
    trials = trials_that_fit(rooms, shape.workers, on_one_node=max(rooms) >= shape.workers)
    each = _gpus_of_a_trial(hardware, shape)
    unused = hardware.gpus - trials * each
    if not trials or unused < 1:
        return ()
    return (
        f"{unused:g} of {hardware.gpus} GPUs stay unused, and are not in the cost: a trial takes "
        f"{counted(each, 'GPU')}, and CPUs and nodes leave room for "
        f"{counted(trials, 'trial')} at a time; change resources.workers_per_trial or cpus_per_worker, or the cluster",
    )


def _grace_steps(scheduler: AshaConfig | MedianConfig | ExtrapolationConfig, trial: PlannedTrial) -> float:
    """The grace that a trial gets, as optimizer steps: tokens at full sequences, seconds as the plan expects them."""
    grace, unit = scheduler.grace
    config = trial.config
    if unit == "tokens":
        return grace / (config.global_batch_size * config.sequence_length)
    if unit == "cost":
        return grace / (trial.cost or grace) * config.max_steps
    return grace / (trial.seconds or grace) * config.max_steps if unit == "seconds" else grace


def _warnings(
    sweep: SweepConfig, running: Sequence[PlannedTrial], makespan: Range, hours: Range, once_s: float
) -> tuple[str, ...]:
    told: tuple[str, ...] = () if running else ("no trial of this sweep can run: see the reasons above",)
    for name, part in sweep.scheduler:
        if isinstance(part, AshaConfig):
            # Past half of its way nobody is stopped (search/stopping.py, Halving).
            idle = [trial.config.max_steps < 2 * _grace_steps(part, trial) for trial in running]
            why = "is more than half of every trial's steps"
        elif isinstance(part, MedianConfig | ExtrapolationConfig):
            idle = [trial.config.max_steps <= _grace_steps(part, trial) for trial in running]
            why = "is no less than any trial's steps"
        else:
            continue
        if idle and all(idle):
            grace, unit = part.grace
            told += (f"{name} stops nobody: grace_{unit} ({grace:g}) {why}; lower it",)
    limit_s = (sweep.budget.trial_hours or math.inf) * 3600
    if too_long := [trial for trial in running if (trial.seconds or 0) > limit_s]:
        told += (
            f"expected to run longer than budget.trial_hours ({sweep.budget.trial_hours:g}) and to be ended there: "
            f"{len(too_long)} of {len(running)} trials; raise it, or lower max_steps",
        )
    return (
        told
        + _beyond_constraints(sweep, running, once_s)
        + budget.shortfalls(sweep.budget, makespan.times(1 / 3600), hours)
    )


def points_left_out(sweep: SweepConfig) -> tuple[str, ...]:
    """That points are not tried: more than a search tries, or excluded, as a part of `known_good` may be."""
    told = []
    if excluded := sweep.excluded_points:
        are = "is" if len(excluded) == 1 else "are"
        named = " and ".join(shown_as_yaml(settings) for settings in excluded)
        told.append(
            f"of search.points {named} {are} not tried, since `exclude` names {'it' if are == 'is' else 'them'}"
        )
    if len(points := sweep.possible_points) > (most := sweep.first_count):
        limit = "scheduler.pbt.population" if sweep.scheduler.pbt else "budget.trials"
        told.append(
            f"search.points stand for {len(points)} configurations, of which {most} {'is' if most == 1 else 'are'} "
            f"tried: raise {limit}, or take some away"
        )
    return tuple(told)


def _beyond_constraints(sweep: SweepConfig, running: Sequence[PlannedTrial], once_s: float) -> tuple[str, ...]:
    """Of bounds of memory, which is estimated as it is measured (allocated on a GPU, resident on a CPU), and of speed,
    where even the near end of its range breaks them."""
    told = []
    for text in sweep.constraints:
        constraint = parse(text)
        if constraint.metric == "peak_memory_bytes":
            needs = [trial.memory.measured_bytes for trial in running if trial.memory]
            broken = [need for need in needs if constraint.excess(need) > 0]
            count, best = len(broken), f"the least of them {min(broken, default=0) / GIB:.2f} GiB"
        elif constraint.metric in ("tokens_per_s", "step_time_s"):
            ranges = [_speeds(trial, constraint.metric, once_s) for trial in running]
            beyond = [ends for ends in ranges if all(constraint.excess(end) > 0 for end in ends)]
            low, high = min((ends[0] for ends in beyond), default=0), max((ends[1] for ends in beyond), default=0)
            count, best = len(beyond), f"between {low:.3g} and {high:.3g}"
        else:
            continue
        if count:
            told.append(
                f"estimated not to keep {text}: {count} of {len(running)} trials ({best}), which run and are not "
                "recommended"
            )
    return tuple(told)


def _speeds(trial: PlannedTrial, metric: str, once_s: float) -> tuple[float, float]:
    """Low and high, of the trial's steps alone."""
    assert trial.seconds_range is not None
    steps = trial.config.max_steps
    low_s, high_s = ((seconds - once_s) / steps for seconds in trial.seconds_range)
    tokens = trial.config.global_batch_size * trial.config.sequence_length
    return (low_s, high_s) if metric == "step_time_s" else (tokens / high_s, tokens / low_s)
