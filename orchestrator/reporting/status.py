"""How a running or ended sweep stands, in a few lines, from its folder alone."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from orchestrator.reporting import quantities
from orchestrator.reporting.statistics import best_trial, label, objective_of
from orchestrator.results.records import SweepResult, TrialResult, TrialStatus
from orchestrator.results.storage import SweepFolder, is_at_work, read_sweep

MAX_REASONS = 5
OPEN = frozenset({TrialStatus.PENDING, TrialStatus.RUNNING})
TROUBLE = frozenset({TrialStatus.FAILED, TrialStatus.OUT_OF_MEMORY, TrialStatus.DIVERGED, TrialStatus.PREEMPTED})


def render_status(folder: SweepFolder, now_s: float | None = None) -> str:
    """Counts, the best so far, time gone and left, and why trials went wrong.

    Raises:
        FolderError: the folder holds no sweep.
    """
    sweep, damaged = read_sweep(folder)
    now_s = time.time() if now_s is None else now_s
    counts = Counter(trial.status for trial in sweep.trials)
    told = ", ".join(f"{counts[status]} {status.value.replace('_', ' ')}" for status in TrialStatus if counts[status])
    at_work = is_at_work(folder)
    lines = [f"{sweep.name}: {len(sweep.trials)} trials: {told}", _best(sweep), _time(sweep, folder, now_s, at_work)]
    running = "running" if at_work else "was running"
    lines += [f"{running}: {_named(sweep, trial)}, step {trial.steps}" for trial in _with(sweep, TrialStatus.RUNNING)]
    trouble = [trial for trial in sweep.trials if trial.status in TROUBLE]
    lines += [_trouble(sweep, trial) for trial in trouble[-MAX_REASONS:]]
    if len(trouble) > MAX_REASONS:
        lines.append(f"… {len(trouble) - MAX_REASONS} more went wrong: orchestrator report {folder.shown}")
    lines += [f"damaged: {record.file}: {record.why.splitlines()[0]}" for record in damaged]
    return "\n".join(lines)


def _with(sweep: SweepResult, status: TrialStatus) -> list[TrialResult]:
    return [trial for trial in sweep.trials if trial.status is status]


def _named(sweep: SweepResult, trial: TrialResult) -> str:
    return f"{trial.trial_id} ({label(trial, sweep.searched)})"


def _trouble(sweep: SweepResult, trial: TrialResult) -> str:
    reason = (trial.reason or "").strip().splitlines()
    return f"{trial.status.value.replace('_', ' ')}: {_named(sweep, trial)}: {reason[-1] if reason else ''}"


def _best(sweep: SweepResult) -> str:
    trial = best_trial(sweep)
    if trial is None:
        return "best so far: no trial has been evaluated"
    value = quantities.number(objective_of(sweep, trial))
    return f"best so far: {sweep.objective_metric} {value}, {_named(sweep, trial)}, {trial.status.value}"


def _time(sweep: SweepResult, folder: SweepFolder, now_s: float, at_work: bool) -> str:
    if sweep.started_ms is None:
        return "time: not started"
    if sweep.ended_ms:
        gone = quantities.duration((sweep.ended_ms - sweep.started_ms) / 1000)
        again = ", interrupted: run the same command again to go on" if sweep.interrupted else ""
        return f"time: ended after {gone}{again}"
    if not at_work:
        return "time: not ended, and no run is at work here: run the same command again to go on"
    gone_s = now_s - sweep.started_ms / 1000
    told = f"time: {quantities.duration(gone_s)} gone"
    left_s = _left_s(sweep, _planned_s(folder), gone_s)
    return f"{told}, about {quantities.duration(left_s)} left" if left_s else told


def _left_s(sweep: SweepResult, planned_s: Mapping[str, float], gone_s: float) -> float | None:
    """What is open, at the pace so far: the ended trials' time (planned, where the plan knows all) over the time gone.

    The pace holds how many ran at a time, how fast the machine is against the plan, and what was lost between trials.
    """
    ended = [t for t in sweep.trials if t.status not in OPEN and t.timing.total_s > 0]
    open_ = [t for t in sweep.trials if t.status in OPEN]
    if not open_:
        return None
    if all(trial.trial_id in planned_s for trial in (*ended, *open_)):
        done_s = sum(planned_s[trial.trial_id] for trial in ended)
        left_s = sum(planned_s[trial.trial_id] for trial in open_)
    else:
        done_s, left_s = float(len(ended)), float(len(open_))
    if not ended:
        return None
    return gone_s * left_s / done_s if done_s else None


def _planned_s(folder: SweepFolder) -> dict[str, float]:
    """Seconds that the plan gives each trial; nothing where there is no plan that can be read."""
    try:
        trials = json.loads(folder.plan.read_bytes())["trials"]
        return {trial["trial_id"]: float(trial["seconds"]) for trial in trials if _is_known(trial.get("seconds"))}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _is_known(seconds: Any) -> bool:
    return isinstance(seconds, int | float) and seconds > 0
