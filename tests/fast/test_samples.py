"""What trained models wrote, in the report."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.config.sweep_config import DataConfig, EvaluateConfig, SweepConfig
from orchestrator.errors import InputError
from orchestrator.reporting import report
from orchestrator.reporting.recommendation import recommend, trial_to_take
from orchestrator.reporting.samples import samples_of
from orchestrator.results.evaluation import Evaluation, Sample, evaluation_of, read_evaluation, write_evaluation
from orchestrator.results.records import TrialStatus
from orchestrator.results.storage import results_table
from orchestrator.sweep.evaluation import scored, wanted
from orchestrator.training import evaluation
from tests.made_up_sweep import made_up_sweep, made_up_trial, write_made_up

ASKED = EvaluateConfig(prompts=("What is <b>?",), tasks=("tiny",))


def test_the_report_shows_answers_side_by_side_and_scores(tmp_path: Path) -> None:
    trials = [made_up_trial({"rank": rank}, objective=2.0 + rank / 100) for rank in (8, 16, 32)]
    folder = write_made_up(tmp_path / "sweep", made_up_sweep(trials))
    assert 'id="samples"' not in report.render_html(report.build(folder))
    for trial, answer in zip(trials[:2], ("A tag.", "<i>bold</i>"), strict=True):
        samples = (Sample(prompt="What is <b>?", completion=answer),)
        found = Evaluation(asked=ASKED, samples=samples, scores={"tiny/acc": 0.25}, seconds=1.0)
        write_evaluation(folder.trial(trial.trial_id), found)
    page = report.render_html(report.build(folder))
    assert 'id="samples"' in page
    assert "What is &lt;b&gt;?" in page
    assert "<dt>rank=8</dt>" in page
    assert "&lt;i&gt;bold&lt;/i&gt;" in page
    assert "<dt>rank=32</dt>" not in page
    assert "tiny/acc" in page


def test_a_damaged_evaluation_is_none(tmp_path: Path) -> None:
    trial = made_up_trial({"rank": 8})
    folder = write_made_up(tmp_path / "sweep", made_up_sweep([trial]))
    where = folder.trial(trial.trial_id)
    assert read_evaluation(where) is None
    where.evaluation.write_text('{"schema_version": 1')
    assert read_evaluation(where) is None
    assert "samples" not in report.render_html(report.build(folder)).partition("</header>")[2]


def test_an_evaluation_of_an_adapter_that_another_has_taken_the_place_of_counts_for_nothing(tmp_path: Path) -> None:
    early = made_up_trial({"rank": 8}, steps=20)
    late = made_up_trial({"rank": 8}, steps=100)
    sweep = made_up_sweep([late])
    folder = write_made_up(tmp_path / "sweep", sweep)
    assert early.best
    found = Evaluation(asked=ASKED, scores={"tiny/acc": 0.25}, seconds=1.0, best_ms=early.best.time_ms)
    write_evaluation(folder.trial(late.trial_id), found)
    assert evaluation_of(early, folder) == found
    assert evaluation_of(late, folder) is None
    assert list(scored(sweep, folder)) == []
    assert samples_of(sweep, folder) is None
    # An older release did not say of which.
    older = found.model_copy(update={"best_ms": None})
    write_evaluation(folder.trial(late.trial_id), older)
    assert evaluation_of(late, folder) == older


def test_a_trial_that_the_next_run_goes_on_with_is_not_evaluated_yet() -> None:
    asked = EvaluateConfig(prompts=("a",))
    config = SweepConfig(name="made-up", model="builtin:tiny-llama", data=DataConfig(train="x"), evaluate=asked)
    cut_off = made_up_sweep([made_up_trial({"rank": 8}, status=TrialStatus.CANCELLED)])
    assert trial_to_take(cut_off) == cut_off.trials[0]
    assert list(wanted(config, cut_off)) == []


@pytest.mark.parametrize(("trials", "ranks"), [("best", [16]), ("all", [8, 16])])
def test_the_best_or_all_that_completed_are_evaluated(trials: str, ranks: list[int]) -> None:
    stopped = made_up_trial({"rank": 4}, status=TrialStatus.STOPPED, objective=2.4)
    sweep = made_up_sweep(
        [stopped, made_up_trial({"rank": 8}, objective=2.3), made_up_trial({"rank": 16}, objective=2.1)]
    )
    asked = EvaluateConfig(prompts=("a",), trials=trials)
    config = SweepConfig(name="made-up", model="builtin:tiny-llama", data=DataConfig(train="x"), evaluate=asked)
    assert [trial.config.rank for trial in wanted(config, sweep)] == ranks


def test_tasks_without_lm_eval_are_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "find_spec", lambda name: None)
    evaluation.require(EvaluateConfig(prompts=("a",)))
    with pytest.raises(InputError, match=r"pip install 'lm-eval>="):
        evaluation.require(ASKED)


SCORE = {"metric": "tiny/acc", "mode": "max"}


def test_where_a_score_is_the_objective_all_that_completed_are_evaluated_and_it_decides(tmp_path: Path) -> None:
    trials = [
        made_up_trial({"rank": rank}, repeat, objective=2.0 + rank / 100, memory_bytes=2**30)
        for rank in (8, 16)
        for repeat in range(3)
    ]
    asked = SweepConfig(
        name="made-up",
        model="builtin:tiny-llama",
        data=DataConfig(train="x"),
        objective=SCORE,
        evaluate=EvaluateConfig(tasks=("tiny",)),
    )
    sweep = made_up_sweep(trials).model_copy(update={"objective_metric": "tiny/acc", "objective_mode": "max"})
    assert list(wanted(asked, sweep)) == list(sweep.trials)
    early = recommend(sweep)
    assert early.basis == "nothing"
    assert "no trial that went well has its tiny/acc" in early.answer

    folder = write_made_up(tmp_path / "sweep", sweep)
    for trial in sweep.trials:
        # What the loss prefers, the score does not.
        score = 0.5 + (0.2 if trial.config.rank == 16 else 0.0) + trial.repeat / 1000
        scores = {"tiny/acc": score, "tiny/acc_stderr": 0.1}
        write_evaluation(folder.trial(trial.trial_id), Evaluation(asked=ASKED, scores=scores, seconds=1.0))
    found = tuple(scored(sweep, folder))
    assert len(found) == 6
    sweep = sweep.model_copy(update={"trials": found})
    assert tuple(scored(sweep, folder)) == ()
    assert recommend(sweep).label == "rank=16"
    assert "best tiny/acc (0.7010" in recommend(sweep).answer
    assert trial_to_take(sweep).config.rank == 16
    assert results_table(sweep).splitlines()[0].endswith(",tiny/acc,tiny/acc_stderr")


def test_trials_that_were_not_evaluated_in_time_are_told_whichever_objective_their_score_is() -> None:
    late, *others = (made_up_trial({"rank": rank}) for rank in (4, 8, 16))
    trials = [late, *(trial.model_copy(update={"scores": {"tiny/acc": 0.5}}) for trial in others)]
    sweep = made_up_sweep(trials)
    for objectives in (
        {"objective_metric": "tiny/acc", "objective_mode": "max"},
        {"objectives": (("eval_loss", "min"), ("tiny/acc", "max"))},
    ):
        told = "Without tiny/acc, and so not competing: 1 completed trial, not evaluated."
        assert told in recommend(sweep.model_copy(update=objectives)).evidence


def test_completed_trials_without_the_score_are_told_with_the_scores_that_there_are() -> None:
    trials = [made_up_trial({"rank": rank}).model_copy(update={"scores": {"tiny/acc": 0.5}}) for rank in (8, 16)]
    sweep = made_up_sweep(trials).model_copy(update={"objective_metric": "tiny/accc", "objective_mode": "max"})
    assert any("Without tiny/accc" in line and "tiny/acc." in line for line in recommend(sweep).evidence)
