"""How long a sweep takes: its trials go through the slots under its own halving, simulated before anything runs."""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from orchestrator.planning.step_time import Range
from orchestrator.search.stopping import Halving, Heard

FIRST_START_S = Range(15.0, 25.0, 60.0)
"""From the command to a slot's first step: Ray, worker groups, imports, once a slot. On 2 CPU cores, idle to busy."""
End = Literal["low", "expected", "high"]
DRAWS = 5
"""So many orders of the configurations from the worst to the best: nobody knows which it will be."""


@dataclass(frozen=True, slots=True)
class Work:
    """One trial as a slot sees it."""

    besides_s: Range
    """Seconds that are no steps: data, model and the end."""
    step_s: Range
    steps: int
    eval_every: int
    """The scheduler hears of a trial only so often."""
    grace_steps: float
    """Steps to its first rung."""
    configuration: str
    """Its repeats go on together or not at all."""
    limit_s: float = math.inf
    """When it is ended, wherever it is."""


@dataclass(frozen=True, slots=True)
class Simulated:
    """What a sweep takes."""

    makespan_s: Range
    trials_s: Range
    """All trials' seconds together."""


def simulate(
    works: Sequence[Work], slots: int, factor: int | None, gpu_shared_by: int = 1, alone: float = 1.0
) -> Simulated:
    """Low and expected where one of `factor` configurations goes on from each rung (None: all do).

    High if nobody is stopped, as where every configuration beats those before it.

    Args:
        works: the trials, in their order.
        slots: trials at a time.
        factor: of successive halving.
        gpu_shared_by: trials at a time on a GPU, whose turns are in each step's time.
        alone: the share of a step's time that is left where a trial has the GPU for itself.
    """
    if not works:
        return Simulated(Range(0.0, 0.0, 0.0), Range(0.0, 0.0, 0.0))
    slots = min(slots, len(works))
    names = list(dict.fromkeys(work.configuration for work in works))
    draws = range(DRAWS if factor else 1)
    orders = [
        dict(zip(names, random.Random(draw).sample(range(len(names)), len(names)), strict=True)) for draw in draws
    ]

    def slowness(at_once: int) -> float:
        return max(alone, math.ceil(at_once * gpu_shared_by / slots) / gpu_shared_by)

    low = [_once(works, "low", order, slots, factor, slowness) for order in orders]
    expected = [_once(works, "expected", order, slots, factor, slowness) for order in orders]
    high = _once(works, "high", orders[0], slots, None, slowness)
    ranges = (
        Range(min(run[i] for run in low), sum(run[i] for run in expected) / len(expected), high[i]) for i in (0, 1)
    )
    return Simulated(*ranges)


def _once(
    works: Sequence[Work],
    end: End,
    place: Mapping[str, int],
    slots: int,
    factor: int | None,
    slowness: Callable[[int], float],
) -> tuple[float, float]:
    """One run at this end of what its parts may take: when its last trial ends, and the seconds of all.

    Its clock is that of trials that share GPUs as planned; the fewer are left at the end, the faster it goes.
    """
    rule = Halving(1.0, factor, "graces") if factor else None
    waiting = deque(range(len(works)))
    events: list[tuple[float, int, int, float]] = []

    def go_on(trial: int, begun_s: float, done: int) -> None:
        step = _next_stop(works[trial], done, factor)
        heapq.heappush(events, (begun_s + _taken_s(works[trial], step, end), trial, step, begun_s))

    start_s: float = getattr(FIRST_START_S, end)
    for _ in range(slots):
        go_on(waiting.popleft(), start_s, 0)
    clock_s = ended_s = start_s
    trials_s = 0.0
    while events:
        at_once = len(events)
        now_s, trial, step, begun_s = heapq.heappop(events)
        passed_s = (now_s - clock_s) * slowness(at_once)
        clock_s, ended_s, trials_s = now_s, ended_s + passed_s, trials_s + at_once * passed_s
        work = works[trial]
        is_stopped = rule is not None and rule.hear(_heard(work, trial, step, place[work.configuration])) is not None
        if step < work.steps and not is_stopped and _taken_s(work, step, end) < work.limit_s:
            go_on(trial, begun_s, step)
        elif waiting:
            go_on(waiting.popleft(), now_s, 0)
    return ended_s, trials_s


def _taken_s(work: Work, step: int, end: End) -> float:
    besides_s: float = getattr(work.besides_s, end)
    step_s: float = getattr(work.step_s, end)
    return min(work.limit_s, besides_s + step * step_s)


def _heard(work: Work, trial: int, step: int, place: int) -> Heard:
    return Heard(str(trial), work.configuration, step / work.grace_steps, place, work.steps / work.grace_steps)


def _next_stop(work: Work, done: int, factor: int | None) -> int:
    """The step at which the next rung is told: the first evaluation at or after it, or the end."""
    if factor is None:
        return work.steps
    rung = work.grace_steps
    while rung <= done:
        rung *= factor
    return min(work.steps, math.ceil(rung / work.eval_every) * work.eval_every)
