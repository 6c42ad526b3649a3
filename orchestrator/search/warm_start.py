"""What trials that no adaptive search proposed can teach it: of another sweep, or of a grid in the same folder."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from orchestrator.config.axes import Axis, Domain, active, axes_of
from orchestrator.config.search_space import Settings
from orchestrator.config.trial_config import TrialConfig
from orchestrator.results.records import TrialResult, TrialStatus
from orchestrator.search.observation import Curves, Goal, Limit, Observation, combined

NOT_COMPARED = frozenset({"seed", "micro_batch_size"})
"""Settings that change no result, or that planning chooses."""
BEST = 3
"""So many of the best are tried first: their order carries over to other models, their values do not."""


def learned(
    records: Iterable[TrialResult],
    space: Mapping[str, Domain],
    base: Settings,
    goals: Sequence[Goal],
    curves_of: Curves,
    limits: Mapping[str, Limit],
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


def best_settings(
    records: Iterable[TrialResult], space: Mapping[str, Domain], base: Settings, goal: Goal
) -> tuple[Settings, ...]:
    """The settings of the best completed trials, the best first, as far as this search has them."""
    axes = axes_of(space)
    whole = (r for r in records if r.status is TrialStatus.COMPLETED and not r.started_from)
    ended = [(goal.of(r.best), r) for r in whole if r.best]
    ranked = sorted(((v, r) for v, r in ended if v is not None), key=lambda pair: (pair[0], pair[1].trial_id))
    found = (settings_of(axes, base, record.config) for _, record in ranked)
    return tuple({tuple(settings.items()): settings for settings in found if settings is not None}.values())[:BEST]


def settings_of(axes: Sequence[Axis], base: Settings, config: TrialConfig) -> Settings | None:
    """The searched settings of a configuration; None where one of them lies beside its axis."""
    raw = config.model_dump(mode="json")
    try:
        wanted = active(axes, base, {axis.name: raw[axis.name] for axis in axes})
        return {axis.name: axis.read(wanted[axis.name]) for axis in axes if axis.name in wanted}
    except ValueError:
        return None
