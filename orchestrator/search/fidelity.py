"""At which step configurations are compared that were trained differently far."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from orchestrator.search.observation import Observation, Standing


def common_step(known: Sequence[Observation], dimensions: int) -> int:
    """The highest step that enough configurations have reached for a model: two more than it has dimensions.

    Where so many never did, the highest that all have. Source: Falkner et al. 2018, BOHB: its model is that of the
    largest budget with enough observations.
    """
    reached = sorted((o.steps for o in known if o.standing in (Standing.WHOLE, Standing.PARTIAL)), reverse=True)
    return reached[min(len(reached), dimensions + 2) - 1]


def values_at(known: Sequence[Observation], observation: Observation, step: int) -> tuple[float, ...] | None:
    """Its objectives at the step; of one that was stopped before, as if it had gone on like the others.

    That is by the median change of those that are known at both steps: it keeps its place among them where it was
    stopped. None where it was not looked at before the step, or nothing is known of how others went on.
    """
    there = observation.values_at(step)
    if there is not None or not 0 < observation.steps < step:
        return there
    last = observation.values_at(observation.steps)
    pairs = [
        (before, after)
        for other in known
        if (before := other.values_at(observation.steps)) is not None and (after := other.values_at(step)) is not None
    ]
    if last is None or not pairs:
        return None
    changes = (median(after[i] - before[i] for before, after in pairs) for i in range(len(last)))
    return tuple(value + change for value, change in zip(last, changes, strict=True))
