"""Which differences in memory and speed are told, and which may be noise."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Literal

from orchestrator.reporting import quantities
from orchestrator.reporting.statistics import Estimate
from orchestrator.results.records import SweepResult, TrialResult

Verdict = Literal["same", "differs", "unclear"]
LITTLE = 0.01
ONE_RUN_SPEED = 0.10
"""Half of the pairs of repeats of one configuration in docs/studies lie within it, the others up to 20 % apart."""
ONE_RUN_MEMORY = 0.05
"""Of a process: all but one of those pairs lie within it. What torch counts on a GPU repeats itself."""


def verdict(difference: Estimate | None, least: float) -> Verdict | None:
    """What may be said of two measurements by how far their logarithms are apart; None where nothing is known.

    With repeats the interval decides; of one run each, whether it is `least` or more.
    """
    if difference is None:
        return None
    apart, half_width = abs(difference.mean), difference.half_width
    if half_width is None:
        return "differs" if apart >= least else "unclear" if least > LITTLE else "same"
    if apart + half_width < LITTLE:
        return "same"
    return "differs" if apart > half_width else "unclear"


def logarithms(
    trials: Iterable[TrialResult], reading: Callable[[TrialResult], float | None]
) -> dict[str, dict[int, float]]:
    """By configuration and repeat: what scatters in memory and speed is a share of them."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for trial in trials:
        value = reading(trial)
        if value and 0 < value < math.inf:
            found[trial.configuration_id][trial.repeat] = math.log(value)
    return found


def memory_of(trial: TrialResult) -> float | None:
    """As measured."""
    return trial.peak_memory.measured_bytes if trial.peak_memory else None


def least_memory(sweep: SweepResult) -> float:
    """The share by which one run's memory must differ from another's."""
    counts = any(trial.peak_memory and trial.peak_memory.kind == "cuda_allocated" for trial in sweep.trials)
    return LITTLE if counts else ONE_RUN_MEMORY


def one_run_words(sweep: SweepResult) -> str:
    """How the report is to be read where nothing was repeated."""
    speed, least = quantities.share(ONE_RUN_SPEED), least_memory(sweep)
    memory = "" if least == LITTLE else f" or {quantities.share(least)} in memory"
    return (
        f"One run each: a difference may be noise. Less than {speed} in speed{memory} is told as no clear difference, "
        "since repeats of one configuration come as far apart."
    )
