"""What a sweep may take: enough for the plan, and what is used up while it runs.

GPU-hours are those of the trials, from launch to end: what is billed between them is the cluster's own matter.
"""

from __future__ import annotations

from orchestrator.config.sweep_config import BudgetConfig
from orchestrator.planning.step_time import Range


def shortfalls(budget: BudgetConfig, hours: Range, gpu_hours: Range) -> tuple[str, ...]:
    """What of a plan the budget does not hold, or may not."""
    told = []
    for name, unit, limit, needed in (
        ("hours", "hours", budget.hours, hours),
        ("gpu_hours", "GPU-hours", budget.gpu_hours, gpu_hours),
    ):
        if limit is None or needed.high <= limit:
            continue
        if needed.expected > limit:
            said = f"about {needed.expected:.3g} {unit} are needed, and budget.{name} is {limit:g}: "
            told.append(said + "the sweep will end before its last trials; raise it, or search fewer values")
        else:
            told.append(f"up to {needed.high:.3g} {unit} may be needed, and budget.{name} is {limit:g}")
    return tuple(told)


def exhausted(budget: BudgetConfig, hours: float, gpu_hours: float) -> str | None:
    """The key whose limit is reached by what is spent, None while nothing is."""
    if budget.hours is not None and hours >= budget.hours:
        return "budget.hours"
    if budget.gpu_hours is not None and gpu_hours >= budget.gpu_hours:
        return "budget.gpu_hours"
    return None


def cost(budget: BudgetConfig, gpu_hours: float) -> float | None:
    """Money, in the unit of `price_per_gpu_hour`; None where no price is named."""
    return None if budget.price_per_gpu_hour is None else gpu_hours * budget.price_per_gpu_hour
