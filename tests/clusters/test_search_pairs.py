"""Every algorithm with every scheduler, each a sweep on one cluster that stays: conditions and refusals too."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.results.records import TrialStatus
from tests.ray.clusters import Head, started_head
from tests.ray.sweeps import start

pytestmark = pytest.mark.timeout(300)

TRIALS = 4
CONDITIONAL: dict[str, Any] = {
    "rank": [2, 8],
    "attention": ["sdpa", "flash_attention_2"],
    "engine": ["deepspeed", "ddp"],
    "zero_stage": {"choice": [1, 3], "when": {"engine": "deepspeed"}},
    "learning_rate": {"log_uniform": [1e-4, 1e-1]},
}
CHOICES = CONDITIONAL | {"rank": [2], "learning_rate": [1e-2]}
"""For a grid, which takes no range: three configurations that run and as many that are refused."""
SCHEDULERS: dict[str, dict[str, Any]] = {
    "fifo": {"fifo": {}},
    "asha": {"asha": {"grace_steps": 2, "reduction_factor": 2}},
    "hyperband": {"hyperband": {"grace_steps": 2, "brackets": 2}},
    "median": {"median": {"grace_steps": 2, "min_trials": 2}},
    "extrapolation": {"extrapolation": {"grace_steps": 2}},
}


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with started_head({"RAY_AUTH_MODE": "disabled"}) as started:
        yield started


@pytest.mark.parametrize(("algorithm", "scheduler"), itertools.product(("random", "tpe", "gp", "cma_es"), SCHEDULERS))
def test_a_search_ends_with_its_budget_under_every_scheduler(
    head: Head, tmp_path: Path, algorithm: str, scheduler: str
) -> None:
    run = start(
        tmp_path,
        "--address",
        head.address,
        space=CONDITIONAL,
        search={"algorithm": algorithm},
        scheduler=SCHEDULERS[scheduler],
        budget={"trials": TRIALS},
    )
    exit_code, _, err = run.wait()
    assert exit_code == 0, err
    trials = run.trials().values()
    launched = [trial for trial in trials if trial.status is not TrialStatus.INFEASIBLE]
    refused = [trial for trial in trials if trial.status is TrialStatus.INFEASIBLE]
    # Random search draws before it starts, and what is refused of it was a try. Else the first refusals cost nothing.
    tried = len(trials) if algorithm == "random" else len(launched) + max(0, len(refused) - TRIALS)
    assert tried == TRIALS
    assert {trial.status for trial in launched} <= {TrialStatus.COMPLETED, TrialStatus.STOPPED}
    assert TrialStatus.COMPLETED in {trial.status for trial in launched}
    if scheduler == "fifo":
        assert all(trial.status is TrialStatus.COMPLETED for trial in launched)
    assert all(trial.config.attention == "flash_attention_2" for trial in refused)
    assert all(
        ("zero_stage" in trial.suggestion.settings) == (trial.suggestion.settings["engine"] == "deepspeed")
        for trial in trials
        if trial.suggestion
    )


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_grid_ends_under_every_scheduler(head: Head, tmp_path: Path, scheduler: str) -> None:
    run = start(tmp_path, "--address", head.address, space=CHOICES, scheduler=SCHEDULERS[scheduler])
    exit_code, _, err = run.wait()
    assert exit_code == 0, err
    trials = run.trials().values()
    refused = [trial for trial in trials if trial.status is TrialStatus.INFEASIBLE]
    assert len(trials) == 6
    assert len(refused) == 3
    assert all(trial.config.attention == "flash_attention_2" for trial in refused)
    assert {trial.status for trial in trials if trial not in refused} <= {TrialStatus.COMPLETED, TrialStatus.STOPPED}


def test_a_population_trains_with_two_workers_a_trial(head: Head, tmp_path: Path) -> None:
    run = start(
        tmp_path,
        "--address",
        head.address,
        space={"rank": [2, 8], "learning_rate": {"log_uniform": [1e-4, 1e-1]}},
        scheduler={"pbt": {"population": 2, "interval_steps": 2, "quantile": 0.5}},
        resources={"workers_per_trial": 2},
    )
    exit_code, _, err = run.wait()
    assert exit_code == 0, err
    trials = run.trials()
    later = [trial for trial in trials.values() if trial.started_from]
    assert len(later) == 4
    for trial in later:
        assert trial.started_from is not None
        first = run.folder.trial(trial.trial_id).read_metrics()[0]
        assert first.step == trial.started_from.step + 1
        before = trials[trial.started_from.trial_id].last
        assert before is not None
        assert first.tokens > before.tokens
