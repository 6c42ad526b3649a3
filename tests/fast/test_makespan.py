"""A sweep's length, simulated."""

from __future__ import annotations

from orchestrator.planning.makespan import FIRST_START_S, Work, simulate
from orchestrator.planning.step_time import Range

SECOND = Range(0.5, 1.0, 2.0)


def works(count: int, steps: int = 90, eval_every: int = 10, besides_s: float = 5.0) -> list[Work]:
    return [Work(besides_s, SECOND, steps, eval_every, grace_steps=10)] * count


def test_without_a_scheduler_the_slots_take_one_trial_after_the_other() -> None:
    taken = simulate(works(5), 2, None)
    assert taken.makespan_s.expected == FIRST_START_S.expected + 3 * (5 + 90)
    assert taken.trials_s == Range(5 * 50, 5 * 95, 5 * 185)
    assert simulate([], 2, None).makespan_s.high == 0


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
