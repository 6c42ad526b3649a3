"""The evaluation after the last trial, cut short."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")

from orchestrator.config.sweep_config import SweepConfig
from orchestrator.results.evaluation import Evaluation, read_evaluation, write_evaluation
from orchestrator.sweep import evaluation
from orchestrator.sweep.worker import GroupShape
from tests.made_up_sweep import made_up_sweep, made_up_trial, write_made_up


class CutShort:
    """A cluster that has no answer: whoever waits for one without a limit is interrupted."""

    def __init__(self) -> None:
        self.cancelled: list[str] = []
        self.options: dict[str, Any] = {}

    def remote(self, **options: Any) -> Any:
        cluster = self
        self.options = options

        class Remote:
            def __init__(self, function: Any) -> None: ...

            def remote(self, task: Any, model: str) -> str:
                return f"{task.trial_id} on {cluster}"

        return Remote

    def wait(self, waiting: list[str], num_returns: int, timeout: float | None) -> Any:
        if timeout is None:
            raise KeyboardInterrupt
        return [], waiting

    def cancel(self, task: str, force: bool) -> None:
        self.cancelled.append(task)


RAW: dict[str, Any] = {"name": "a", "model": "builtin:tiny-llama", "data": {"train": "builtin:python-docs"}}
ASKED = {**RAW, "evaluate": {"prompts": ["def"], "trials": "all"}}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> CutShort:
    made = CutShort()
    monkeypatch.setattr(evaluation, "ray", made)
    return made


def evaluated(folder: Path, raw: dict[str, Any], shape: GroupShape) -> tuple[bool, str]:
    """Whether the evaluation of two trials came to its end, and what was said."""
    result = made_up_sweep([made_up_trial({"rank": rank}).model_copy(update={"adapter": "adapter"}) for rank in (2, 4)])
    said: list[str] = []
    sweep = SweepConfig.model_validate(raw)
    made_up = write_made_up(folder, result)
    return evaluation.evaluate(sweep, result, shape, made_up, pytest.fail, said.append), " ".join(said)


def test_an_interrupted_evaluation_says_that_it_did_not_come_to_its_end(tmp_path: Path, cluster: CutShort) -> None:
    came_to_its_end, said = evaluated(tmp_path, ASKED, GroupShape(1, 0, 1))
    assert not came_to_its_end
    assert len(cluster.cancelled) == 2
    assert "evaluation was interrupted: run the same command again to have the rest" in said
    assert evaluated(tmp_path, RAW, GroupShape(1, 0, 1)) == (True, "")


def test_an_evaluation_takes_no_longer_than_the_hours_of_the_budget(tmp_path: Path, cluster: CutShort) -> None:
    came_to_its_end, said = evaluated(tmp_path, {**ASKED, "budget": {"hours": 2}}, GroupShape(1, 0, 1))
    assert came_to_its_end
    assert len(cluster.cancelled) == 2
    assert "ended after budget.hours, 2, without 2 trained models: run the same command again" in said


def test_each_evaluation_is_told_of_once_it_is_written(
    tmp_path: Path, cluster: CutShort, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = SweepConfig.model_validate(ASKED)
    found = Evaluation(asked=sweep.evaluate, seconds=1.0)
    monkeypatch.setattr(cluster, "wait", lambda waiting, **limits: (waiting[:1], waiting[1:]))
    monkeypatch.setattr(cluster, "get", lambda done: found, raising=False)
    trials = [made_up_trial({"rank": rank}).model_copy(update={"adapter": "adapter"}) for rank in (2, 4)]
    result = made_up_sweep(trials)
    folder = write_made_up(tmp_path, result)
    told: list[tuple[str, bool]] = []

    def wrote(trial_id: str) -> None:
        told.append((trial_id, read_evaluation(folder.trial(trial_id)) == found))

    assert evaluation.evaluate(sweep, result, GroupShape(1, 0, 1), folder, wrote, print)
    assert told == [(trial.trial_id, True) for trial in trials]


def test_a_trial_is_evaluated_once_more_where_it_has_another_adapter_since(tmp_path: Path, cluster: CutShort) -> None:
    sweep = SweepConfig.model_validate({**ASKED, "budget": {"hours": 1}})
    trial = made_up_trial({"rank": 2})
    assert trial.best
    result = made_up_sweep([trial])
    folder = write_made_up(tmp_path, result)
    for best_ms, tasks in ((trial.best.time_ms, 0), (trial.best.time_ms - 1, 1)):
        found = Evaluation(asked=sweep.evaluate, seconds=1.0, best_ms=best_ms)
        write_evaluation(folder.trial(trial.trial_id), found)
        evaluation.evaluate(sweep, result, GroupShape(1, 0, 1), folder, pytest.fail, print)
        assert len(cluster.cancelled) == tasks


def test_a_trial_with_a_score_that_is_no_number_is_not_evaluated_again(tmp_path: Path, cluster: CutShort) -> None:
    sweep = SweepConfig.model_validate(ASKED)
    trial = made_up_trial({"rank": 2})
    result = made_up_sweep([trial])
    folder = write_made_up(tmp_path, result)
    scores = {"wikitext/word_perplexity": math.inf, "cola/mcc": math.nan, "cola/acc": 0.5}
    write_evaluation(folder.trial(trial.trial_id), Evaluation(asked=sweep.evaluate, scores=scores, seconds=1.0))
    assert evaluation.evaluate(sweep, result, GroupShape(1, 0, 1), folder, pytest.fail, print)
    assert not cluster.cancelled
    (record,) = evaluation.scored(result, folder)
    assert record.measured("cola/acc") == 0.5
    assert record.measured("cola/mcc") is None


def test_models_are_evaluated_on_the_type_of_gpu_that_they_were_trained_on(tmp_path: Path, cluster: CutShort) -> None:
    evaluated(tmp_path, ASKED, GroupShape(1, 0.5, 2, "A100"))
    assert (cluster.options["num_cpus"], cluster.options["num_gpus"]) == (2, 0.5)
    assert cluster.options["resources"] == {"accelerator_type:A100": 0.001}
