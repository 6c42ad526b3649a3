"""Who of a population goes on, and with which settings: a function of the seed and of how its members ended.

Source: Jaderberg et al. 2017, Population Based Training of Neural Networks: truncation selection, and explore by
perturbing or resampling. Generations are compared whole, so that what is decided depends on no clock.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.config.axes import Axis, active
from orchestrator.config.search_space import Settings, is_excluded
from orchestrator.config.trial_config import CHANGEABLE, TrialConfig
from orchestrator.search.suggest import ATTEMPTS, derived_seed

FACTORS = (0.8, 1.2)
"""By one of which a number is multiplied. Source: Jaderberg et al. 2017, section 4.1.1."""
RESAMPLED = 0.25
"""Chance that a setting is drawn anew from all of its axis, so that a population does not end in one place."""


@dataclass(frozen=True, slots=True)
class Member:
    """One trial of a generation, as far as it is known."""

    number: int
    """Its place in the population, which its successor takes."""
    trial_id: str
    settings: Settings
    has_ended: bool
    worth: tuple[float, float] | None = None
    """By how much it violates constraints, then its objective at the generation's end; lower is better. None: it has
    not ended, or left no checkpoint."""


@dataclass(frozen=True, slots=True)
class Successor:
    """What takes a member's place in the next generation."""

    number: int
    parent: Member
    """Whose checkpoint it begins with."""
    settings: Settings


def successors(
    axes: Sequence[Axis],
    base: Settings,
    exclude: Sequence[Mapping[str, Any]],
    members: Sequence[Member],
    quantile: float,
    seed: int,
    generation: int,
) -> Iterator[Successor]:
    """Those of the next generation that are certain by now.

    The worst `quantile` are given up, with all that left no checkpoint; each of their places is taken by one of the
    best `quantile`, drawn by chance, with other settings. The rest go on as they are: each as soon as enough members
    are known to be worse, and the others once all have ended. No successor where nobody can go on.

    generation: number of the one that `members` are.
    """
    given_up = max(1, int(len(members) * quantile))
    healthy = sorted((m for m in members if m.worth is not None), key=lambda m: (m.worth, m.number))
    failed = sum(member.has_ended and member.worth is None for member in members)
    losers = [member for member in members if member.has_ended and member.worth is None]
    for place, member in enumerate(healthy):
        if failed + len(healthy) - place - 1 >= given_up:
            yield Successor(member.number, member, member.settings)
        else:
            losers.append(member)
    if not healthy or not all(member.has_ended for member in members):
        return
    for member in losers:
        rng = random.Random(derived_seed(seed, generation, member.number))
        parent = rng.choice(healthy[:given_up])
        yield Successor(member.number, parent, explored(axes, base, exclude, parent.settings, rng))


def explored(
    axes: Sequence[Axis],
    base: Settings,
    exclude: Sequence[Mapping[str, Any]],
    settings: Settings,
    rng: random.Random,
) -> Settings:
    """The settings with those changed that may change while a trial trains; as they are where others are excluded."""
    values = {axis.name: settings.get(axis.name, axis.at(0.5)) for axis in axes}
    for _ in range(ATTEMPTS):
        changed = {a.name: perturbed(a, values[a.name], rng) for a in axes if a.name in CHANGEABLE}
        found = active(axes, base, values | changed)
        if found != settings and not is_excluded(TrialConfig(**{**base, **found}), exclude):
            return found
    return settings


def perturbed(axis: Axis, value: Any, rng: random.Random) -> Any:
    """A fifth more or less, or a choice's neighbour; now and then anything on the axis."""
    if rng.random() < RESAMPLED:
        return axis.at(rng.random())
    if axis.values:
        place = axis.values.index(axis.read(value)) + rng.choice((-1, 1))
        return axis.values[min(len(axis.values) - 1, max(0, place))]
    return min(axis.high, max(axis.low, value * rng.choice(FACTORS)))
