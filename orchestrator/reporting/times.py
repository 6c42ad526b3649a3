"""Where a sweep's time and money went, and how that compares with its plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from orchestrator.planning.plan import SweepPlan
from orchestrator.results.records import SweepResult, TrialResult, TrialStatus

PARTS = ("startup", "data", "model", "training", "evaluation", "saving")


@dataclass(frozen=True, slots=True)
class Times:
    """Where the wall-clock time of the sweep and of its workers went, in seconds."""

    wall_s: float | None
    """From the sweep's start to its end, or to now or its last sign of life, without the pauses between its runs."""
    worker_s: float
    """Launch to end, summed over trials."""
    parts_s: Mapping[str, float]
    """startup, data, model, training, evaluation, saving, other; they add up to `worker_s`."""

    @property
    def training_share(self) -> float | None:
        """Of the trials' time."""
        return self.parts_s["training"] / self.worker_s if self.worker_s else None


@dataclass(frozen=True, slots=True)
class Outlay:
    """What the plan expected of one quantity, and what it came to."""

    what: str
    planned: tuple[float, float, float] | None
    """Low, expected and high."""
    actual: float | None
    unit: str
    """`s`, `gpu_hours`, `cost`, `trials`; `ratio` has no plan: it is the actual over the expected."""


def times_of(sweep: SweepResult, now_s: float | None) -> Times:
    """Sums over all trials, those that still run too.

    A sweep that has not ended is measured to `now_s`, since 1970, where a run is at work; None where none is: it was
    killed, and its time ends with its last sign of life.
    """
    timings = [trial.timing for trial in sweep.trials]
    parts_s = {name: sum(getattr(timing, f"{name}_s") for timing in timings) for name in PARTS}
    known_s = sum(parts_s.values())
    # A running trial has parts and no total yet.
    worker_s = max(known_s, sum(max(t.total_s, sum(getattr(t, f"{n}_s") for n in PARTS)) for t in timings))
    began_ms = sweep.run_started_ms or sweep.started_ms
    end_ms = sweep.last_sign_ms if sweep.ended_ms or now_s is None else now_s * 1000
    wall_s = sweep.earlier_runs_s + max(0.0, (end_ms or began_ms) - began_ms) / 1000 if began_ms else None
    return Times(wall_s, worker_s, {**parts_s, "other": worker_s - known_s})


def against_plan(
    sweep: SweepResult, plan: SweepPlan, times: Times, price_per_gpu_hour: float | None
) -> tuple[Outlay, ...]:
    """Time, GPU-hours and money beside what the plan said of them; GPU-hours are those that trials held, in attempts
    before the last one too, which the budget is charged with.

    Args:
        sweep: its result.
        plan: as plan.json has it.
        times: of the same sweep.
        price_per_gpu_hour: as the sweep file has it, in its own currency.
    """
    held_s = times.worker_s + sum(trial.timing.earlier_s for trial in sweep.trials)
    hours = held_s * plan.workers_per_trial * plan.gpus_per_worker / 3600
    ran = sum(map(has_run, sweep.trials))
    found = [Outlay("from start to end", plan.makespan_s, times.wall_s, "s")]
    if not plan.proposed_by:
        # The plan of what proposes its trials has examples, of which none may run.
        found.insert(0, Outlay("trials run", (plan.runs, plan.runs, plan.runs), ran, "trials"))
    if plan.gpus_per_worker:
        found.append(Outlay("GPU-hours of the trials", plan.gpu_hours, hours, "gpu_hours"))
    if plan.cost is not None and price_per_gpu_hour is not None:
        found.append(Outlay("cost of the trials", plan.cost, hours * price_per_gpu_hour, "cost"))
    planned_s = {trial.trial_id: trial.seconds for trial in plan.trials}
    ratios = [
        trial.timing.total_s / expected_s
        for trial in sweep.trials
        if trial.status is TrialStatus.COMPLETED and (expected_s := planned_s.get(trial.trial_id))
    ]
    if ratios:
        found.append(Outlay("a completed trial's time over the plan's, median", None, median(ratios), "ratio"))
    return tuple(found)


def has_run(trial: TrialResult) -> bool:
    """Whether it was ever begun."""
    # A sweep that ends cancels what waits too.
    if trial.status is TrialStatus.CANCELLED:
        return trial.steps > 0 or trial.timing.total_s + trial.timing.earlier_s > 0
    return trial.status not in (TrialStatus.PENDING, TrialStatus.INFEASIBLE)
