"""A sweep's length, simulated."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from statistics import fmean

import pytest

from orchestrator.planning.makespan import FIRST_START_S, Work, simulate
from orchestrator.planning.step_time import Range, certain
from orchestrator.search.stopping import Halving, Heard

SECOND = Range(0.5, 1.0, 2.0)


def works(
    count: int,
    steps: int = 90,
    eval_every: int = 10,
    besides_s: float = 5.0,
    repeats: int = 1,
    limit_s: float = math.inf,
) -> list[Work]:
    return [
        Work(certain(besides_s), SECOND, steps, eval_every, 10, f"configuration {n}", limit_s)
        for _ in range(repeats)
        for n in range(count)
    ]


def test_without_a_scheduler_the_slots_take_one_trial_after_the_other() -> None:
    taken = simulate(works(5), 2, None)
    assert taken.makespan_s.expected == FIRST_START_S.expected + 3 * (5 + 90)
    assert taken.trials_s == Range(5 * 50, 5 * 95, 5 * 185)
    assert simulate([], 2, None).makespan_s.high == 0


def test_what_is_no_step_is_counted_at_each_end_of_what_it_may_take() -> None:
    (one,) = works(1)
    taken = simulate([replace(one, besides_s=Range(1.0, 5.0, 20.0))], 1, None)
    assert taken.trials_s == Range(1 + 45, 5 + 90, 20 + 180)


def test_asha_lets_the_first_at_each_rung_go_on_and_most_of_the_later_ones_not() -> None:
    alone, many = simulate(works(1), 1, 3), simulate(works(90), 1, 3)
    assert alone.trials_s.expected == 95
    full = simulate(works(90), 1, None)
    # Synchronous halving would train 10 steps of each, 20 more of a third and 60 more of a ninth: 23 of 90 steps.
    assert 0.24 < (many.trials_s.expected - 90 * 5) / (full.trials_s.expected - 90 * 5) < 0.45
    assert many.makespan_s.high == full.makespan_s.high


def test_a_rung_between_two_evaluations_is_told_at_the_second() -> None:
    often, seldom = (simulate(works(60, eval_every=every), 1, 3) for every in (10, 45))
    assert seldom.trials_s.expected > 1.5 * often.trials_s.expected
    assert simulate(works(9, eval_every=90), 3, 3).trials_s.expected == 9 * 95


@pytest.mark.parametrize(("count", "repeats"), [(27, 1), (27, 3), (9, 5)])
def test_one_slot_trains_as_long_as_the_sweeps_own_rule_lets_it(
    count: int, repeats: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all repeats of a configuration: they follow the first one and take nobody's place."""

    def trained(seed: int) -> int:
        rule, steps = Halving(10, 3, "steps"), 0
        place = random.Random(seed).sample(range(count), count)
        for repeat in range(repeats):
            for n in range(count):
                for at in range(10, 91, 10):
                    steps += 10
                    if rule.hear(Heard(f"{n}-{repeat}", str(n), at, place[n], 90)):
                        break
        return steps

    monkeypatch.setattr("orchestrator.planning.makespan.DRAWS", 30)
    planned = simulate(works(count, besides_s=0.0, repeats=repeats), 1, 3).trials_s.expected
    assert planned == pytest.approx(fmean(map(trained, range(30))))


def test_a_trial_that_is_ended_at_its_limit_takes_no_longer() -> None:
    taken = simulate(works(4, limit_s=60.0), 2, None)
    # At half a second a step they end by themselves.
    assert taken.trials_s == Range(4 * 50, 4 * 60, 4 * 60)
    assert taken.makespan_s.expected == FIRST_START_S.expected + 2 * 60


def test_who_is_left_on_a_shared_gpu_has_more_of_it() -> None:
    eight = simulate(works(8), 7, None, gpu_shared_by=7, alone=1 / 7)
    assert eight.makespan_s.expected == pytest.approx(FIRST_START_S.expected + 95 + 95 / 7)
    assert eight.trials_s.expected == pytest.approx(7 * 95 + 95 / 7)
    no_faster = simulate(works(8), 7, None, gpu_shared_by=7, alone=1.0)
    assert no_faster.makespan_s.expected == FIRST_START_S.expected + 2 * 95
