"""Statistics on made-up sweeps whose truth is known."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest

from orchestrator.reporting import cost_charts, effect_charts, statistics
from orchestrator.reporting.effects import main_effects
from orchestrator.reporting.importance import importances
from orchestrator.reporting.objectives import front_of
from orchestrator.reporting.recommendation import recommend, trial_to_take
from orchestrator.results.records import Suggestion, SweepResult, TrialStatus
from tests.made_up_sweep import REASONS, made_up_sweep, made_up_trial, simulated

SWEEPS = 1000


def test_intervals_of_means_and_differences_cover_the_truth_in_95_percent_of_sweeps() -> None:
    pytest.importorskip("scipy")
    mean_covers = difference_covers = all_cover = 0
    truth = [2.0, 2.03, 2.1]
    for seed in range(SWEEPS):
        found = {s.configuration_id: s for s in statistics.summaries(simulated(truth, 4, seed))}
        by_rank = sorted(found.values(), key=lambda summary: summary.settings)
        objective = by_rank[0].objective
        assert objective is not None
        assert objective.half_width is not None
        mean_covers += abs(objective.mean - truth[0]) <= objective.half_width
        values = {s.label: s.objective_by_repeat for s in by_rank}
        noise = statistics.noise_of(values)
        assert noise is not None
        first, *others = values.values()
        for configurations in (2, 3):
            misses = []
            for other, mean in zip(others, truth[1:], strict=True):
                difference = statistics.paired_difference(other, first, noise, configurations)
                assert difference is not None
                assert difference.half_width is not None
                misses.append(abs(difference.mean - (mean - truth[0])) > difference.half_width)
            difference_covers += configurations == 2 and not misses[0]
            all_cover += configurations == 3 and not any(misses)
    assert 930 <= mean_covers <= 970
    assert 930 <= difference_covers <= 970
    assert 950 <= all_cover <= 990  # These two of three differences; all of them hold in 95 %.


@pytest.mark.parametrize("configurations", [4, 12, 20])
def test_none_of_equal_configurations_is_told_worse_than_the_best_of_them_in_95_percent_of_sweeps(
    configurations: int,
) -> None:
    wrong = 0
    for seed in range(500):
        draw = random.Random(seed)
        values = {f"c{i}": {repeat: draw.gauss(0, 1) for repeat in range(3)} for i in range(configurations)}
        noise = statistics.noise_of(values)
        assert noise is not None
        best = min(values.values(), key=lambda by_repeat: sum(by_repeat.values()))
        differences = [statistics.paired_difference(one, best, noise, configurations) for one in values.values()]
        wrong += any(d is not None and d.half_width is not None and d.mean > d.half_width for d in differences)
    assert 8 <= wrong <= 42


@pytest.mark.parametrize(("configurations", "repeats"), [(2, 3), (6, 3), (12, 2)])
def test_without_a_real_difference_the_cheapest_is_recommended(configurations: int, repeats: int) -> None:
    cheapest = sum(recommend(simulated([2.0] * configurations, repeats, seed)).label == "rank=4" for seed in range(300))
    assert cheapest >= 285


def test_a_real_difference_is_found_and_the_worse_ones_are_not_recommended() -> None:
    truth = [2.3, 2.0, 2.0, 2.0]
    found = [recommend(simulated(truth, 3, seed, noise_sd=0.02)).label for seed in range(100)]
    assert found.count("rank=8") >= 95
    assert "rank=4" not in found


def test_the_seeds_own_shift_takes_no_part_in_the_comparison() -> None:
    answer = recommend(simulated([2.1, 2.0], 4, 1, noise_sd=0.001, seed_sd=1.0))
    assert answer.label == "rank=8"
    assert answer.is_decided


def test_a_configuration_that_only_ran_a_lucky_seed_has_no_advantage() -> None:
    stopped = {(1, 1): TrialStatus.STOPPED, (1, 2): TrialStatus.STOPPED}
    lucky = 0
    for seed in range(100):
        sweep = simulated(
            [2.0, 2.1, 2.0],
            3,
            seed,
            noise_sd=0.01,
            seed_sd=0.5,
            status_of=lambda place, repeat: stopped.get((place, repeat), TrialStatus.COMPLETED),
        )
        lucky += statistics.summaries(sweep)[0].label == "rank=8"
    assert lucky == 0


def test_the_words_name_the_difference_the_memory_and_the_speed() -> None:
    trials = [
        made_up_trial({"rank": rank}, repeat, objective=value, memory_bytes=memory, step_time_s=time_s)
        for rank, values, memory, time_s in (
            (64, (2.004, 2.011, 1.999), 69 * 2**20, 0.5),
            (256, (2.002, 2.004, 1.996), 100 * 2**20, 0.7),
        )
        for repeat, value in enumerate(values)
    ]
    answer = recommend(made_up_sweep(trials))
    assert answer.answer == (
        "Take rank=64: it is within 0.0040 ± 0.0066 of rank=256, takes 31 % less memory and is 1.4× faster."
    )
    assert answer.is_decided


def test_one_configuration_that_scatters_does_not_hide_what_the_others_show() -> None:
    found = []
    for seed in range(50):
        sweep = simulated([2.1, 2.0, 2.0, 2.0, 2.5], 3, seed, noise_sd=0.01)
        wild = {0: -0.9, 1: 0.7, 2: 0.5}
        trials = [
            made_up_trial({"rank": 64}, t.repeat, objective=2.5 + wild[t.repeat]) if t.config.rank == 64 else t
            for t in sweep.trials
        ]
        found.append(recommend(sweep.model_copy(update={"trials": tuple(trials)})))
    assert sum(answer.label == "rank=8" for answer in found) >= 45
    assert any("scatter ten times" in line for line in found[0].evidence)


def test_no_configuration_scatters_far_more_where_all_have_the_same_noise() -> None:
    scattered = 0
    for seed in range(200):
        values = {s.label: s.objective_by_repeat for s in statistics.summaries(simulated([2.0] * 6, 3, seed))}
        scattered += bool(statistics.scattered(values))
    assert scattered == 0


def test_single_runs_take_the_best_and_say_that_noise_is_unknown() -> None:
    answer = recommend(simulated([2.01, 2.0], 1, 0, noise_sd=0.0))
    assert (answer.basis, answer.label, answer.repeats_needed) == ("single_runs", "rank=8", 3)
    assert "one run each cannot tell" in answer.answer
    assert any("rank=4 is within 0.01 of it" in line for line in answer.evidence)


@pytest.mark.parametrize("waits", [TrialStatus.PENDING, TrialStatus.RUNNING, TrialStatus.CANCELLED])
def test_repeats_that_are_asked_for_and_have_not_run_are_to_come_and_not_advised(waits: TrialStatus) -> None:
    sweep = simulated([2.01, 2.0], 2, 0, noise_sd=0.0, status_of=lambda _, r: waits if r else TrialStatus.COMPLETED)
    answer = recommend(sweep)
    assert answer.answer.endswith("from noise; the repeats that are still to come (of 2) begin to.")
    assert answer.repeats_needed == 2
    # They were asked for before, and are not now: nothing is to come.
    left = [trial.model_copy(update={"asked_for": not trial.repeat}) for trial in sweep.trials]
    answer = recommend(sweep.model_copy(update={"trials": tuple(left)}))
    assert answer.answer.endswith("3 repeats (search.repeats: 3) would begin to.")


def test_two_configurations_that_come_to_the_same_are_both() -> None:
    trials = [made_up_trial({"zero_stage": s}, objective=2.0, memory_bytes=m) for s, m in ((0, 2000), (2, 1000))]
    assert "both configurations come to the same eval_loss" in recommend(made_up_sweep(trials)).answer


def test_a_population_is_to_be_run_again_where_repeats_would_be_refused() -> None:
    trials = [
        made_up_trial({"learning_rate": rate}, objective=loss).model_copy(
            update={"suggestion": Suggestion(number=place, settings={}, generation=4, member=place)}
        )
        for place, (rate, loss) in enumerate(((1e-3, 2.0), (8e-4, 2.2)))
    ]
    answer = recommend(made_up_sweep(trials, searched=("learning_rate",)))
    assert "populations of another search.seed, each under a --name of its own, would begin to." in answer.answer
    assert "search.repeats" not in answer.answer
    assert answer.repeats_needed is None


def test_the_answer_and_its_evidence_tell_no_difference_in_cost_that_may_be_noise() -> None:
    def evidence(*time_s: float) -> str:
        trials = [
            made_up_trial({"rank": 8 * (1 + place % 2)}, place // 2, step_time_s=seconds, memory_bytes=1000 + place % 2)
            for place, seconds in enumerate(time_s)
        ]
        answer = recommend(made_up_sweep(trials))
        return " ".join([answer.answer, *answer.evidence])

    rule = "Less than 10 % in speed is told as no clear difference"
    assert "slower" not in evidence(1.0, 1.09)
    assert "rank=16 is 1.2× slower" in evidence(1.0, 1.2)
    assert all(rule in evidence(1.0, time_s) for time_s in (1.09, 1.2))
    # The faster one is taken, since memory is alike.
    assert "is 1.09× faster" in evidence(1.09, 1.0, 1.19, 1.091, 1.0, 0.92)
    assert "with no clear difference in memory or speed" in evidence(1.5, 1.0, 1.0, 1.2, 1.2, 1.0)
    assert rule not in evidence(1.09, 1.0, 1.19, 1.091, 1.0, 0.92)


def test_one_run_is_no_cheaper_choice_for_what_may_be_noise() -> None:
    trials = [
        made_up_trial({"rank": rank}, objective=value, step_time_s=time_s)
        for rank, value, time_s in ((8, 2.0, 1.0), (16, 2.01, 0.95), (32, 2.01, 0.8))
    ]
    answer = recommend(made_up_sweep(trials))
    assert not any("rank=16 is within" in line for line in answer.evidence)
    assert "rank=32 is within 0.01 of it, less than 1 %, and is 1.2× faster." in answer.evidence


def test_three_repeats_of_a_thousand_configurations_are_compared_in_a_second() -> None:
    settings = [{"rank": 1 + i % 250, "weight_decay": i // 250 / 10} for i in range(1000)]
    sweep = simulated([2 + i % 97 / 97 for i in range(1000)], 3, 0, configurations=settings)
    recommend(simulated([2.0, 2.1], 2, 0))
    started = time.process_time()
    recommend(sweep)
    assert time.process_time() - started < 1.5


def test_where_noise_hides_what_matters_it_says_so_and_how_many_repeats_would_do() -> None:
    answer = recommend(simulated([2.1, 2.0, 2.05], 2, 5, noise_sd=0.1))
    assert answer.basis == "within_noise"
    assert not answer.is_decided
    assert answer.answer.startswith("Take rank=4 for now: ")
    assert answer.repeats_needed is not None
    assert answer.repeats_needed > 2
    assert any("cannot decide" in line for line in answer.evidence)


def test_the_power_estimate_keeps_its_word() -> None:
    noise = statistics.Noise(0.02, 10)
    needed = statistics.repeats_to_tell(0.05, noise, 2)
    assert needed is not None
    found = 0
    for seed in range(400):
        sweep = simulated([2.05, 2.0], needed, seed, noise_sd=noise.sd)
        found += recommend(sweep).label == "rank=8"
    assert 0.76 <= found / 400 <= 0.95


@pytest.mark.parametrize("status", [status for status in TrialStatus if status is not TrialStatus.COMPLETED])
def test_only_completed_trials_compete(status: TrialStatus) -> None:
    trials = [
        made_up_trial({"rank": 8}, objective=2.5),
        made_up_trial({"rank": 16}, objective=1.0, status=status),
    ]
    answer = recommend(made_up_sweep(trials))
    assert answer.label == "rank=8"
    assert trial_to_take(made_up_sweep(trials)) == trials[0]
    if status in REASONS:
        assert any("Not in the comparison: 1 " in line for line in answer.evidence)
    else:
        assert any("have not ended yet" in line for line in answer.evidence)


@pytest.mark.parametrize("status", [TrialStatus.DIVERGED, TrialStatus.OUT_OF_MEMORY])
def test_a_configuration_that_broke_in_one_repeat_is_not_recommended(status: TrialStatus) -> None:
    sweep = simulated(
        [2.0, 2.0, 2.0],
        3,
        0,
        status_of=lambda place, repeat: status if (place, repeat) == (0, 2) else TrialStatus.COMPLETED,
    )
    answer = recommend(sweep)
    assert answer.label == "rank=8"
    assert any(line.startswith("Left out") and "rank=4" in line for line in answer.evidence)


def test_without_a_completed_trial_the_best_so_far_is_named_as_such() -> None:
    sweep = simulated([2.0, 1.9], 1, 0, noise_sd=0.0, seed_sd=0.0, status_of=lambda *_: TrialStatus.STOPPED)
    answer = recommend(sweep)
    assert (answer.basis, answer.label) == ("provisional", "rank=8")
    assert answer.answer.startswith("No trial has completed.")


@pytest.mark.parametrize("trials", [[], [made_up_trial({"rank": 8}, status=TrialStatus.PENDING)]])
def test_a_sweep_without_any_figure_has_no_answer(trials: list[statistics.TrialResult]) -> None:
    answer = recommend(made_up_sweep(trials))
    assert (answer.basis, answer.label) == ("nothing", None)


def test_one_completed_trial_of_a_sweep_that_was_interrupted_is_no_answer_yet() -> None:
    waiting = [made_up_trial({"rank": rank}, status=TrialStatus.CANCELLED, objective=None) for rank in (16, 32)]
    early = recommend(made_up_sweep([made_up_trial({"rank": 8}), *waiting]))
    assert early.answer == "Too early to tell: rank=8 alone has completed, and 2 of 3 trials have not ended."
    assert (early.basis, early.label, early.is_recommended) == ("too_early", "rank=8", False)


def test_one_completed_trial_of_a_search_that_its_budget_ended_is_no_answer_yet() -> None:
    early = recommend(made_up_sweep([made_up_trial({"rank": 8})], cut_short="budget.hours is used up"))
    told = "rank=8 alone has completed, and the budget ended the sweep before others were tried"
    assert (early.basis, early.answer) == ("too_early", f"Too early to tell: {told}.")


@pytest.mark.parametrize("left", [{"ended_ms": None}, {"interrupted": True}, {"cut_short": "budget.hours is used up"}])
def test_an_answer_that_more_trials_may_change_is_for_now_and_decides_nothing(left: dict[str, Any]) -> None:
    sweep = simulated([2.0, 2.3], 3, 2)
    assert (recommend(sweep).is_decided, recommend(sweep).answer.startswith("Take rank=4: ")) == (True, True)
    answer = recommend(sweep.model_copy(update=left))
    assert (answer.is_decided, answer.answer.startswith("Take rank=4 for now: ")) == (False, True)


def test_the_trial_to_take_is_the_recommended_one_and_not_one_that_is_better_by_its_last_bits() -> None:
    heavy = made_up_trial({"zero_stage": 2}, objective=3.0 - 1e-7, memory_bytes=2 * 2**30)
    light = made_up_trial({"zero_stage": 0}, objective=3.0, memory_bytes=2**30)
    sweep = made_up_sweep([heavy, light])
    assert recommend(sweep).trial_id == light.trial_id
    assert trial_to_take(sweep) == light


def test_an_objective_to_be_maximised_is() -> None:
    trials = [made_up_trial({"rank": rank}, repeat, step_time_s=time_s + repeat / 1000, memory_bytes=2**30)
              for rank, time_s in ((8, 0.5), (16, 0.4)) for repeat in range(3)]  # fmt: skip
    sweep = made_up_sweep(trials, objective_metric="tokens_per_s", objective_mode="max")
    assert recommend(sweep).label == "rank=16"
    assert recommend(sweep).comparisons[0].difference is not None
    assert recommend(sweep).comparisons[0].difference.mean > 0


def test_memory_within_two_percent_is_the_same_and_the_faster_one_is_taken() -> None:
    trials = [
        made_up_trial({"rank": rank}, repeat, memory_bytes=memory, step_time_s=time_s, objective=2 + repeat / 100)
        for rank, memory, time_s in ((8, 1000, 0.5), (16, 1010, 0.4), (32, 1300, 0.1))
        for repeat in range(3)
    ]
    assert recommend(made_up_sweep(trials)).label == "rank=16"


def test_tokens_a_second_decide_what_is_fast_whatever_a_step_takes() -> None:
    trials = [
        made_up_trial({"rank": rank}, repeat, objective=2 + repeat / 100, step_time_s=median_s).model_copy(
            update={"tokens_per_s": tokens_per_s}
        )
        # Some steps of the second took far longer than its median.
        for rank, median_s, tokens_per_s in ((8, 1.0, 1000.0), (16, 0.5, 500.0))
        for repeat in range(3)
    ]
    sweep = made_up_sweep(trials)
    answer = recommend(sweep)
    assert answer.label == "rank=8"
    assert answer.comparisons[0].speedup == 0.5
    found = statistics.summaries(sweep)
    assert [s.label for s in found if s.configuration_id in front_of(sweep, found).configuration_ids] == ["rank=8"]


@pytest.mark.parametrize(
    ("time_s", "words"),
    [
        (1.08, "within 2 % of the least memory, where no other is clearly faster"),
        (1.2, "where it is the fastest, by one"),
    ],
)
def test_what_is_told_to_be_the_fastest_is_so_by_a_clear_difference(time_s: float, words: str) -> None:
    trials = [
        made_up_trial({"zero_stage": stage}, objective=2.0, memory_bytes=memory, step_time_s=seconds)
        # The last one takes no part in it: it has not the least memory.
        for stage, memory, seconds in ((1, 1000, time_s), (2, 1010, 1.0), (3, 2000, 1.0))
    ]
    found = recommend(made_up_sweep(trials, searched=("zero_stage",)))
    assert found.label == "zero_stage=2"
    assert words in found.answer


def test_different_devices_are_told() -> None:
    trials = [made_up_trial({"rank": 8}), made_up_trial({"rank": 16}).model_copy(update={"devices": ("NVIDIA H100",)})]
    assert any("NVIDIA A10G, NVIDIA H100" in line for line in recommend(made_up_sweep(trials)).evidence)


@pytest.mark.parametrize("repeats", [1, 3])
def test_objectives_that_differ_in_their_last_bits_are_the_same(repeats: int) -> None:
    trials = [
        made_up_trial({"zero_stage": stage}, r, objective=2.5 + r / 10 + 1e-9 * stage, memory_bytes=(4 - stage) * 2**30)
        for stage in (0, 1, 2, 3)
        for r in range(repeats)
    ]
    assert recommend(made_up_sweep(trials, searched=("zero_stage",))).label == "zero_stage=3"


def test_the_pareto_front_holds_what_nothing_beats() -> None:
    trials = [
        made_up_trial({"rank": rank}, objective=value, memory_bytes=memory, step_time_s=time_s)
        for rank, value, memory, time_s in (
            (8, 2.0, 100, 0.5),
            (16, 1.9, 200, 0.5),
            (32, 2.1, 200, 0.6),
            (64, 2.2, 300, 0.1),
        )
    ]
    found = statistics.summaries(made_up_sweep(trials))
    front = statistics.pareto_front(found, 1)
    assert {s.label for s in found if s.configuration_id in front} == {"rank=8", "rank=16", "rank=64"}


def test_effects_compare_trials_that_differ_in_nothing_else() -> None:
    settings = [{"rank": rank, "precision": p} for rank in (8, 16) for p in ("bf16", "nf4")]
    sweep = simulated([2.0, 2.3, 1.9, 2.2], 3, 0, noise_sd=0.001, configurations=settings)
    by_name = {effect.setting: effect for effect in main_effects(sweep)}
    rank, precision = by_name["rank"], by_name["precision"]
    assert [value.value for value in rank.values] == ["8", "16"]
    assert rank.values[1].difference is not None
    assert rank.values[1].difference.mean == pytest.approx(-0.1, abs=0.005)
    assert precision.values[1].difference is not None
    assert precision.values[1].difference.mean == pytest.approx(0.3, abs=0.005)
    assert precision.values[1].difference.count == 3
    assert rank.values[0].gain is None
    assert rank.values[1].gain == rank.values[1].difference


@pytest.mark.parametrize("speed", [float("inf"), float("nan")])
def test_a_speed_that_is_no_number_takes_no_part_in_effects(speed: float) -> None:
    sweep = simulated([2.0, 2.3], 3, 0)
    broken = [trial.model_copy(update={"tokens_per_s": speed, "step_time_s": speed}) for trial in sweep.trials]
    (effect,) = main_effects(sweep.model_copy(update={"trials": (*broken[:2], *sweep.trials[2:])}))
    assert effect.values[1].speed_ratio is not None
    (effect,) = main_effects(sweep.model_copy(update={"trials": tuple(broken)}))
    assert effect.values[1].speed_ratio is None


def test_intervals_of_effects_cover_the_truth_in_95_percent_of_sweeps() -> None:
    settings = [{"rank": rank, "precision": p} for rank in (8, 16) for p in ("bf16", "nf4")]
    covers = 0
    for seed in range(SWEEPS):
        sweep = simulated([2.0, 2.3, 1.9, 2.2], 4, seed, configurations=settings)
        difference = main_effects(sweep)[0].values[1].difference
        assert difference is not None
        assert difference.half_width is not None
        covers += abs(difference.mean + 0.1) <= difference.half_width
    assert 930 <= covers <= 970


def test_trials_that_repeat_each_other_to_the_bit_make_an_effect_no_surer() -> None:
    settings = [{"rank": rank, "zero_stage": stage} for rank in (8, 16) for stage in (0, 1, 2)]
    truth = [2.0, 2.0, 2.0, 1.9, 1.9, 1.9]
    alone = made_up_sweep(
        [made_up_trial(s, objective=v) for s, v in zip(settings, truth, strict=True)], ("rank", "zero_stage")
    )
    difference = main_effects(alone)[0].values[1].difference
    assert difference is not None
    assert (difference.count, difference.half_width) == (1, None)


def test_stopped_trials_count_in_memory_and_speed_and_not_in_the_objective() -> None:
    trials = [
        made_up_trial({"precision": precision}, repeat, status, memory_bytes=memory, step_time_s=time_s)
        for precision, status, memory, time_s in (
            ("bf16", TrialStatus.COMPLETED, 1000, 0.5),
            ("nf4", TrialStatus.STOPPED, 400, 1.0),
        )
        for repeat in range(2)
    ]
    (effect,) = main_effects(made_up_sweep(trials, searched=("precision",)))
    nf4 = effect.values[1]
    assert nf4.objective is None
    assert nf4.difference is None
    assert nf4.memory_ratio is not None
    assert nf4.speed_ratio is not None
    assert (nf4.memory_ratio.mean, nf4.speed_ratio.mean) == (0.4, 0.5)


def test_where_one_setting_was_searched_a_difference_has_one_interval_wherever_it_is_told() -> None:
    sweep = simulated([2.6, 2.2, 2.0], 2, 1, noise_sd=0.02)
    (rank,) = main_effects(sweep)
    behind = {comparison.label: comparison.difference for comparison in recommend(sweep).comparisons}
    last = rank.values[-1].gain
    assert last is not None
    assert rank.levelling is not None
    before = behind["rank=8"]
    assert before is not None
    for told in (last, rank.levelling.gain):
        assert (abs(told.mean), told.half_width) == (pytest.approx(before.mean), pytest.approx(before.half_width))
    assert rank.levelling.state == "still_gains"
    first = rank.values[-1].difference
    assert first is not None
    assert first.half_width == pytest.approx(behind["rank=4"].half_width if behind["rank=4"] else None)


def test_a_value_that_the_answer_does_not_compare_has_the_interval_of_its_own_pairs() -> None:
    sweep = simulated([2.6, 2.2, 2.0], 3, 1)
    sweep = sweep.model_copy(update={"constraints": ("peak_memory_bytes <= 1400MiB",)})
    assert [summary.label for summary in statistics.summaries(sweep) if summary.breaks] == ["rank=16"]
    (rank,) = main_effects(sweep)
    values = {s.label: s.objective_by_repeat for s in statistics.summaries(sweep)}
    own = statistics.estimate([values["rank=16"][repeat] - values["rank=8"][repeat] for repeat in range(3)])
    assert rank.values[2].gain == own


@pytest.mark.parametrize(
    ("truth", "noise_sd", "state", "value", "further"),
    [
        ([2.2, 2.0, 1.999, 1.998], 0.001, "levelled_off", "8", "32"),
        ([2.4, 2.2, 2.1, 2.0], 0.001, "still_gains", "16", "32"),
        ([2.2, 2.0, 1.99, 1.99], 0.1, "undecided", "16", "32"),
    ],
)
def test_it_is_told_whether_a_higher_rank_still_gains(
    truth: list[float], noise_sd: float, state: str, value: str, further: str
) -> None:
    levelling = main_effects(simulated(truth, 4, 3, noise_sd=noise_sd))[0].levelling
    assert levelling is not None
    assert (levelling.state, levelling.value) == (state, value)
    if state != "undecided":
        assert levelling.further == further


def of_two_lengths(metric: str) -> SweepResult:
    sweep = simulated([2.3, 2.0], 4, 3, configurations=[{"sequence_length": 512}, {"sequence_length": 1024}])
    trials = [t.model_copy(update={"scores": {"arc_easy/acc": t.best.eval_loss}}) for t in sweep.trials if t.best]
    return sweep.model_copy(update={"objective_metric": metric, "trials": tuple(trials)})


def test_losses_of_different_sequence_lengths_are_said_to_stand_on_different_tokens() -> None:
    told = "sequence_length (512, 1024), those that it is evaluated on too: where they are longer than 512 tokens, "
    evidence = recommend(of_two_lengths("eval_loss")).evidence
    assert any(f"{told}values of eval_loss at different lengths" in line for line in evidence)
    assert not any("different tokens" in line for line in recommend(of_two_lengths("arc_easy/acc")).evidence)
    assert not any("different tokens" in line for line in recommend(simulated([2.3, 2.0], 4, 3)).evidence)


def test_a_loss_is_not_said_to_level_off_or_to_gain_along_the_sequence_length() -> None:
    assert main_effects(of_two_lengths("eval_loss"))[0].levelling is None
    assert main_effects(of_two_lengths("arc_easy/acc"))[0].levelling is not None


def test_the_setting_that_moves_the_objective_is_the_important_one() -> None:
    pytest.importorskip("optuna")
    settings = [{"rank": rank, "learning_rate": i * 1e-5} for i in range(1, 13) for rank in (8, 16)]
    sweep = simulated([2.0 + (s["rank"] == 8) for s in settings], 1, 0, noise_sd=0.05, configurations=settings)
    found = importances(sweep)
    assert list(found) == ["rank", "learning_rate"]
    assert found["rank"] > 0.9
    assert sum(found.values()) == pytest.approx(1)


def test_one_setting_or_few_trials_have_no_importance() -> None:
    assert importances(simulated([2.0, 2.1], 8, 0)) == {}
    settings = [{"rank": rank, "zero_stage": stage} for rank in (8, 16) for stage in (0, 1)]
    assert importances(simulated([2.0, 2.1, 2.2, 2.3], 1, 0, configurations=settings)) == {}


def test_repeats_of_few_configurations_tell_no_importance() -> None:
    settings = [{"rank": rank, "learning_rate": rate} for rank in (8, 256) for rate in (1e-4, 1e-3)]
    assert importances(simulated([2.0, 2.1, 2.2, 2.3], 4, 0, configurations=settings)) == {}


def test_settings_that_always_changed_together_have_one_share() -> None:
    pytest.importorskip("optuna")
    rates = {8: 1e-3, 16: 5e-4, 32: 2e-4, 64: 1e-4}
    settings = [
        {"rank": rank, "weight_decay": decay, "learning_rate": rate}
        for rank, rate in rates.items()
        for decay in (0.0, 0.1)
    ]
    truth = [2.0 + (s["rank"] == 8) for s in settings]
    found = importances(sweep := simulated(truth, 1, 0, noise_sd=0.01, configurations=settings))
    assert list(found) == ["rank and learning_rate", "weight_decay"]
    figure = effect_charts.importance_chart("eval_loss", found)
    assert figure
    assert "Settings that always changed together have one share" in figure.caption
    both = [trial.model_copy(update={"config": trial.config.model_copy(update={"weight_decay": 0.0})})
            for trial in sweep.trials]  # fmt: skip
    assert importances(sweep.model_copy(update={"trials": tuple(both)})) == {}


def test_two_ranges_are_told_apart_though_each_value_was_drawn_once_unless_one_gives_the_other() -> None:
    pytest.importorskip("optuna")
    drawn = random.Random(0)
    rates = [drawn.uniform(1e-4, 1e-3) for _ in range(12)]
    apart = [{"learning_rate": rate, "weight_decay": drawn.random()} for rate in rates]
    coupled = [{"learning_rate": rate, "weight_decay": 1 - 100 * rate} for rate in rates]
    truth = [2.0 + 100 * rate for rate in rates]
    assert len(importances(simulated(truth, 1, 0, configurations=apart))) == 2
    assert importances(simulated(truth, 1, 0, configurations=coupled)) == {}


def test_a_sampled_range_is_put_into_quarters() -> None:
    trials = [made_up_trial({"learning_rate": i * 1e-5}, objective=2.0 + i / 100) for i in range(1, 41)]
    (effect,) = main_effects(made_up_sweep(trials, searched=("learning_rate",)))
    assert [value.objective.count for value in effect.values if value.objective] == [10, 10, 10, 10]
    assert [value.value for value in effect.values] == [
        "1e-05 to 0.0001",
        "0.00011 to 0.0002",
        "0.00021 to 0.0003",
        "0.00031 to 0.0004",
    ]


def test_the_label_names_only_what_was_searched() -> None:
    trial = made_up_trial({"rank": 8, "precision": "nf4", "target_modules": ("q_proj", "v_proj")})
    assert statistics.label(trial, ("rank", "precision")) == "rank=8 precision=nf4"
    assert statistics.label(trial, ("target_modules",)) == "target_modules=q_proj+v_proj"
    assert statistics.label(trial, ()) == "the only configuration"


def test_ways_to_compute_the_same_are_told_apart_by_their_costs_with_no_repeat() -> None:
    trials = [
        made_up_trial(
            {"engine": engine, "zero_stage": stage}, objective=2.0 - stage * 1e-9, memory_bytes=memory, step_time_s=s
        )
        for engine, stage, memory, s in (
            ("ddp", 0, 2000, 1.0),
            ("deepspeed", 1, 1000, 1.05),
            ("deepspeed", 2, 1010, 1.0),
            ("deepspeed", 3, 1500, 2.0),
        )
    ]
    sweep = made_up_sweep(trials, searched=("engine", "zero_stage"))
    found = recommend(sweep)
    assert found.is_decided
    assert found.label == "engine=deepspeed zero_stage=2"
    assert "all 4 configurations come to the same eval_loss (2.000)" in found.answer
    assert "within 2 % of the least memory" in found.answer
    assert "engine=ddp zero_stage=0 takes 98 % more memory." in found.evidence
    assert "engine=deepspeed zero_stage=3 takes 49 % more memory and is 2× slower." in found.evidence
    # Stage 0 goes with another engine alone: the first stage that has a pair is the one to compare with.
    (stages,) = (effect for effect in main_effects(sweep) if effect.setting == "zero_stage")
    assert stages.reference == "1"
    assert [value.memory_ratio and value.memory_ratio.mean for value in stages.values] == [None, None, 1.01, 1.5]
    # More memory and less speed for a better last bit is no trade.
    front = statistics.pareto_front(statistics.summaries(sweep), 1)
    assert {s.label for s in statistics.summaries(sweep) if s.configuration_id in front} == {
        "engine=deepspeed zero_stage=1",
        "engine=deepspeed zero_stage=2",
    }
    found_front = front_of(sweep, statistics.summaries(sweep))
    assert found_front.configuration_ids == front
    assert cost_charts.pareto_charts(sweep, statistics.summaries(sweep), found_front, None) == ()
    assert effect_charts.effect_charts("eval_loss", main_effects(sweep)) == ()
