"""What a sweep may take: enough for the plan, and what is used up while it runs.

GPU-hours are those of the trials, from launch to end: what is billed between them is the cluster's own matter.
"""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.config.sweep_config import BudgetConfig
from orchestrator.planning.step_time import Range


def shortfalls(budget: BudgetConfig, hours: Range, gpu_hours: Range) -> tuple[str, ...]:
    """What of a plan the budget does not hold, or may not."""
    told = []
    for name, verb, unit, limit, needed in _limits(budget, hours, gpu_hours):
        if needed.high <= limit:
            continue
        if needed.expected > limit:
            said = f"the sweep {verb}s about {needed.expected:.3g}{unit}, and budget.{name} is {limit:g}: "
            told.append(said + "it will end before its last trials; raise it, or search fewer values")
        else:
            told.append(f"the sweep may {verb} up to {needed.high:.3g}{unit}, and budget.{name} is {limit:g}")
    return tuple(told)


def exhausted(budget: BudgetConfig, hours: float, gpu_hours: float) -> str | None:
    """The key whose limit is reached by what is spent, None while nothing is."""
    spent = (Range(used, used, used) for used in (hours, gpu_hours))
    return next((f"budget.{name}" for name, _, _, limit, used in _limits(budget, *spent) if used.low >= limit), None)


def unspent(budget: BudgetConfig, hours: float, gpu_hours: float) -> tuple[str, ...]:
    """What is left of each limit that is not used up, as `3.2 of budget.hours 8`."""
    spent = (Range(used, used, used) for used in (hours, gpu_hours))
    return tuple(
        f"{limit - used.low:.3g} of budget.{name} {limit:g}"
        for name, _, _, limit, used in _limits(budget, *spent)
        if used.low < limit
    )


def until_used_up(budget: BudgetConfig, hours: float, gpu_hours: float, gpus: float) -> tuple[float, str] | None:
    """Hours until the first limit is reached while so many GPUs are at work, and its key; None where none will be."""
    spent = _limits(budget, *(Range(used, used, used) for used in (hours, gpu_hours)))
    in_an_hour = _limits(budget, *(Range(used, used, used) for used in (1.0, gpus)))
    left = [
        (max(0.0, limit - used.low) / taken.low, f"budget.{name}")
        for (name, _, _, limit, used), (*_, taken) in zip(spent, in_an_hour, strict=True)
        if taken.low
    ]
    return min(left, default=None)


def _limits(budget: BudgetConfig, hours: Range, gpu_hours: Range) -> Iterator[tuple[str, str, str, float, Range]]:
    """Each limit that is set: its key, what a sweep does of it, in which unit, and what it is compared with."""
    if budget.hours is not None:
        yield "hours", "take", " hours", budget.hours, hours
    if budget.gpu_hours is not None:
        yield "gpu_hours", "take", " GPU-hours", budget.gpu_hours, gpu_hours
    if budget.cost is not None and budget.price_per_gpu_hour:
        yield "cost", "cost", "", budget.cost, gpu_hours.times(budget.price_per_gpu_hour)


def cost(budget: BudgetConfig, gpu_hours: float) -> float | None:
    """Money, in the unit of `price_per_gpu_hour`; None where no price is named."""
    return None if budget.price_per_gpu_hour is None else gpu_hours * budget.price_per_gpu_hour
