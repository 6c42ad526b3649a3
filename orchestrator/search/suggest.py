"""The next configuration of an adaptive search: a function of the seed and of what is known, with no state of its own.

So a search goes on after an interruption as if there had been none: the records say what was proposed and what came of
it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

from orchestrator.config.axes import Axis, Domain, active, axes_of, complete, places_of, settings_at
from orchestrator.config.search_space import Settings, configuration_id, is_excluded, sample
from orchestrator.config.trial_config import TrialConfig
from orchestrator.search.observation import Observation, Standing

Algorithm = Literal["tpe", "gp", "cma_es"]
ALGORITHMS: tuple[str, ...] = get_args(Algorithm)
MIN_KNOWN = 5
"""Configurations that must be known before a model is asked, and one more than there are searched settings."""
ATTEMPTS = 4
"""So often a proposal may be one that was made before, or is excluded, before its nearest neighbour is taken."""
NEIGHBOURS = 256
"""Configurations drawn by chance, of which the nearest takes its place."""
FIRST: tuple[Settings, ...] = ({},)
"""What is tried first where nobody says it: the middle of the space, since whoever wrote the ranges put them around
what is believed to be good. Source: Song et al. 2024, The Vizier Gaussian Process Bandit Algorithm, which begins there.
"""


def next_settings(
    algorithm: str,
    space: Mapping[str, Domain],
    base: Settings,
    exclude: Sequence[Mapping[str, Any]],
    points: Sequence[Settings],
    known: Sequence[Observation],
    seed: int,
    warm: Sequence[Observation] = (),
) -> Settings | None:
    """What to try after `known`; None where the space holds nothing new.

    `base` are the settings that are not searched, `points` what is tried first; what another sweep has learned (`warm`)
    is known to the models, and may be tried again here.
    """
    axes = axes_of(space)
    number = 1 + max((observation.number for observation in known if observation.number >= 0), default=-1)
    tried = {configuration_id(TrialConfig(**{**base, **observation.settings})) for observation in known}

    def is_new(settings: Settings) -> bool:
        config = TrialConfig(**{**base, **settings})
        return configuration_id(config) not in tried and not is_excluded(config, exclude)

    for point in points:
        settings = complete(axes, base, point)
        if is_new(settings):
            return settings
    propose = proposer(algorithm, axes, base, [*warm, *known], number, seed)
    for attempt in range(ATTEMPTS):
        wanted = propose(attempt)
        if is_new(wanted):
            return wanted
    drawn = sample(base, space, exclude, len(tried) + NEIGHBOURS, derived_seed(seed, number, ATTEMPTS))
    others = (active(axes, base, config.model_dump(mode="json")) for config in drawn)
    return min(filter(is_new, others), key=lambda other: distance(axes, wanted, other), default=None)


def proposer(
    algorithm: str, axes: Sequence[Axis], base: Settings, known: Sequence[Observation], number: int, seed: int
) -> Callable[[int], Settings]:
    """What makes proposals, which may have been made before, by their attempt; the model is built once for all."""
    usable = [observation for observation in known if _is_on(axes, observation)]
    told = [observation for observation in usable if observation.standing in (Standing.WHOLE, Standing.PARTIAL)]
    if len(told) < max(MIN_KNOWN, len(axes) + 1):
        # One sequence a sweep: its points are spread out among each other.
        return lambda attempt: settings_at(axes, base, spread_out(len(axes), number, seed + attempt))
    if algorithm == "cma_es":
        from orchestrator.search.evolution import cma_es

        return lambda attempt: settings_at(axes, base, cma_es(axes, usable, derived_seed(seed, number, attempt)))
    from orchestrator.search import models

    ask = (models.gp if algorithm == "gp" else models.tpe)(axes, base, usable)
    return lambda attempt: ask(derived_seed(seed, number, attempt))


def spread_out(dimensions: int, number: int, seed: int) -> list[float]:
    """Point `number` of a scrambled Sobol sequence: the first ones cover the space better than chance does."""
    from scipy.stats import qmc

    sequence = qmc.Sobol(dimensions, scramble=True, seed=seed)
    if number:
        sequence.fast_forward(number)
    return [float(unit) for unit in sequence.random(1)[0]]


def distance(axes: Sequence[Axis], one: Settings, other: Settings) -> float:
    """How far two configurations are apart, an axis counting 1; values without an order are a whole axis apart."""
    places = zip(axes, places_of(axes, one), places_of(axes, other), strict=True)
    return sum(abs(a - b) if axis.is_ordered else float(a != b) for axis, a, b in places)


def derived_seed(*parts: int) -> int:
    """31 bits that any change of a part changes."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big") >> 1


def _is_on(axes: Sequence[Axis], observation: Observation) -> bool:
    """Whether all its values are on the axes: the sweep file may have another space now."""
    try:
        places_of(axes, observation.settings)
    except ValueError:
        return False
    return True
