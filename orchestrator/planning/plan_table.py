"""A plan as a person reads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orchestrator.errors import counted
from orchestrator.planning.hardware import GIB
from orchestrator.planning.makespan import FIRST_START_S
from orchestrator.planning.plan import SweepPlan
from orchestrator.planning.planned_trial import PlannedTrial

PROPOSES = "proposes one configuration after the other"


def render(plan: SweepPlan) -> str:
    """A table of the trials, what is refused and why, and the totals."""
    runs = [trial for trial in plan.trials if not trial.reasons]
    lines = [f"{plan.name}: {plan.model} on {plan.hardware}"]
    lines += ["; ".join(plan.asked), ""] if plan.asked else [""]
    if plan.proposed_by:
        proposes = "begins with members spread over its space" if plan.proposed_by == "pbt" else PROPOSES
        examples = "its points first, then random ones" if plan.begins_with_points else "random ones of it"
        lines += [f"{plan.proposed_by} {proposes}; {examples}:", ""]
    if runs:
        lines += [*_table(plan, runs), ""]
    if any(_may_not_fit(plan, trial) for trial in runs):
        there = f"the {plan.worker_memory_bytes / GIB:.1f} GiB that are there"
        lines.append(f"* may not fit: the 90 % range of what it is estimated to need ends above {there}")
    if any(len(trial.reasons) > 1 for trial in plan.trials):
        lines.append("a trial that is refused for several reasons is named with each:")
    for reason, trials in _grouped((reason, trial) for trial in plan.trials for reason in trial.reasons):
        lines += [f"refused ({len(trials)}): {reason}", *_which(trials, plan, plan.trials)]
    for note, trials in _grouped((note, trial) for trial in runs for note in trial.notes):
        lines += [f"note ({counted(len(trials), 'trial')}): {note}", *_which(trials, plan, runs)]
    return "\n".join([*lines, *_totals(plan)])


def _table(plan: SweepPlan, trials: Sequence[PlannedTrial]) -> list[str]:
    shortest_s = min(trial.seconds or 0.0 for trial in trials)
    # One column of the micro-batch: that of `auto` is the one that was chosen.
    searched = [name for name in plan.searched if name != "micro_batch_size"]
    rows = [("trial", *searched, "micro-batch", "memory needed", "biggest part", "time")]
    for trial in trials:
        memory = trial.memory
        assert memory is not None
        assert trial.seconds is not None
        biggest = memory.parts.biggest
        rows.append(
            (
                trial.trial_id,
                *(_shown(getattr(trial.config, name)) for name in searched),
                str(trial.config.micro_batch_size),
                f"{memory.needed_bytes / GIB:.2f} GiB{' *' if _may_not_fit(plan, trial) else ''}",
                f"{biggest} {getattr(memory.parts, biggest) / GIB:.2f} GiB",
                duration(trial.seconds, shortest_s),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _may_not_fit(plan: SweepPlan, trial: PlannedTrial) -> bool:
    return trial.memory is not None and trial.memory.may_exceed(plan.worker_memory_bytes)


def _totals(plan: SweepPlan) -> list[str]:
    (low, expected, high), start_s = plan.makespan_s, FIRST_START_S.expected
    lines = [_proposals(plan) if plan.proposed_by else _trials(plan)]
    if not plan.runs:
        return lines + [f"warning: {warning}" for warning in plan.warnings]
    lines.append(
        f"time: about {duration(expected)} ({duration(low)} to {duration(high)})"
        + (f", of which {duration(start_s)} to start" if start_s > expected / 2 else "")
        + (f", by the speed of {counted(plan.measured, 'trial')} that ran here" if plan.measured else "")
    )
    if plan.gpu_hours[2]:
        lines.append(f"GPU-hours: {_about(plan.gpu_hours)}")
    if plan.cost and plan.gpus_per_worker:
        lines.append(f"cost: {_about(plan.cost)}")
    lines += [f"assumed: {assumption}" for assumption in plan.assumptions]
    return lines + [f"warning: {warning}" for warning in plan.warnings]


def _about(amounts: tuple[float, float, float]) -> str:
    low, expected, high = map(_three_digits, amounts)
    return f"about {expected} ({low} to {high})"


def _three_digits(amount: float) -> str:
    """An estimate is no more precise: `0.0213`, `1.5`, `403`, `1610`."""
    return f"{amount:.3g}" if amount < 999.5 else f"{float(f'{amount:.3g}'):.0f}"


def _trials(plan: SweepPlan) -> str:
    if not plan.runs:
        return f"no trial runs; {plan.refused} {_is(plan.refused)} refused"
    run = "1 trial runs" if plan.runs == 1 else f"{plan.runs} trials run"
    return f"{run}, {plan.concurrent} at a time; {plan.refused} {_is(plan.refused)} refused"


def _proposals(plan: SweepPlan) -> str:
    launched = len(plan.trials)
    told = f"a population of {launched}" if plan.proposed_by == "pbt" else f"up to {counted(launched, 'trial')}"
    told += f", {plan.concurrent} at a time; {plan.refused} of these examples {_is(plan.refused)} refused"
    known = [(t.memory.needed_bytes, t.seconds) for t in plan.trials if not t.reasons and t.memory and t.seconds]
    if not known:
        return told
    memory, seconds = zip(*known, strict=True)
    least, most = f"{min(memory) / GIB:.2f}", f"{max(memory) / GIB:.2f}"
    each = f"{_between(least, most)} GiB and {_between(duration(min(seconds)), duration(max(seconds)))} each"
    return f"{told}; {'the others' if plan.refused else 'they'} take {each}"


def _between(low: str, high: str) -> str:
    return low if low == high else f"{low} to {high}"


def _is(count: int) -> str:
    return "is" if count == 1 else "are"


def _grouped(pairs: Any) -> list[tuple[str, list[PlannedTrial]]]:
    found: dict[str, list[PlannedTrial]] = {}
    for text, trial in pairs:
        found.setdefault(text, []).append(trial)
    return list(found.items())


def _which(trials: Sequence[PlannedTrial], plan: SweepPlan, among: Sequence[PlannedTrial]) -> list[str]:
    """A line that names them, where they are not all."""
    return [f"  {_some([_label(trial, plan.searched) for trial in trials])}"] if len(trials) < len(among) else []


def _label(trial: PlannedTrial, searched: Sequence[str]) -> str:
    return " ".join(f"{name}={_shown(getattr(trial.config, name))}" for name in searched) or trial.trial_id


def _some(labels: Sequence[str]) -> str:
    distinct = list(dict.fromkeys(labels))
    return ", ".join(distinct[:4]) + (f" and {len(distinct) - 4} more" if len(distinct) > 4 else "")


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.4g}"
    return "+".join(value) if isinstance(value, tuple) else str(value)


def duration(seconds: float, like_s: float | None = None) -> str:
    """`45 s`, `1.5 min`, `12 min` or `3.5 h`; in the unit of another, that they compare at a glance."""
    like_s, minutes = seconds if like_s is None else like_s, seconds / 60
    if like_s < 90:
        return f"{seconds:.0f} s"
    if like_s < 5400:
        return f"{minutes:.2g} min" if minutes < 99.5 else f"{minutes:.0f} min"
    return f"{minutes / 60:.1f} h"
