"""Whether another trial is worth what it takes: the improvement to be expected of the best one that could be tried."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

from orchestrator.config.axes import Axis, places_of
from orchestrator.search.fidelity import common_step, values_at
from orchestrator.search.observation import Observation, Standing
from orchestrator.search.suggest import MIN_KNOWN

CANDIDATES = 1024
"""Places of the space that are looked at, a power of two as Sobol's sequence wants it."""
LEAST_NOISE = 1e-6
"""Of the objective's variance."""


def expected_gain(axes: Sequence[Axis], known: Sequence[Observation], seed: int) -> float | None:
    """Share of the best objective so far by which the most promising configuration is expected to beat it.

    The expected improvement (Jones et al. 1998) of a Gaussian process over the searched settings, of what is known at
    the step that enough configurations have reached; the largest over the space. None while too little is known.
    """
    step = common_step(known, len(axes)) if any(o.standing in (Standing.WHOLE, Standing.PARTIAL) for o in known) else 0
    told = [(o, found[0]) for o in known if step and (found := values_at(known, o, step)) is not None]
    # What breaks a constraint is no result to be bettered.
    best = min((value for observation, value in told if not observation.violation), default=0.0)
    if len(told) < max(MIN_KNOWN, len(axes) + 1) or best == 0:
        return None
    import numpy as np
    from scipy import stats
    from scipy.stats import qmc
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import Matern, WhiteKernel

    places = np.array([places_of(axes, observation.settings) for observation, _ in told])
    values = np.array([value for _, value in told])
    kernel = Matern(np.full(len(axes), 0.5), (0.05, 20.0), nu=2.5) + WhiteKernel(1e-2, (LEAST_NOISE, 1.0))
    # One that ran away would hide all others' differences.
    capped = np.minimum(values, np.median(values) + 3 * (np.median(values) - values.min()))
    model = GaussianProcessRegressor(kernel, normalize_y=True, n_restarts_optimizer=1, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(places, capped)
    mean, deviation = model.predict(qmc.Sobol(len(axes), seed=seed).random(CANDIDATES), return_std=True)
    # Of what a trial will show, the noise is no improvement.
    noise = float(model.kernel_.k2.noise_level) * float(capped.std()) ** 2
    deviation = np.sqrt(np.maximum(deviation**2 - noise, 1e-18))
    gain = best - mean
    improvement = gain * stats.norm.cdf(gain / deviation) + deviation * stats.norm.pdf(gain / deviation)
    share = float(improvement.max()) / abs(best)
    return share if math.isfinite(share) else None
