"""What a plan takes for granted, and what it warns of: one function each."""

from __future__ import annotations

import math
from collections.abc import Sequence

from orchestrator.config.constraint import parse
from orchestrator.config.sweep_config import (
    AshaConfig,
    ExtrapolationConfig,
    MedianConfig,
    SweepConfig,
)
from orchestrator.config.yaml_text import shown_as_yaml
from orchestrator.errors import counted
from orchestrator.planning import budget
from orchestrator.planning.compatibility import Case
from orchestrator.planning.hardware import GIB, NAMED_HOST_BYTES, Hardware
from orchestrator.planning.model_shape import ModelShape
from orchestrator.planning.notes import host_bytes_a_node
from orchestrator.planning.pace import Pace
from orchestrator.planning.planned_trial import PlannedTrial, gpus_of_a_trial, grace_steps
from orchestrator.planning.room import (
    WorkerShape,
    rooms_of,
    trials_that_fit,
)
from orchestrator.planning.step_time import NODE_LINK_BYTES_PER_S, Range


def warnings(
    sweep: SweepConfig, running: Sequence[PlannedTrial], makespan: Range, hours: Range, once_s: Range
) -> tuple[str, ...]:
    """Of what is planned: nothing runs, nobody is stopped, and what limits, bounds and budget will end."""
    told: tuple[str, ...] = () if running else ("no trial of this sweep can run: see the reasons above",)
    for name, part in sweep.scheduler:
        if isinstance(part, AshaConfig):
            # Past half of its way nobody is stopped (search/stopping.py, Halving).
            idle = [trial.config.max_steps < 2 * grace_steps(part, trial) for trial in running]
            why = "is more than half of every trial's steps"
        elif isinstance(part, MedianConfig | ExtrapolationConfig):
            idle = [trial.config.max_steps <= grace_steps(part, trial) for trial in running]
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


def _beyond_constraints(sweep: SweepConfig, running: Sequence[PlannedTrial], once_s: Range) -> tuple[str, ...]:
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


def _speeds(trial: PlannedTrial, metric: str, once_s: Range) -> tuple[float, float]:
    """Low and high, of the trial's steps alone."""
    assert trial.seconds_range is not None
    steps = trial.config.max_steps
    low_s, high_s = (
        (seconds - once) / steps for seconds, once in zip(trial.seconds_range, (once_s.low, once_s.high), strict=True)
    )
    tokens = trial.config.global_batch_size * trial.config.sequence_length
    return (low_s, high_s) if metric == "step_time_s" else (tokens / high_s, tokens / low_s)


def too_few(shape: WorkerShape, hardware: Hardware, *, may_grow: bool) -> tuple[str, ...]:
    """That no trial finds its workers a place."""
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


def no_gpu(hardware: Hardware, shape: WorkerShape) -> tuple[str, ...]:
    """Where nodes with GPUs come when asked, and only a CPU is here to plan for."""
    if hardware.device != "cpu" or not shape.gpus_per_worker:
        return ()
    return (
        "no GPU here, and resources.gpus_per_worker asks for some: times are those of this machine's CPUs, and no "
        "GPU-hours or cost are told; name the GPU with --gpu (and --gpus)",
    )


def never_used(shape: WorkerShape, hardware: Hardware) -> tuple[str, ...]:
    """GPUs that no trial of this shape can take, however many wait."""
    if hardware.device != "cuda" or shape.gpus_per_worker < 1:
        return ()
    rooms = rooms_of(hardware, shape)
    trials = trials_that_fit(rooms, shape.workers, on_one_node=max(rooms) >= shape.workers)
    each = gpus_of_a_trial(hardware, shape)
    unused = hardware.gpus - trials * each
    if not trials or unused < 1:
        return ()
    return (
        f"{unused:g} of {hardware.gpus} GPUs stay unused, and are not in the cost: a trial takes "
        f"{counted(each, 'GPU')}, and CPUs and nodes leave room for "
        f"{counted(trials, 'trial')} at a time; change resources.workers_per_trial or cpus_per_worker, or the cluster",
    )


def assumptions(running: Sequence[PlannedTrial], model: str, nodes: int, pace: Pace) -> tuple[str, ...]:
    """But for what the trials that were measured here have in their times; over how many nodes they ran, none says."""
    told = []
    rows = {(model, trial.config.sequence_length) for trial in running if not trial.config.packing}
    # Of packed rows, another model's tokens or another length the times tell nothing of how far these rows go.
    if rows and rows == {measured.rows for measured in pace.steps}:
        told.append("as to time, rows as long as in the trials that ran here; as to memory, rows fill sequence_length")
    elif rows:
        told.append("rows fill sequence_length: shorter ones take less time, and less memory where none is as long")
    flash = "flash_attention_2"
    is_measured = any(measured.attention == flash for measured in pace.steps)
    if not is_measured and any(trial.config.attention == flash for trial in running):
        told.append(
            "flash_attention_2 takes the time and, but for masks, the memory of sdpa, which writes no scores either"
        )
    if running and nodes > 1:
        speed = f"{NODE_LINK_BYTES_PER_S * 8 / 1e9:.0f} Gb/s"
        told.append(f"{speed} between the {nodes} nodes that a trial's workers lie on")
    return tuple(told)


def assumed_host(
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
