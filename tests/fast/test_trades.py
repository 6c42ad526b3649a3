"""What a way of computing the same costs and saves, in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from orchestrator.reporting import findings, report
from orchestrator.reporting.effects import Levelling, main_effects
from orchestrator.reporting.statistics import Estimate
from orchestrator.reporting.trades import trades
from orchestrator.results.records import SweepResult
from tests.made_up_sweep import made_up_sweep, made_up_trial, write_made_up


def told(sweep: SweepResult) -> list[str]:
    return list(trades(sweep, main_effects(sweep)))


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


def test_a_higher_value_that_is_worse_is_said_to_be_worse() -> None:
    words = findings.levelling_words("rank", Levelling("levelled_off", "128", "256", Estimate(-0.049, 0.035, 3)))
    assert words == "rank levels off at 128: 256 is worse by 0.049 ± 0.035 than 128, all else alike."
    words = findings.levelling_words("rank", Levelling("levelled_off", "64", "128", Estimate(0.001, 0.004, 3)))
    assert words == "rank levels off at 64: 128 gains 0.0010 ± 0.0040 over 64, all else alike, and 1 % at most."
