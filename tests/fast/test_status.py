"""The few lines about a sweep's state."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from orchestrator.errors import FolderError
from orchestrator.reporting.status import render_status
from orchestrator.results.files import write_atomically
from orchestrator.results.folders import SweepFolder
from orchestrator.results.records import Suggestion, TrialStatus
from orchestrator.results.storage import read_sweep, write_result
from tests.made_up_sweep import START_MS, made_up_point, made_up_sweep, made_up_trial, simulated, write_made_up

NOW_S = START_MS / 1000 + 300


@pytest.fixture
def running(tmp_path: Path) -> Iterator[SweepFolder]:
    """A sweep that a run is at work on."""
    statuses = [TrialStatus.COMPLETED, TrialStatus.FAILED, TrialStatus.RUNNING, TrialStatus.PENDING]
    sweep = simulated([2.0, 2.1, 1.0, 2.2], 1, 0, noise_sd=0, seed_sd=0, status_of=lambda place, _: statuses[place])
    folder = write_made_up(tmp_path / "sweep", sweep.model_copy(update={"ended_ms": None}))
    with FileLock(folder.lock):
        yield folder


def test_a_running_sweep_tells_counts_best_time_and_trouble(running: SweepFolder) -> None:
    lines = render_status(running, NOW_S).splitlines()
    assert lines[0] == "made-up: 4 trials: 1 pending, 1 running, 1 completed, 1 failed"
    # Whatever has completed: a trial that is still at work stands better.
    assert lines[1].startswith("best so far: eval_loss 1.000, ")
    assert lines[1].endswith("(rank=16), running")
    # Two that ended took some 81 s each: one is 50 s under way, the other has not begun.
    assert lines[2] == "time: 5 min 00 s gone, about 1 min 52 s left"
    assert any(line.startswith("running: ") and "(rank=16), step 100 of 100" in line for line in lines)
    assert any(line.startswith("failed: ") and "boom" in line for line in lines)


def test_a_running_trial_is_where_its_curve_is_before_it_was_ever_evaluated(running: SweepFolder) -> None:
    (trial,) = (trial for trial in read_sweep(running)[0].trials if trial.status is TrialStatus.RUNNING)
    where = running.trial(trial.trial_id)
    write_result(running, trial.model_copy(update={"steps": 0, "best": None, "last": None}))
    where.metrics.write_text(made_up_point(4, None).model_dump_json() + "\n")
    assert "(rank=16), step 4 of 100" in render_status(running, NOW_S)
    where.metrics.unlink()
    assert "(rank=16), starting" in render_status(running, NOW_S)


def test_what_a_search_may_still_propose_is_told_until_the_sweep_has_ended(running: SweepFolder) -> None:
    sweep, _ = read_sweep(running)
    proposed = [
        trial.model_copy(update={"suggestion": Suggestion(number=number, settings={})})
        for number, trial in enumerate(sweep.trials)
    ]
    write_made_up(running.root, sweep.model_copy(update={"trials": tuple(proposed)}))
    trials = [{"trial_id": trial.trial_id, "seconds": 40.0} for trial in proposed]
    write_atomically(running.plan, json.dumps({"trials": trials, "concurrent": 2, "launches": 10}))
    assert render_status(running, NOW_S).startswith("made-up: 4 trials of up to 10: 1 pending")
    write_made_up(running.root, sweep.model_copy(update={"trials": tuple(proposed), "ended_ms": START_MS + 9000}))
    assert render_status(running, NOW_S).startswith("made-up: 4 trials: 1 pending")


def test_a_sweep_whose_run_died_is_not_called_running(running: SweepFolder) -> None:
    running.lock.unlink()
    told = render_status(running, NOW_S)
    assert "no run is at work here: run the same command again" in told
    assert "was running: " in told
    assert "left" not in told


def test_the_plan_says_how_long_what_is_left_takes(running: SweepFolder) -> None:
    folder = running
    open_ = (TrialStatus.RUNNING, TrialStatus.PENDING)
    seconds = {t.trial_id: 40.0 if t.status in open_ else 10.0 for t in read_sweep(folder)[0].trials}
    trials = [{"trial_id": identity, "seconds": planned} for identity, planned in seconds.items()]
    write_atomically(folder.plan, json.dumps({"trials": trials, "concurrent": 2}))
    # Two that took 10 s by the plan took 80 s: two of 40 s take 320 s each, at a time.
    assert "about 5 min 20 s left" in render_status(folder, NOW_S)
    # Ten more trials of a search take 200 s each, as all that ended: 25 s by the plan, 8 times over.
    write_atomically(folder.plan, json.dumps({"trials": trials, "concurrent": 2, "launches": 10}))
    assert "about 21 min 36 s left" in render_status(folder, NOW_S)


@pytest.mark.parametrize(
    ("budget", "told"),
    [
        ("hours: 1", "about 1 min 52 s left"),
        ("hours: 0.1", "about 1 min 00 s left, until budget.hours is used up"),
        ("hours: 0.01", "about 0 s left, until budget.hours is used up"),
        # Trials have held two GPUs each for 80 s, three times, and 48 s; four are held now.
        ("gpu_hours: 0.19334", "about 30 s left, until budget.gpu_hours is used up"),
        ("{cost: 0.3867, price_per_gpu_hour: 2}", "about 30 s left, until budget.cost is used up"),
        ("{cost: 0.3}", "about 1 min 52 s left"),
        ("[", "about 1 min 52 s left"),
    ],
)
def test_no_more_time_is_left_than_the_budget_leaves(running: SweepFolder, budget: str, told: str) -> None:
    plan = {"trials": [], "concurrent": 2, "workers_per_trial": 2, "gpus_per_worker": 1}
    write_atomically(running.plan, json.dumps(plan | {"concurrent": 1 if told.endswith("52 s left") else 2}))
    write_atomically(running.sweep_file, f"budget:\n  {budget}\n")
    assert render_status(running, NOW_S).splitlines()[2] == f"time: 5 min 00 s gone, {told}"


@pytest.mark.parametrize(
    "plan",
    [
        *('{"trials": [], "concurrent": 1e999}', '{"trials": [], "concurrent": 1' + "0" * 400 + "}", "[" * 100_000),
        *('{"trials": [], "concurrent": 1, "launches": 1e30}', "{", "[]", "{}"),
        '{"trials": [{"trial_id": "x", "seconds": 1' + "0" * 400 + '}], "concurrent": 1}',
        '{"launches": "x"}',
        '{"trials": 3}',
        '{"trials": [3]}',
        '{"trials": [{"trial_id": "x"}]}',
    ],
)
def test_a_plan_that_cannot_be_read_is_done_without(running: SweepFolder, plan: str) -> None:
    write_atomically(running.plan, plan)
    assert "about 1 min 52 s left" in render_status(running, NOW_S)


def test_an_ended_sweep_names_what_its_report_recommends_and_one_that_was_interrupted_the_best_so_far(
    tmp_path: Path,
) -> None:
    heavy = made_up_trial({"zero_stage": 2}, objective=3.0 - 1e-7, memory_bytes=2**31)
    light = made_up_trial({"zero_stage": 0}, objective=3.0, memory_bytes=2**30)
    sweep = made_up_sweep([heavy, light], searched=("zero_stage",))
    ended = render_status(write_made_up(tmp_path / "ended", sweep), NOW_S)
    assert f"recommended: eval_loss 3.000, {light.trial_id} (zero_stage=0), completed" in ended
    assert "so far" not in ended
    cut_off = sweep.model_copy(update={"interrupted": True})
    told = render_status(write_made_up(tmp_path / "cut-off", cut_off), NOW_S)
    assert f"best so far: eval_loss 3.000, {heavy.trial_id} (zero_stage=2), completed" in told


def test_a_search_that_its_budget_ended_says_so_how_it_goes_on_and_how_many_it_may_still_try(
    running: SweepFolder,
) -> None:
    sweep, _ = read_sweep(running)
    proposed = [
        made_up_trial({"rank": 8 + number}).model_copy(update={"suggestion": Suggestion(number=number, settings={})})
        for number in range(2)
    ]
    why = "budget.hours is used up: run the same command again to go on for as long, or raise it"
    ended = {"trials": tuple(proposed), "ended_ms": START_MS + 9000, "cut_short": why}
    write_made_up(running.root, sweep.model_copy(update=ended))
    write_atomically(running.plan, json.dumps({"trials": [], "concurrent": 2, "launches": 10}))
    counts, best, took = render_status(running, NOW_S).splitlines()
    assert counts == "made-up: 2 trials of up to 10: 2 completed"
    assert best.startswith("best so far: ")
    assert took == f"time: ended after 9 s, since {why}"


def test_the_best_so_far_keeps_the_constraints_and_went_well(tmp_path: Path) -> None:
    heavy = made_up_trial({"rank": 4}, status=TrialStatus.RUNNING, objective=1.0, memory_bytes=2**32)
    wild = made_up_trial({"rank": 8}, status=TrialStatus.DIVERGED, objective=1.1)
    sound = made_up_trial({"rank": 16}, status=TrialStatus.RUNNING, objective=1.2)
    sweep = made_up_sweep([heavy, wild, sound], ended_ms=None, constraints=("peak_memory_bytes <= 2GiB",))
    assert "best so far: eval_loss 1.200" in render_status(write_made_up(tmp_path / "sweep", sweep), NOW_S)


def test_an_ended_sweep_says_how_long_it_took(tmp_path: Path) -> None:
    folder = write_made_up(tmp_path / "sweep", simulated([2.0], 1, 0))
    assert "time: ended after 1 h 00 min" in render_status(folder, NOW_S)
    resumed = {"run_started_ms": START_MS + 3_000_000, "earlier_runs_s": 60.0}
    paused = simulated([2.0], 1, 0).model_copy(update=resumed)
    assert "time: ended after 11 min 00 s" in render_status(write_made_up(tmp_path / "paused", paused), NOW_S)
    interrupted = simulated([2.0], 1, 0).model_copy(update={"interrupted": True})
    assert "run the same command again" in render_status(write_made_up(tmp_path / "other", interrupted), NOW_S)


def test_only_the_last_troubles_are_told(tmp_path: Path) -> None:
    sweep = made_up_sweep([made_up_trial({"rank": 1 + i}, status=TrialStatus.FAILED) for i in range(20)])
    text = render_status(write_made_up(tmp_path / "sweep", sweep), NOW_S)
    assert text.count("boom") == 5
    assert "15 more went wrong" in text
    assert "best so far: none. No answer: no trial that went well has its eval_loss, and the sweep has ended." in text


def test_a_sweep_that_has_not_started_and_a_damaged_record(tmp_path: Path) -> None:
    sweep = made_up_sweep([made_up_trial({"rank": 8}, status=TrialStatus.PENDING)], started_ms=None, ended_ms=None)
    folder = write_made_up(tmp_path / "sweep", sweep)
    folder.trial(sweep.trials[0].trial_id).result.write_text("{", encoding="utf-8")
    text = render_status(folder, NOW_S)
    assert "time: not started" in text
    assert "damaged: " in text


def test_a_folder_without_a_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FolderError):
        render_status(SweepFolder(tmp_path))
