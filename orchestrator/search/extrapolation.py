"""Who will win, by the curves so far: a power law fitted to a trial's evaluations, with its uncertainty."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.search.stopping import Heard, continued, no_number

MIN_POINTS = 5
"""Evaluations before a curve of three unknowns is believed: two are left to know the scatter by."""
UNMODELLED = 0.5
"""Share of the drop still expected that the power law may be wrong by (one standard deviation): a learning rate that
falls to its end, for one, makes the loss fall faster than any power law."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """A normal distribution of the value at the end."""

    mean: float
    sd: float
    degrees_of_freedom: int

    def chance_below(self, value: float) -> float:
        """Probability that the end lies below `value`; Student's t, since the scatter is an estimate too."""
        from scipy import stats

        if self.sd == 0:
            return float(self.mean < value)
        return float(stats.t.cdf((value - self.mean) / self.sd, self.degrees_of_freedom))


def forecast(curve: Sequence[tuple[float, float]], end: float) -> Forecast | None:
    """Fit floor + drop × (at / end)^-decay, least squares, and carry it to `end`; None where nothing can be fitted.

    Source: Domhan et al. 2015, Speeding up automatic hyperparameter optimization (one of its curves, `pow3`); variance
    of the prediction by the delta method, plus the scatter of the evaluations, plus UNMODELLED.
    """
    import numpy as np
    from scipy.optimize import OptimizeWarning, curve_fit

    if len(curve) < MIN_POINTS:
        return None
    at = np.array([place for place, _ in curve]) / end
    seen = np.array([value for _, value in curve])
    low, spread = float(seen.min()), float(np.ptp(seen)) or abs(float(seen[0])) * 1e-9 or 1e-12

    def law(x: np.ndarray, floor: float, drop: float, decay: float) -> np.ndarray:
        return floor + drop * (x**-decay)

    bounds = ([low - 10 * spread, 0.0, 0.01], [float(seen.max()), 10 * spread, 5.0])
    start = (low - 0.1 * spread, 0.5 * spread, 0.5)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", OptimizeWarning)
            found, covariance = curve_fit(law, at, seen, p0=start, bounds=bounds, maxfev=2000)
    except (RuntimeError, ValueError, OptimizeWarning):
        return None
    floor, drop, _ = found
    # At the end x is 1: the derivative by the decay is 0 there, by floor and drop 1.
    slope = np.array([1.0, 1.0, 0.0])
    degrees = len(curve) - 3
    scatter = float(((seen - law(at, *found)) ** 2).sum()) / degrees
    fitted = float(slope @ covariance @ slope)
    mean = float(floor + drop)
    to_come = max(0.0, float(seen[-1]) - mean)
    return Forecast(mean, math.sqrt(max(0.0, fitted) + scatter + (UNMODELLED * to_come) ** 2), degrees)


class Extrapolation:
    """Stops a trial that has less than `min_chance` to end below the best that has ended."""

    def __init__(self, grace: float, min_chance: float, unit: str) -> None:
        self._grace, self._min_chance, self._unit = grace, min_chance, unit
        self._curves: dict[str, list[tuple[float, float]]] = {}
        self._best_end: float | None = None

    def hear(self, heard: Heard) -> str | None:
        """Judge once there is an end to be measured by."""
        if heard.value is None:
            return no_number(heard, self._unit)
        curve = self._note(heard, heard.value)
        if heard.at >= heard.end or heard.at < self._grace or self._best_end is None:
            return None
        expected = forecast(curve, heard.end)
        if expected is None:
            return None
        chance = expected.chance_below(self._best_end)
        if chance >= self._min_chance or min(value for _, value in curve) <= self._best_end:
            return None
        return (
            f"by its curve it would end at {expected.mean:.4g} ± {expected.sd:.2g}, with a chance of {chance:.2g} to "
            f"beat {self._best_end:.4g}, the best so far"
        )

    def recall(self, heard: Heard, said: str | None) -> None:  # noqa: ARG002
        """Its state is the curves, and the best end."""
        if heard.value is not None:
            self._note(heard, heard.value)

    def _note(self, heard: Heard, value: float) -> list[tuple[float, float]]:
        curve = continued(self._curves, heard, value)
        if heard.at >= heard.end:
            best = min(value for _, value in curve)
            self._best_end = best if self._best_end is None else min(self._best_end, best)
        return curve
