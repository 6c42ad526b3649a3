"""Who is stopped: one life for all rules, and what each is there for. Curves made up, no Ray."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from statistics import fmean

import pytest

from orchestrator.config.sweep_config import SweepConfig
from orchestrator.search import stopping
from orchestrator.search.extrapolation import Extrapolation, forecast
from orchestrator.search.stopping import Halving, Heard, Hyperband, Median, Recalled, StopRule, Together, replay

END = 81.0
RULES: dict[str, Callable[[], StopRule]] = {
    "asha": lambda: Halving(9, 3, "steps"),
    "hyperband": lambda: Hyperband(9, 3, 3, "steps"),
    "median": lambda: Median(9, 3, "steps"),
    "extrapolation": lambda: Extrapolation(9, 0.05, "steps"),
}


def heard(trial: str, at: float, value: float | None, configuration: str | None = None) -> Heard:
    return Heard(trial, configuration or trial, at, value, END)


def power_law(floor: float, at: float) -> float:
    return floor + 2 * at**-0.7


def evaluations(seed: int, trials: int = 12) -> list[Heard]:
    """A sweep of three at a time, as it is heard: each trial every 3 steps, in turns."""
    rng = random.Random(seed)
    floors = [1 + rng.random() for _ in range(trials)]
    told = []
    for first in range(0, trials, 3):
        for at in range(3, int(END) + 1, 3):
            told += [heard(str(i), at, power_law(floors[i], at) + rng.gauss(0, 0.01)) for i in range(first, first + 3)]
    return told


def obeyed(rule: StopRule, told: Iterable[Heard], stopped: set[str]) -> list[tuple[Heard, str]]:
    """What a rule says of a sweep that does as it is told; `stopped` are those that were stopped before."""
    said = []
    for one in told:
        if one.trial_id in stopped:
            continue
        reason = rule.hear(one)
        if reason and one.at < END:
            stopped.add(one.trial_id)
            said.append((one, reason))
    return said


@pytest.mark.parametrize("name", RULES)
def test_it_stops_some_and_never_the_best(name: str) -> None:
    stopped: set[str] = set()
    told = evaluations(0)
    assert obeyed(RULES[name](), told, stopped)
    best = min((one for one in told if one.at == END), key=lambda one: one.value or math.inf)
    assert best.trial_id not in stopped


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("cut", [7, 100, 200, 290])
def test_after_an_interruption_it_decides_as_without_one(name: str, cut: int) -> None:
    told = evaluations(1)
    whole = obeyed(RULES[name](), told, set())
    stopped: set[str] = set()
    before = obeyed(RULES[name](), told[:cut], stopped)
    # What is on disk: the evaluations of each trial up to its stop. Each turn of three was heard against their clocks.
    said = {(one.trial_id, one.at): reason for one, reason in before}
    ends = {one.trial_id: one.at for one, _ in before}
    kept = [
        Recalled(3 * (place // 3) - place % 3, one, is_answered=True, said=said.get((one.trial_id, one.at)))
        for place, one in enumerate(told[:cut])
        if one.at <= ends.get(one.trial_id, END)
    ]
    again = RULES[name]()
    replay(again, kept)
    assert before + obeyed(again, told[cut:], stopped) == whole


@pytest.mark.parametrize("name", RULES)
def test_a_value_that_is_no_number_stops_its_trial_and_harms_no_other(name: str) -> None:
    rule = RULES[name]()
    assert "no number" in (rule.hear(heard("bad", 9, None)) or "")
    assert rule.hear(heard("good", 9, 1.0)) is None


def test_of_three_that_come_to_a_rung_one_goes_on_and_the_first_always_does() -> None:
    rule = Halving(9, 3, "steps")
    assert rule.hear(heard("first", 9, 3.0)) is None
    assert rule.hear(heard("worse", 9, 4.0)) == "1 of 2 configurations were better at 9 steps"
    assert rule.hear(heard("better", 9, 2.0)) is None
    assert rule.hear(heard("late", 9, 3.5)) is not None


def test_a_second_goes_on_as_soon_as_a_fourth_has_come() -> None:
    rule = Halving(9, 3, "steps")
    for place in range(3):
        rule.hear(heard(f"first {place}", 9, [1.0, 3.0, 4.0][place]))
    assert rule.hear(heard("second", 9, 2.0)) is None
    assert rule.hear(heard("third", 9, 2.5)) is not None


def test_past_half_of_its_way_the_worst_goes_on_and_counts_for_those_who_have_further_to_go() -> None:
    rule = Halving(9, 3, "steps")
    for trial, value in (("first", 1.0), ("late riser", 3.0)):
        assert rule.hear(Heard(trial, trial, 27, value, end=53)) is None
    assert rule.hear(Heard("half", "half", 27, 2.0, end=54)) == "1 of 3 configurations were better at 27 steps"
    assert rule.hear(Heard("not a number", "not a number", 28, None, end=53)) is not None


def test_a_bad_moment_at_a_rung_loses_nothing_since_a_trial_counts_by_its_best_evaluation() -> None:
    rule = Halving(9, 3, "steps")
    rule.hear(heard("steady", 9, 2.0))
    rule.hear(heard("uneven", 6, 1.0))
    assert rule.hear(heard("uneven", 9, 5.0)) is None
    assert rule.hear(heard("between", 9, 1.5)) is not None


def test_a_trial_that_begins_anew_is_judged_by_its_new_curve() -> None:
    rule = Halving(9, 3, "steps")
    rule.hear(heard("other", 9, 2.0))
    rule.hear(heard("anew", 6, 1.0))
    rule.hear(heard("anew", 3, 5.0))
    assert rule.hear(heard("anew", 9, 3.0)) is not None


def test_the_median_is_of_the_others_means_up_to_there_also_of_one_that_began_anew() -> None:
    rule = Median(1, 2, "steps")
    for at, value in ((2, 4.0), (4, 2.0), (6, 0.1)):
        assert rule.hear(heard("a", at, value)) is None
        assert rule.hear(heard("b", at, value)) is None
    # Both have a mean of 3 up to step 5.
    assert rule.hear(heard("c", 5, 3.0)) is None
    assert rule.hear(heard("d", 5, 3.1)) == "its best was worse than the median of 3 others at 5 steps"
    for name in ("a", "b"):
        rule.hear(heard(name, 2, 1.0))
        rule.hear(heard(name, 6, 1.0))
    assert rule.hear(heard("e", 5, 3.05)) == "its best was worse than the median of 4 others at 5 steps"


def test_the_median_works_out_each_mean_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each evaluation is compared with all trials: of 2,000 with ten evaluations each it took minutes."""
    worked_out: list[float] = []
    monkeypatch.setattr(stopping, "fmean", lambda values: worked_out.append(fmean(values)) or worked_out[-1])
    told = evaluations(0, trials=30)
    assert obeyed(Median(9, 3, "steps"), told, set())
    assert len(worked_out) <= len(told)


def test_what_the_median_rule_heard_before_an_interruption_is_kept_and_not_judged_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An evaluation is compared with all trials: 2,000 of them with 10 each took 8 s before a sweep went on."""
    rule, told = Median(1, 2, "steps"), [heard(name, at, 1.0) for name in "abc" for at in (3, 6)]
    with monkeypatch.context() as judged:
        judged.setattr(stopping, "median", lambda _: pytest.fail("judged"))
        replay(rule, [Recalled(0, one, is_answered=True, said=None) for one in told])
    assert rule.hear(heard("d", 6, 2.0)) == "its best was worse than the median of 3 others at 6 steps"


def test_equal_values_are_no_reason_to_stop() -> None:
    rule = Halving(9, 3, "steps")
    assert [rule.hear(heard(name, 9, 1.0)) for name in "abc"] == [None, None, None]


@pytest.mark.parametrize("name", ["asha", "hyperband", "median"])
def test_values_that_a_report_counts_as_equal_are_no_reason_to_stop(name: str) -> None:
    # Of eight trials that ZeRO stages alone tell apart. Negative ones: of an objective that is to be high.
    for values in ([6.7469992638] * 4 + [6.7469997406] * 4, [-0.8751] * 4 + [-0.8750499] * 4):
        rule = RULES[name]()
        assert not any(rule.hear(heard(str(number), 27, value)) for number, value in enumerate(values))


@pytest.mark.parametrize("name", ["asha", "hyperband", "median"])
def test_values_that_a_report_tells_apart_are_told_apart(name: str) -> None:
    rule = RULES[name]()
    values = [6.747] * 12 + [6.748] * 12
    assert any(rule.hear(heard(str(number), 27, value)) for number, value in enumerate(values))


def test_before_its_grace_is_over_nobody_is_stopped() -> None:
    rule = Halving(9, 3, "tokens")
    rule.hear(heard("good", 8, 1.0))
    assert rule.hear(heard("bad", 8, 9.0)) is None


def test_an_evaluation_past_a_rung_counts_there_once() -> None:
    rule = Halving(9, 3, "steps")
    rule.hear(heard("good", 9, 1.0))
    assert rule.hear(heard("late", 20, 0.5)) is None
    assert rule.hear(heard("late", 25, 9.0)) is None


def test_the_repeats_of_a_configuration_go_on_together_or_not_at_all() -> None:
    rule = Halving(9, 3, "steps")
    rule.hear(heard("a-0", 9, 1.0, "a"))
    rule.hear(heard("b-0", 9, 2.0, "b"))
    assert rule.hear(heard("a-1", 9, 5.0, "a")) is None
    assert rule.hear(heard("b-1", 9, 0.1, "b")) is not None


class FirstWord:
    """A rule that stops whoever is worse than 1."""

    def hear(self, heard: Heard) -> str | None:
        return "worse than 1" if heard.value is None or heard.value > 1 else None

    def recall(self, heard: Heard, said: str | None) -> None:
        """It has no state."""


def test_repeats_follow_the_one_that_comes_first_under_rules_that_judge_trials_too() -> None:
    rule = Together(FirstWord())
    assert rule.hear(heard("a-0", 3, 0.5, "a")) is None
    assert rule.hear(heard("a-1", 3, 2.0, "a")) is None, "its configuration has passed here"
    assert rule.hear(heard("a-0", 6, 2.0, "a")) is not None
    assert rule.hear(heard("a-1", 6, 0.5, "a")) is not None, "its configuration was stopped here"
    assert rule.hear(heard("a-2", 3, 2.0, "a")) is None
    assert rule.hear(heard("b-0", 3, 0.5, "b")) is None
    assert rule.hear(heard("b-1", 3, None, "b")) is not None, "what is no number goes no further, whoever has passed"
    assert rule.hear(heard("b-0", 6, 0.5, "b")) is None


def test_repeats_follow_what_was_said_before_an_interruption_and_not_what_would_be_said_now() -> None:
    rule = Together(FirstWord())
    rule.recall(heard("a-0", 3, 0.5, "a"), "worse than others then")
    assert rule.hear(heard("a-1", 3, 0.5, "a")) == "worse than others then"
    rule.recall(heard("b-0", 3, 2.0, "b"), None)
    assert rule.hear(heard("b-1", 3, 2.0, "b")) is None


def test_each_bracket_of_hyperband_gets_fewer_configurations_than_the_one_before() -> None:
    rule = Hyperband(9, 3, 3, "steps")
    counts = [0, 0, 0]
    for i in range(1000):
        counts[rule.bracket_of(str(i))] += 1
    assert counts[0] > 2 * counts[1] > 4 * counts[2] > 0


def test_a_power_law_is_carried_to_its_end() -> None:
    curve = [(at, power_law(1.5, at)) for at in range(5, 41, 5)]
    expected = forecast(curve, 200)
    assert expected is not None
    assert expected.mean == pytest.approx(power_law(1.5, 200), abs=0.01)


def test_a_low_rank_that_lies_on_its_plateau_is_stopped_and_a_high_one_that_still_falls_is_not() -> None:
    """Rank 8 has learned what it can after a third of its steps; rank 256 begins worse and ends better."""
    rng = random.Random(0)
    steps = range(10, 271, 10)
    rule = Extrapolation(50, 0.05, "steps")

    def curve(floor: float, drop: float, decay: float) -> list[tuple[int, float]]:
        return [(at, floor + drop * (at / 10) ** -decay + rng.gauss(0, 0.002)) for at in steps]

    curves = {"rank 128": curve(1.10, 0.9, 0.5), "rank 8": curve(1.45, 0.3, 2.0), "rank 256": curve(0.95, 1.2, 0.45)}
    stopped = {}
    for name, points in curves.items():
        for at, value in points:
            reason = rule.hear(Heard(name, name, at, value, 270))
            if reason and at < 270:
                stopped[name] = at
                break
    assert set(stopped) == {"rank 8"}
    assert stopped["rank 8"] <= 100


def test_without_an_end_to_be_measured_by_nobody_is_stopped_for_a_forecast() -> None:
    rule = Extrapolation(9, 0.4, "steps")
    assert not any(rule.hear(heard("only", at, 9.0 + 1 / at)) for at in range(3, 80, 3))


def test_a_curve_that_no_law_fits_has_no_forecast() -> None:
    assert forecast([(1, 1.0), (2, 0.5)], 10) is None


@pytest.mark.parametrize(
    ("scheduler", "told"),
    [
        ({"asha": {}}, "needs one of grace_steps, grace_tokens, grace_seconds"),
        ({"asha": {"grace_steps": 4, "grace_tokens": 9}}, "needs one of grace_steps"),
        ({"asha": {"grace_steps": 4}, "median": {"grace_steps": 4}}, "name one scheduler, not asha and median"),
        ({"hyperband": None}, "hyperband needs its grace_steps"),
        ({"pbt": {}}, "population"),
    ],
    ids=str,
)
def test_a_scheduler_that_cannot_be_meant_is_refused(scheduler: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        SweepConfig.model_validate(
            {"name": "a", "model": "builtin:tiny-llama", "data": {"train": "x"}, "scheduler": scheduler}
        )
