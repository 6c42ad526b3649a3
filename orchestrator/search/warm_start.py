"""What trials that no adaptive search proposed can teach it: of another sweep, or of a grid in the same folder.

Other models' losses are other numbers; what carries over is which settings were how much better than others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import median

from orchestrator.config.axes import Axis, Domain, active, axes_of
from orchestrator.config.constraint import Constraint
from orchestrator.config.search_space import Settings, configuration_id
from orchestrator.config.trial_config import TrialConfig
from orchestrator.results.constraints import is_broken
from orchestrator.results.records import TrialResult, TrialStatus
from orchestrator.search.observation import Curves, Goal, Observation, Standing, combined
from orchestrator.search.suggest import MIN_KNOWN

NOT_COMPARED = frozenset({"seed", "micro_batch_size"})
"""Settings that change no result, or that planning chooses."""
LIGHTER = 3
"""One observation of another model counts of so many."""
BEST = 3
"""So many of the best are tried first: their order carries over to other models, their values do not."""


def learned(
    records: Iterable[TrialResult],
    space: Mapping[str, Domain],
    base: Settings,
    goals: Sequence[Goal],
    curves_of: Curves,
    limits: Mapping[str, Constraint],
) -> tuple[Observation, ...]:
    """Observations of those whose settings could be this search's, numbered from -1 down: they come before its own."""
    axes, repeats = axes_of(space), defaultdict[str, list[TrialResult]](list)
    shared = TrialConfig(**base).model_dump(mode="json")
    for record in records:
        if record.started_from:
            # Its settings were not those of a whole trial.
            continue
        own = record.config.model_dump(mode="json")
        if all(own[name] == shared[name] for name in own if name not in space and name not in NOT_COMPARED):
            repeats[record.configuration_id].append(record)
    found: list[Observation] = []
    for group in repeats.values():
        settings = settings_of(axes, base, group[0].config)
        if settings is not None:
            found.append(combined(-1 - len(found), settings, group, goals, curves_of, limits))
    return tuple(found)


def of_another_model(foreign: Sequence[Observation], own: Sequence[Observation]) -> tuple[Observation, ...]:
    """Another model's observations as this search may take them: fewer, and on the scale of its own.

    One of LIGHTER counts, spread out from the best to the worst, and the fewer the more is known here. What did not run
    there says nothing of here. The scales are laid over each other where both have tried the same settings, as they do
    with the best ones; without such, best on best.
    """
    taught = [one for one in foreign if one.standing in (Standing.WHOLE, Standing.PARTIAL) and not one.violation]
    ended = [one for one in own if one.standing in (Standing.WHOLE, Standing.PARTIAL)]
    spread = sorted(taught, key=_end)[:: LIGHTER + len(ended) // MIN_KNOWN]
    if not ended or not spread:
        return tuple(spread)
    there = {_identity(one): one for one in taught}
    pairs = [(one, there[_identity(one)]) for one in ended if _identity(one) in there]
    shifts = [shift for here, other in pairs if (shift := _shift(here, other)) is not None]
    shift = median(shifts) if shifts else min(map(_end, ended)) - min(map(_end, taught))
    return tuple(_shifted(one, shift) for one in spread)


def best_settings(
    records: Iterable[TrialResult],
    space: Mapping[str, Domain],
    base: Settings,
    goal: Goal,
    limits: Mapping[str, Constraint],
) -> tuple[Settings, ...]:
    """The settings of the best completed configurations that broke none of `limits`, as far as the space has them.

    The best comes first, and of equals the cheapest.
    """
    axes = axes_of(space)
    completed = [r for r in records if r.status is TrialStatus.COMPLETED and not r.started_from]
    broken = {r.configuration_id for r in completed for limit in limits.values() if is_broken(limit, [r])}
    whole = (r for r in completed if r.configuration_id not in broken)
    known = ((value, record) for record in whole if (value := goal.of_trial(record)) is not None)
    ranked = sorted(known, key=lambda pair: (pair[0], pair[1].timing.total_s, pair[1].trial_id))
    found = (settings_of(axes, base, record.config) for _, record in ranked)
    return tuple({tuple(settings.items()): settings for settings in found if settings is not None}.values())[:BEST]


def _identity(observation: Observation) -> str:
    """The same for the same settings, however they are spelled: a record has lists where an axis has tuples."""
    return configuration_id(TrialConfig(**observation.settings))


def _end(observation: Observation) -> float:
    return observation.curves[0][-1][1]


def _shift(here: Observation, there: Observation) -> float | None:
    """By how much the same settings came to more here, at the last step that both have reached."""
    step = min(here.steps, there.steps)
    found, other = here.values_at(step), there.values_at(step)
    return found[0] - other[0] if found and other else None


def _shifted(observation: Observation, by: float) -> Observation:
    (curve,) = observation.curves
    return replace(observation, curves=(tuple((step, value + by) for step, value in curve),))


def settings_of(axes: Sequence[Axis], base: Settings, config: TrialConfig) -> Settings | None:
    """The searched settings of a configuration; None where one of them lies beside its axis."""
    raw = config.model_dump(mode="json")
    try:
        wanted = active(axes, base, {axis.name: raw[axis.name] for axis in axes})
        return {axis.name: axis.read(wanted[axis.name]) for axis in axes if axis.name in wanted}
    except ValueError:
        return None
