"""How a running or ended sweep stands, in a few lines, from its folder alone."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.planning.budget import until_used_up
from orchestrator.planning.pace import OPEN, left_s
from orchestrator.reporting import quantities
from orchestrator.reporting.findings import budget_in, sweep_file_of, trials_told
from orchestrator.reporting.recommendation import recommend
from orchestrator.reporting.statistics import best_so_far, label, objective_of
from orchestrator.reporting.times import times_of
from orchestrator.results.files import read_record
from orchestrator.results.folders import SweepFolder
from orchestrator.results.records import SweepResult, TrialResult, TrialStatus
from orchestrator.results.storage import is_at_work, read_sweep

MAX_REASONS = 5
MOST_TRIALS, LONGEST_S = 10**7, 1e12
"""More is in no plan but a damaged one."""
TROUBLE = frozenset({TrialStatus.FAILED, TrialStatus.OUT_OF_MEMORY, TrialStatus.DIVERGED, TrialStatus.PREEMPTED})


def render_status(folder: SweepFolder, now_s: float | None = None) -> str:
    """Counts, what is recommended or the best so far, time gone and left, and why trials went wrong.

    Raises:
        FolderError: the folder holds no sweep.
    """
    sweep, damaged = read_sweep(folder)
    now_s = time.time() if now_s is None else now_s
    counts = Counter(trial.status for trial in sweep.trials)
    told = ", ".join(f"{counts[status]} {status.value.replace('_', ' ')}" for status in TrialStatus if counts[status])
    at_work, trials = is_at_work(folder), trials_told(sweep, _planned(folder).launches)
    lines = [f"{sweep.name}: {trials}: {told}", _best(sweep), _time(sweep, folder, now_s, at_work)]
    running = "running" if at_work else "was running"
    lines += [f"{running}: {_named(sweep, trial)}, {_at(folder, trial)}" for trial in _with(sweep, TrialStatus.RUNNING)]
    trouble = [trial for trial in sweep.trials if trial.status in TROUBLE]
    lines += [_trouble(sweep, trial) for trial in trouble[-MAX_REASONS:]]
    if len(trouble) > MAX_REASONS:
        lines.append(f"… {len(trouble) - MAX_REASONS} more went wrong: orchestrator report {folder.shown}")
    lines += [f"damaged: {record}" for record in damaged]
    return "\n".join(lines)


def _with(sweep: SweepResult, status: TrialStatus) -> list[TrialResult]:
    return [trial for trial in sweep.trials if trial.status is status]


def _named(sweep: SweepResult, trial: TrialResult) -> str:
    return f"{trial.trial_id} ({label(trial, sweep.searched)})"


def _at(folder: SweepFolder, trial: TrialResult) -> str:
    """By its curve, which has every step: the record changes with evaluations."""
    last = folder.trial(trial.trial_id).last_point()
    step = last.step if last else trial.steps
    return f"step {step} of {trial.config.max_steps}" if step else "starting"


def _trouble(sweep: SweepResult, trial: TrialResult) -> str:
    reason = (trial.reason or "").strip().splitlines()
    return f"{trial.status.value.replace('_', ' ')}: {_named(sweep, trial)}: {reason[-1] if reason else ''}"


def _best(sweep: SweepResult) -> str:
    """The recommended trial of a sweep that has ended, as the report has it; before, the best evaluation of any."""
    answer = recommend(sweep)
    if sweep.is_whole and answer.is_recommended:
        word, trial = "recommended", next((t for t in sweep.trials if t.trial_id == answer.trial_id), None)
    else:
        word, trial = "best so far", best_so_far(sweep, sweep.trials)
    if trial is None:
        return f"best so far: none. {answer.answer}"
    value = quantities.number(objective_of(sweep, trial))
    return f"{word}: {sweep.objective_metric} {value}, {_named(sweep, trial)}, {trial.status.value}"


def _time(sweep: SweepResult, folder: SweepFolder, now_s: float, at_work: bool) -> str:
    if sweep.started_ms is None:
        return "time: not started"
    gone = quantities.duration(times_of(sweep, now_s).wall_s)
    if sweep.ended_ms:
        again = ", interrupted: run the same command again to go on" if sweep.interrupted else ""
        if sweep.cut_short:
            again = f", since {sweep.cut_short}"
        return f"time: ended after {gone}{again}"
    if not at_work:
        return "time: not ended, and no run is at work here: run the same command again to go on"
    told = f"time: {gone} gone"
    plan, gone_s = _planned(folder), _gone_s(sweep)
    left = None
    if any(trial.status not in OPEN and trial.timing.total_s > 0 for trial in sweep.trials):
        left = left_s(sweep.trials, plan.seconds, gone_s, plan.slots, plan.launches)
    allowed = _allowed_s(sweep, folder, plan, gone_s, now_s)
    if allowed and allowed[0] < (left or 0.0):
        return f"{told}, about {quantities.duration(allowed[0])} left, until {allowed[1]} is used up"
    return f"{told}, about {quantities.duration(left)} left" if left else told


def _gone_s(sweep: SweepResult) -> dict[str, float]:
    return {trial.trial_id: trial.last.seconds for trial in _with(sweep, TrialStatus.RUNNING) if trial.last}


def _allowed_s(
    sweep: SweepResult, folder: SweepFolder, plan: _Planned, gone_s: Mapping[str, float], now_s: float
) -> tuple[float, str] | None:
    """Seconds until the budget ends the sweep, and which of its limits does."""
    run_hours = (now_s - (sweep.run_started_ms or sweep.started_ms or 0) / 1000) / 3600
    held_s = sum(trial.timing.total_s + trial.timing.earlier_s for trial in sweep.trials) + sum(gone_s.values())
    found = until_used_up(
        budget_in(sweep_file_of(folder)), run_hours, held_s / 3600 * plan.gpus, plan.slots * plan.gpus
    )
    return (found[0] * 3600, found[1]) if found else None


@dataclass(frozen=True, slots=True)
class _Planned:
    """What the plan says of the time that is left; nothing where none can be read."""

    seconds: Mapping[str, float]
    """Of each trial."""
    slots: int = 1
    """Trials at a time."""
    launches: int | None = None
    """Trials that an adaptive search may launch in all."""
    gpus: float = 0.0
    """Of a trial."""


def _planned(folder: SweepFolder) -> _Planned:
    try:
        plan = json.loads(read_record(folder.plan))
        seconds = {
            trial["trial_id"]: float(trial["seconds"]) for trial in plan["trials"] if _is_known(trial["seconds"])
        }
        launches = plan.get("launches")
        counts = int(plan["concurrent"]), int(launches or 0)
        if max(counts) > MOST_TRIALS:
            raise ValueError("so many trials are in no plan")
        gpus = min(MOST_TRIALS, float(plan.get("workers_per_trial", 0)) * float(plan.get("gpus_per_worker", 0)))
        return _Planned(seconds, max(1, counts[0]), None if launches is None else counts[1], gpus)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return _Planned({})


def _is_known(seconds: Any) -> bool:
    return isinstance(seconds, int | float) and 0 < seconds < LONGEST_S
