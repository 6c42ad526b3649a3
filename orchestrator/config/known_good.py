"""What the field begins a LoRA search with, as far as a sweep file searches it: `search.points: [known_good]`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

from orchestrator.config.axes import Axis
from orchestrator.config.search_space import Settings
from orchestrator.config.trial_config import TrialConfig

KnownGood = Literal["known_good"]
(KNOWN_GOOD,) = get_args(KnownGood)
GUIDED = ("learning_rate", "alpha")
"""Settings that it has a value for; all others stand in the middle."""
RATE, RATE_RANK = 2e-4, 16
"""Source: Dettmers et al. 2023, QLoRA, appendix B: 2e-4 for models of 7 to 13 billion weights."""
RATE_FULL = RATE / 10
"""Training all weights wants about a tenth. Source: Schulman et al. 2025, LoRA Without Regret."""


def known_good(axes: Sequence[Axis], base: Settings) -> tuple[Settings, ...]:
    """A point for a middle, the lowest and the highest rank, or for the one that is shared."""
    by_name = {axis.name: axis for axis in axes}
    rank = by_name.get("rank")
    ranks = [rank.at(place) for place in (0.5, 0.0, 1.0)] if rank else [TrialConfig(**base).rank]
    points = []
    for one in dict.fromkeys(ranks):
        wanted = {"learning_rate": rate_of(one), "alpha": one if one == "full" else 2 * one}
        point: Settings = {"rank": one} if rank else {}
        points.append(point | {name: _nearest(by_name[name], wanted[name]) for name in GUIDED if name in by_name})
    return tuple(points)


def rate_of(rank: int | str) -> float:
    """Learning rate for a rank whose alpha is a multiple of it.

    The adapter's output is then scaled by a constant, where it should fall with the root of the rank (Kalajdzievski
    2023, A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA): the learning rate falls in its place.
    """
    return RATE_FULL if isinstance(rank, str) else RATE * math.sqrt(RATE_RANK / rank)


def _nearest(axis: Axis, wanted: Any) -> Any:
    """The value on the axis that is the fewest times larger or smaller; `2x` where alpha has it."""
    if not isinstance(wanted, int | float):
        return axis.at(0.5)
    if not axis.values:
        value = min(axis.high, max(axis.low, wanted))
        return round(value) if axis.is_whole else value
    if axis.name == "alpha" and "2x" in axis.values:
        return "2x"
    numbers = [value for value in axis.values if isinstance(value, int | float) and value > 0]
    return min(numbers, key=lambda value: abs(math.log(value / wanted)), default=axis.at(0.5))
