"""Ray Tune's scheduler out of the sweep file's `scheduler:`."""

from __future__ import annotations

import numpy as np
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from orchestrator.config.sweep_config import SweepConfig


def make_scheduler(sweep: SweepConfig) -> TrialScheduler:
    """ASHA on optimizer steps, or FIFO where none is named."""
    asha = sweep.scheduler.asha
    if asha is None:
        return FIFOScheduler()
    # ASHA draws brackets from numpy's global state (seen in ray 2.60.0); with one bracket nothing depends on it.
    np.random.seed(sweep.search.seed)
    return ASHAScheduler(
        time_attr="step",
        metric=sweep.objective.metric,
        mode=sweep.objective.mode,
        grace_period=asha.grace_steps,
        reduction_factor=asha.reduction_factor,
        # Trials end by themselves at max_steps, which may differ between them: no rung may cut there.
        max_t=10**9,
    )


def describe(sweep: SweepConfig) -> str:
    """The scheduler as a reason gives it."""
    asha = sweep.scheduler.asha
    if asha is None:
        return "fifo"
    return f"asha (grace_steps {asha.grace_steps}, reduction_factor {asha.reduction_factor})"
