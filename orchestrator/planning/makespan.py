"""How long a sweep takes: its trials go through the slots under its scheduler, simulated before anything runs."""

from __future__ import annotations

import bisect
import heapq
import math
import random
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.planning.step_time import Range

FIRST_START_S = Range(15.0, 25.0, 60.0)
"""From the command to a slot's first step: Ray, worker groups, imports, once a slot. On 2 CPU cores, idle to busy."""
DRAWS = 5
"""So many orders of the trials from the worst to the best: nobody knows which it will be."""


@dataclass(frozen=True, slots=True)
class Work:
    """One trial as a slot sees it."""

    besides_s: float
    """Seconds that are no steps: data, model and the end."""
    step_s: Range
    steps: int
    eval_every: int
    """The scheduler hears of a trial only so often."""
    grace_steps: float
    """Steps to its first rung."""


@dataclass(frozen=True, slots=True)
class Simulated:
    """What a sweep takes."""

    makespan_s: Range
    trials_s: Range
    """All trials' seconds together."""


def simulate(works: Sequence[Work], slots: int, factor: int | None) -> Simulated:
    """Low and expected where one of `factor` trials goes on from each rung (None: all do).

    High if nobody is stopped, as where every trial beats those before it.
    """
    if not works:
        return Simulated(Range(0.0, 0.0, 0.0), Range(0.0, 0.0, 0.0))
    orders = [random.Random(draw).sample(range(len(works)), len(works)) for draw in range(DRAWS if factor else 1)]
    start = FIRST_START_S
    low = [_once(works, [work.step_s.low for work in works], start.low, order, slots, factor) for order in orders]
    expected = [
        _once(works, [work.step_s.expected for work in works], start.expected, order, slots, factor) for order in orders
    ]
    high = _once(works, [work.step_s.high for work in works], start.high, orders[0], slots, None)
    ranges = (
        Range(min(run[i] for run in low), sum(run[i] for run in expected) / len(expected), high[i]) for i in (0, 1)
    )
    return Simulated(*ranges)


def _once(
    works: Sequence[Work],
    step_s: Sequence[float],
    start_s: float,
    quality: Sequence[int],
    slots: int,
    factor: int | None,
) -> tuple[float, float]:
    """One run: when its last trial ends, and the seconds of all."""
    waiting = deque(range(len(works)))
    rungs: dict[int, list[int]] = defaultdict(list)
    events: list[tuple[float, int, int, int]] = []
    ended_s = trials_s = 0.0

    def go_on(now_s: float, trial: int, done: int) -> None:
        rung, step = _next_stop(works[trial], done, factor)
        heapq.heappush(events, (now_s + (step - done) * step_s[trial], trial, rung, step))

    for _ in range(min(slots, len(works))):
        first = waiting.popleft()
        go_on(start_s + works[first].besides_s, first, 0)
    while events:
        now_s, trial, rung, step = heapq.heappop(events)
        if step < works[trial].steps and factor and _goes_on(rungs[rung], quality[trial], factor):
            go_on(now_s, trial, step)
            continue
        ended_s = now_s
        trials_s += works[trial].besides_s + step * step_s[trial]
        if waiting:
            following = waiting.popleft()
            go_on(now_s + works[following].besides_s, following, 0)
    return ended_s, trials_s


def _next_stop(work: Work, done: int, factor: int | None) -> tuple[int, int]:
    """The next rung's number, and the step at which it is told: the first evaluation at or after it, or the end."""
    if factor is None:
        return 0, work.steps
    number, rung = 0, work.grace_steps
    while rung <= done:
        number, rung = number + 1, rung * factor
    step = math.ceil(rung / work.eval_every) * work.eval_every
    while rung * factor <= step:
        number, rung = number + 1, rung * factor
    return number, min(work.steps, step)


def _goes_on(reached: list[int], quality: int, factor: int) -> bool:
    """Among the first 1 / factor of those that were here before it (ray 2.60.0, async_hyperband.py, cutoff)."""
    place = (len(reached) - 1) * (1 - 1 / factor)
    below = int(place)
    cutoff = None
    if reached:
        above = reached[min(below + 1, len(reached) - 1)]
        cutoff = reached[below] + (place - below) * (above - reached[below])
    bisect.insort(reached, quality)
    return cutoff is None or quality >= cutoff
