"""An adaptive search on a real cluster: a conditional space, refusals, early stopping, a second run that goes on."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow import MlflowClient

from orchestrator.results.folders import SweepFolder
from orchestrator.results.records import SweepResult, TrialResult, TrialStatus
from tests.ray.sweeps import LIMIT_S, Run, start
from tests.waiting import wait_until

pytestmark = pytest.mark.timeout(600)

SPACE = {
    "rank": [2, 8],
    "attention": ["sdpa", "flash_attention_2"],
    "engine": ["deepspeed", "ddp"],
    "zero_stage": {"choice": [1, 3], "when": {"engine": "deepspeed"}},
    "learning_rate": {"log_uniform": [1e-4, 1e-1]},
}
FIRST = {"rank": 8, "attention": "sdpa", "engine": "deepspeed", "zero_stage": 3, "learning_rate": 1e-2}


@dataclass(frozen=True, slots=True)
class Searched:
    exit_code: int
    err: str
    sweep: SweepResult
    folder: SweepFolder

    def launched(self) -> list[TrialResult]:
        return [trial for trial in self.sweep.trials if trial.status is not TrialStatus.INFEASIBLE]


def search(storage: Path, trials: int, algorithm: str, scheduler: dict[str, object]) -> Searched:
    run = start(
        storage,
        space=SPACE,
        search={"algorithm": algorithm, "points": [FIRST]},
        scheduler=scheduler,
        budget={"trials": trials},
    )
    exit_code, _, err = run.wait()
    return Searched(exit_code, err, run.sweep(), run.folder)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Searched, Searched]:
    storage = tmp_path_factory.mktemp("search")
    first = search(storage, 6, "tpe", {"asha": {"grace_steps": 2, "reduction_factor": 2}})
    # Another algorithm and other rules may go on with what is known.
    more = {"hyperband": {"grace_steps": 2, "brackets": 2}, "extrapolation": {"grace_steps": 2}}
    return first, search(storage, 8, "gp", more)


def test_a_search_launches_as_many_configurations_as_its_budget_and_refuses_others_for_nothing(
    both: tuple[Searched, Searched],
) -> None:
    first, _ = both
    assert first.exit_code == 0, first.err
    assert [trial.status.value for trial in first.launched()].count("completed") >= 1
    assert {trial.status.value for trial in first.launched()} <= {"completed", "stopped"}
    assert len(first.launched()) == 6
    refused = [trial for trial in first.sweep.trials if trial.status is TrialStatus.INFEASIBLE]
    assert refused
    assert all(trial.config.attention == "flash_attention_2" for trial in refused)


def test_proposals_are_numbered_begin_with_the_points_and_keep_to_their_conditions(
    both: tuple[Searched, Searched],
) -> None:
    proposals = [trial.suggestion for trial in both[0].sweep.trials if trial.suggestion]
    assert [proposal.number for proposal in proposals] == list(range(len(proposals)))
    assert proposals[0].settings == FIRST
    assert all(("zero_stage" in p.settings) == (p.settings["engine"] == "deepspeed") for p in proposals)


def test_a_second_run_goes_on_with_the_next_proposal_and_runs_nothing_again(both: tuple[Searched, Searched]) -> None:
    first, second = both
    assert second.exit_code == 0, second.err
    before = {trial.trial_id: trial for trial in first.launched()}
    after = {trial.trial_id: trial for trial in second.launched()}
    assert {i: after[i].timing for i in before} == {i: trial.timing for i, trial in before.items()}
    assert len(after) == 8
    numbers = [trial.suggestion.number for trial in second.sweep.trials if trial.suggestion]
    assert sorted(numbers) == list(range(len(second.sweep.trials)))
    assert second.folder.report.exists()


def test_a_population_goes_on_from_its_best_and_a_second_run_from_where_it_was_cut(tmp_path: Path) -> None:
    keys = {
        "space": {"rank": [2, 8], "learning_rate": {"log_uniform": [1e-4, 1e-1]}},
        "scheduler": {"pbt": {"population": 3, "interval_steps": 2, "quantile": 0.34}},
    }
    cut = start(tmp_path, **keys)
    wait_until(lambda: generation(cut, 1) or cut.process.poll() is not None, bool, LIMIT_S)
    cut.process.send_signal(signal.SIGINT)
    exit_code, _, err = cut.wait()
    assert exit_code == 130, err
    run = start(tmp_path, **keys)
    exit_code, out, err = run.wait()
    assert exit_code == 0, err
    assert [len(generation(run, number)) for number in range(3)] == [3, 3, 3]
    assert {trial.status for trial in generation(run, 2)} == {TrialStatus.COMPLETED}
    trials = run.trials()
    for number in (1, 2):
        for trial in generation(run, number):
            assert trial.started_from
            parent = trials[trial.started_from.trial_id]
            assert parent.status is TrialStatus.STOPPED
            assert trial.started_from.step == 2 * number == parent.steps
            points = run.folder.trial(trial.trial_id).read_metrics()
            assert [point.step for point in points] == [2 * number + 1, 2 * number + 2]
            assert points[0].tokens > (parent.last.tokens if parent.last else 0)
    assert not any(run.folder.trial(trial_id).checkpoint_steps() for trial_id in trials)
    assert "It came there by learning_rate=" in out
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'test'")
    tags = [found.data.tags for found in client.search_runs([experiment.experiment_id])]
    assert sum("started_from" in tag for tag in tags) == 6


def generation(run: Run, number: int) -> list[TrialResult]:
    if not run.folder.results_json.exists():
        return []
    return [t for t in run.sweep().trials if t.suggestion and t.suggestion.generation == number]
