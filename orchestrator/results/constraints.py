"""Whether a configuration keeps to a constraint: one rule for searches, reports and what is tried first."""

from __future__ import annotations

from collections.abc import Iterable

from orchestrator.config.constraint import Constraint
from orchestrator.results.records import TrialResult


def worst_excess(constraint: Constraint, repeats: Iterable[TrialResult]) -> float | None:
    """The logarithm by which the worst repeat passes the bound, above 0 where it is broken; None: nobody measured it.

    What a configuration must keep to it must keep to each time: memory that one seed in three needs has to be there.
    """
    measured = (repeat.measured(constraint.metric) for repeat in repeats)
    return max((constraint.excess(value) for value in measured if value is not None), default=None)


def is_broken(constraint: Constraint, repeats: Iterable[TrialResult]) -> bool:
    """Whether one of them breaks it; what was not measured breaks nothing."""
    return (worst_excess(constraint, repeats) or 0.0) > 0
