"""What a way of computing the same costs and saves, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import pytest

from orchestrator.reporting import findings, report
from orchestrator.reporting.curves import Curve
from orchestrator.reporting.effects import Levelling, main_effects
from orchestrator.reporting.recommendation import recommend
from orchestrator.reporting.statistics import Estimate
from orchestrator.reporting.trades import trades
from orchestrator.results.records import PeakMemory, SweepResult, TrialStatus
from tests.made_up_sweep import made_up_point, made_up_sweep, made_up_trial, write_made_up


def told(sweep: SweepResult, curves: Mapping[str, Curve] = MappingProxyType({})) -> list[str]:
    return list(trades(sweep, main_effects(sweep), curves))


def of_attention(**fields: Any) -> SweepResult:
    """sdpa saves more the longer the sequence is."""
    costs = {
        ("eager", 512): (1000, 1.0),
        ("sdpa", 512): (900, 1.0),
        ("eager", 2048): (4000, 8.0),
        ("sdpa", 2048): (2000, 4.0),
    }
    trials = [
        made_up_trial(
            {"attention": kernel, "sequence_length": length},
            repeat,
            # Kernels differ in the last bits.
            objective=2.5 + (1e-6 if kernel == "sdpa" else 0.0),
            memory_bytes=memory,
            step_time_s=time_s,
        )
        for (kernel, length), (memory, time_s) in costs.items()
        for repeat in range(2)
    ]
    return made_up_sweep(trials, searched=("attention", "sequence_length"), **fields)


def test_a_kernel_is_compared_over_all_lengths_and_at_the_longest() -> None:
    assert told(of_attention()) == [
        "attention=sdpa against eager, all else alike: the same eval_loss, 30 % less memory, 1.50× faster; "
        "at sequence_length=2048: the same eval_loss, 50 % less memory, 2.00× faster."
    ]


def test_where_speed_is_the_objective_it_is_told_once_and_nothing_is_said_to_level_off(tmp_path: Path) -> None:
    sweep = of_attention(objective_metric="tokens_per_s", objective_mode="max")
    assert "30 % less memory, 1.50× faster;" in told(sweep)[0]
    made = findings.build(write_made_up(tmp_path / "sweep", sweep))
    assert not any("level" in line for line in made.recommendation.evidence)
    (line,) = [line for line in made.recommendation.evidence if line.startswith("attention=sdpa")]
    assert line.count("the same eval_loss at the last evaluation that both reached, ") == 2
    page = report.render_html(made)
    assert "tokens_per_s against memory" in page
    assert "tokens_per_s against speed" not in page


def test_precisions_are_compared_with_the_first_of_the_file_and_cost_quality() -> None:
    trials = [
        made_up_trial({"precision": precision}, repeat, objective=2.0 + worse + repeat / 10, memory_bytes=memory)
        for precision, worse, memory in (("fp32", 0.0, 1000), ("bf16", 0.01, 505), ("nf4", 0.2, 300))
        for repeat in range(3)
    ]
    lines = told(made_up_sweep(trials, searched=("precision",)))
    assert [line.partition(",")[0] for line in lines] == ["precision=bf16 against fp32", "precision=nf4 against fp32"]
    assert "eval_loss +0.2" in lines[1]
    assert lines[1].endswith("70 % less memory, as fast.")


def test_what_has_no_other_trial_to_be_compared_with_is_not_told() -> None:
    trials = [
        made_up_trial({"precision": "fp32", "learning_rate": 1e-4}),
        made_up_trial({"precision": "nf4", "learning_rate": 2e-4}),
    ]
    assert told(made_up_sweep(trials, searched=("precision", "learning_rate"))) == []


def of_stages(memory: Sequence[int], time_s: Sequence[float], kind: Literal["cuda_allocated", "resident"]) -> str:
    """What is told of stage 2 against 1, with these measurements of each, in the order of their repeats by turns."""
    trials = [
        made_up_trial({"zero_stage": 1 + place % 2}, place // 2, step_time_s=seconds).model_copy(
            update={"peak_memory": PeakMemory(measured_bytes=size, kind=kind)}
        )
        for place, (size, seconds) in enumerate(zip(memory, time_s, strict=True))
    ]
    (line,) = told(made_up_sweep(trials, searched=("zero_stage",)))
    return line.removeprefix("zero_stage=2 against 1, all else alike")


@pytest.mark.parametrize(
    ("memory", "time_s", "kind", "words"),
    [
        ((1000, 1030), (1.0, 1.02), "cuda_allocated", "3 % more memory, no clear difference in speed"),
        ((1000, 1030), (1.0, 1.02), "resident", "no clear difference in memory or speed"),
        ((1000, 1001), (1.0, 1.0), "cuda_allocated", "as much memory, no clear difference in speed"),
        ((1000, 900), (1.0, 1.2), "resident", "10 % less memory, 1.20× slower"),
    ],
)
def test_of_one_run_each_what_repeats_may_be_apart_is_no_clear_difference(
    memory: Sequence[int], time_s: Sequence[float], kind: Literal["cuda_allocated", "resident"], words: str
) -> None:
    assert of_stages(memory, time_s, kind) == f", one run each: the same eval_loss, {words}."


@pytest.mark.parametrize(
    ("time_s", "words"),
    [
        ((1.0, 1.02, 1.1, 1.122, 0.9, 0.918), "1.02× slower"),
        ((1.0, 1.4, 1.4, 1.0, 0.8, 1.4), "no clear difference in speed"),
        ((1.0, 1.0, 1.1, 1.1, 0.9, 0.9), "as fast"),
    ],
)
def test_of_repeats_their_interval_says_whether_speeds_differ(time_s: Sequence[float], words: str) -> None:
    told = of_stages([1000] * 6, time_s, "resident")
    assert told == f": the same eval_loss, as much memory, {words}."


def test_what_was_stopped_for_its_loss_is_told_with_that_loss_where_both_were_measured(tmp_path: Path) -> None:
    trials = [
        made_up_trial({"precision": "fp32", "rank": 8}, objective=3.0, memory_bytes=1000),
        made_up_trial({"precision": "nf4", "rank": 8}, 0, TrialStatus.STOPPED, 3.7, memory_bytes=800),
        # Of another rank, and hence of no pair.
        made_up_trial({"precision": "nf4", "rank": 16}, 0, TrialStatus.STOPPED, 9.0, memory_bytes=800),
    ]
    sweep = made_up_sweep(trials, searched=("precision", "rank"))
    folder = write_made_up(tmp_path / "sweep", sweep)
    for trial, losses in zip(trials, ((3.5, 3.2, 3.0), (3.7,), (9.0,)), strict=True):
        points = [made_up_point(5 * (i + 1), loss).model_dump_json() for i, loss in enumerate(losses)]
        folder.trial(trial.trial_id).metrics.write_text("\n".join(points) + "\n", encoding="utf-8")
    assert (
        "precision=nf4 against fp32, all else alike, one run each: eval_loss +0.2000 at the last evaluation that both "
        "reached, 20 % less memory, no clear difference in speed."
    ) in findings.build(folder).recommendation.evidence


def test_a_higher_value_that_is_worse_is_said_to_be_worse() -> None:
    words = findings.levelling_words("rank", Levelling("levelled_off", "128", "256", Estimate(-0.049, 0.035, 3)))
    assert words == "rank levels off at 128: 256 is worse by 0.049 ± 0.035 than 128, all else alike."
    words = findings.levelling_words("rank", Levelling("levelled_off", "64", "128", Estimate(0.001, 0.004, 3)))
    assert words == "rank levels off at 64: 128 gains 0.0010 ± 0.0040 over 64, all else alike, and 1 % at most."
    words = findings.levelling_words("rank", Levelling("levelled_off", "128", "256", Estimate(-0.011, 0.067, 3)))
    assert words == "rank levels off at 128: 256 gains −0.011 ± 0.067 over 128, all else alike."


def test_memory_and_speed_are_compared_at_one_micro_batch_and_the_loss_at_any() -> None:
    measured = {
        ("fp32", 4): (1, 1000, 4.0),
        ("nf4", 4): (4, 1070, 1.0),
        ("fp32", 64): (4, 1000, 1.0),
        ("nf4", 64): (4, 800, 1.3),
    }
    trials = [
        made_up_trial(
            {"precision": precision, "rank": rank, "micro_batch_size": size}, memory_bytes=memory, step_time_s=s
        )
        for (precision, rank), (size, memory, s) in measured.items()
    ]
    sweep = made_up_sweep(trials, searched=("precision", "rank"))
    (line,) = told(sweep)
    assert line.endswith("the same eval_loss, 20 % less memory, 1.30× slower.")
    (precision, _) = main_effects(sweep)
    assert precision.values[1].difference is not None
    assert any("several micro_batch_size (1, 4), each chosen to fit" in line for line in recommend(sweep).evidence)


def test_a_micro_batch_that_was_searched_is_compared_with_another() -> None:
    trials = [made_up_trial({"micro_batch_size": size}, step_time_s=1 / size) for size in (1, 4)]
    sweep = made_up_sweep(trials, searched=("micro_batch_size",))
    (effect,) = main_effects(sweep)
    assert effect.values[1].speed_ratio == Estimate(4.0, None, 1)
    assert not any("chosen to fit" in line for line in recommend(sweep).evidence)
