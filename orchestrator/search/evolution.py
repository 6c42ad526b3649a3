"""CMA-ES over the unit cube of the searched settings."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.config.axes import Axis, places_of
from orchestrator.search.observation import Observation, Standing

SIGMA = 0.3
"""The first step size: a third of every axis. Source: Hansen 2016, The CMA Evolution Strategy: A Tutorial."""


def cma_es(axes: Sequence[Axis], known: Sequence[Observation], seed: int) -> list[float]:
    """A draw from the distribution that the generations so far have led to.

    A generation is as many configurations as make a population, in the order of proposals. Only their order counts to
    CMA-ES, so what was refused or stopped takes its place in it, and nobody makes up a value for it.
    """
    import numpy as np
    from cmaes import CMA

    bounds = np.tile([0.0, 1.0], (len(axes), 1))
    optimizer = CMA(mean=np.full(len(axes), 0.5), sigma=SIGMA, bounds=bounds, seed=seed)
    ended = [o for o in known if o.standing not in (Standing.OPEN, Standing.UNKNOWN)]
    size = optimizer.population_size
    for first in range(0, len(ended) - size + 1, size):
        generation = sorted(ended[first : first + size], key=rank)
        optimizer.tell([(np.array(places_of(axes, o.settings)), float(place)) for place, o in enumerate(generation)])
    return [float(place) for place in optimizer.ask()]


def rank(observation: Observation) -> tuple[float, float, float]:
    """Violations last, by how much; then what was stopped early; then by objective, lower first."""
    if observation.standing is Standing.REFUSED or observation.violation:
        return (observation.violation or 1.0, 0.0, 0.0)
    return (0.0, -float(observation.steps), observation.curves[0][-1][1])
