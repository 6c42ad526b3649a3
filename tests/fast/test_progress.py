"""What a running sweep tells of the time that is left."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config.sweep_config import SweepConfig
from orchestrator.results.folders import SweepFolder
from orchestrator.results.records import Suggestion, TrialResult, TrialStatus
from orchestrator.sweep.opening import start_words
from orchestrator.sweep.progress import Progress
from tests.made_up_sweep import made_up_point, made_up_sweep, made_up_trial


def trials_of(first: TrialStatus) -> list[TrialResult]:
    """One of this status, and two that wait."""
    return [made_up_trial({"rank": 1}, status=first)] + [
        made_up_trial({"rank": rank}, status=TrialStatus.PENDING) for rank in (2, 3)
    ]


def test_where_speed_is_the_objective_the_best_so_far_is_by_the_whole_trials(tmp_path: Path) -> None:
    slow, fast = (made_up_trial({"rank": rank}, step_time_s=seconds) for rank, seconds in ((1, 0.9), (2, 0.8)))
    slow = slow.model_copy(update={"best": made_up_point(20, 2.0, step_time_s=0.1)})
    sweep = made_up_sweep([slow, fast], objective_metric="step_time_s")
    progress = Progress(SweepFolder(tmp_path), sweep, 1, {}, None, None)
    assert "best so far: step_time_s 0.8  rank=2" in str(progress._panel())


def test_the_best_so_far_keeps_the_constraints_and_went_well_as_status_has_it(tmp_path: Path) -> None:
    heavy = made_up_trial({"rank": 1}, status=TrialStatus.RUNNING, objective=1.0, memory_bytes=2**32)
    wild = made_up_trial({"rank": 2}, status=TrialStatus.DIVERGED, objective=1.1)
    sound = made_up_trial({"rank": 4}, status=TrialStatus.RUNNING, objective=1.2)
    sweep = made_up_sweep([heavy, wild, sound], constraints=("peak_memory_bytes <= 2GiB",))
    progress = Progress(SweepFolder(tmp_path), sweep, 1, {}, None, None)
    assert "best so far: eval_loss 1.2  rank=4" in str(progress._panel())
    progress(sound.model_copy(update={"peak_memory": heavy.peak_memory}))
    assert "best so far" not in str(progress._panel())


def progress_of(
    tmp_path: Path, records: list[TrialResult], budget_hours: float, launches: int | None = None
) -> Progress:
    planned_s = {record.trial_id: 40.0 for record in records}
    return Progress(SweepFolder(tmp_path), made_up_sweep(records), 1, planned_s, launches, budget_hours)


def test_a_trial_that_goes_on_is_not_said_to_be_where_an_earlier_run_left_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left = made_up_trial({"rank": 1}, status=TrialStatus.PENDING).model_copy(
        update={"steps": 11, "best": made_up_point(8, 3.174), "last": made_up_point(11, 3.174)}
    )
    progress = progress_of(tmp_path, [left], budget_hours=1)
    progress(left.model_copy(update={"status": TrialStatus.RUNNING}))
    assert capsys.readouterr().err.strip().endswith("running")
    progress(left.model_copy(update={"status": TrialStatus.RUNNING, "steps": 12, "last": made_up_point(12, 3.13)}))
    assert "step 12  eval_loss 3.13" in capsys.readouterr().err


def test_a_budget_that_will_not_do_is_told_once_as_soon_as_a_trial_has_shown_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pending = trials_of(TrialStatus.PENDING)
    progress = progress_of(tmp_path, pending, budget_hours=120 / 3600)
    progress(pending[0].model_copy(update={"status": TrialStatus.RUNNING}))
    assert "budget.hours" not in capsys.readouterr().err
    # It took 80 s, twice what was planned: two more take 160 s.
    ended = trials_of(TrialStatus.COMPLETED)
    progress(ended[0])
    told = capsys.readouterr().err
    assert "about 0.0444 hours are needed at this pace, and budget.hours is 0.0333" in told
    progress(ended[1].model_copy(update={"status": TrialStatus.RUNNING}))
    assert "budget.hours" not in capsys.readouterr().err


def test_a_budget_that_will_not_do_for_what_a_search_has_not_proposed_yet_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = progress_of(tmp_path, trials_of(TrialStatus.PENDING)[:1], budget_hours=1, launches=61)
    proposed = {"suggestion": Suggestion(number=0, settings={"rank": 1})}
    progress(trials_of(TrialStatus.COMPLETED)[0].model_copy(update=proposed))
    # It took 80 s, and 60 more are to come.
    assert "about 1.33 hours are needed at this pace, and budget.hours is 1:" in capsys.readouterr().err


def test_the_panel_tells_of_how_many_trials_a_search_may_try_these_are(tmp_path: Path) -> None:
    running = trials_of(TrialStatus.RUNNING)[0].model_copy(update={"suggestion": Suggestion(number=0, settings={})})
    assert "1 running of up to 10 trials · " in str(progress_of(tmp_path, [running], 1, launches=10)._panel())
    assert "1 running · " in str(progress_of(tmp_path, [running], 1, launches=1)._panel())


def test_the_panel_is_drawn_while_a_search_proposes_trials(tmp_path: Path) -> None:
    """A thread of its own draws it, and ended in an error where one was added meanwhile."""

    class OneMoreMeanwhile(TrialResult):
        def measured(self, metric: str) -> float | None:
            progress(new)
            return super().measured(metric)

    new = made_up_trial({"rank": 8}, status=TrialStatus.RUNNING)
    old = OneMoreMeanwhile(**dict(made_up_trial({"rank": 4})))
    progress = progress_of(tmp_path, [old, made_up_trial({"rank": 2})], 1)
    assert "2 completed · " in str(progress._panel())
    assert "1 running, 2 completed · " in str(progress._panel())


def test_the_panel_tells_no_more_time_than_the_budget_leaves(tmp_path: Path) -> None:
    waiting = [*trials_of(TrialStatus.PENDING), made_up_trial({"rank": 4})]
    told = str(progress_of(tmp_path, waiting, 60.5 / 3600)._panel())
    assert "about 1:00 left, until budget.hours is used up" in told
    assert "until" not in str(progress_of(tmp_path, waiting, 1)._panel())


def test_once_the_sweep_is_to_end_the_panel_tells_of_no_time_that_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = progress_of(tmp_path, [*trials_of(TrialStatus.RUNNING), made_up_trial({"rank": 4})], 1)
    assert " left" in str(progress._panel())
    assert "at work: " in str(progress._panel())
    progress.stopping("stopping: all is safe")
    assert capsys.readouterr().err == "stopping: all is safe\n"
    told = str(progress._panel())
    assert ", stopping" in told
    assert " left" not in told
    assert "at work: " not in told


def test_a_long_silence_is_broken_by_what_runs_or_waits_and_by_no_line_that_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("orchestrator.sweep.progress.QUIET_S", -1.0)
    told = []
    for status in (TrialStatus.PENDING, TrialStatus.RUNNING, TrialStatus.COMPLETED):
        progress_of(tmp_path, trials_of(status)[: 1 if status.is_final else 3], 1).on_step_begin(1, [])
        told.append(capsys.readouterr().err)
    waiting, running, ended = told
    assert waiting == "[0:00] none at work yet: 3 trials to start when workers are there\n"
    assert "] at work: " in running
    assert ended == ""


def test_a_budget_that_will_do_is_not_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    progress = progress_of(tmp_path, trials_of(TrialStatus.PENDING), budget_hours=1)
    progress(trials_of(TrialStatus.COMPLETED)[0])
    assert "completed" in (told := capsys.readouterr().err)
    assert "budget.hours" not in told


def test_the_start_tells_how_many_trials_go_on_where_they_were_cut_off(tmp_path: Path) -> None:
    folder, records = SweepFolder(tmp_path), trials_of(TrialStatus.COMPLETED)
    new = "2 trials to run, 1 at a time; 0 refused; 1 done before"
    assert start_words(records, folder, 1, asked_for()) == new
    folder.trial(records[1].trial_id).checkpoint(40).mkdir(parents=True)
    assert start_words(records, folder, 1, asked_for()) == f"{new}; 1 goes on from its checkpoint"
    folder.trial(records[2].trial_id).checkpoint(40).mkdir(parents=True)
    assert start_words(records, folder, 1, asked_for()).endswith("; 2 go on from their checkpoints")


def test_the_start_of_a_search_tells_what_it_may_still_make(tmp_path: Path) -> None:
    def told(records: list[TrialResult], sweep: SweepConfig) -> str:
        return start_words(records, SweepFolder(tmp_path), 1, sweep).partition(", ")[0]

    ended, *waiting = [
        record.model_copy(update={"suggestion": Suggestion(number=number, settings={})})
        for number, record in enumerate(trials_of(TrialStatus.COMPLETED))
    ]
    tpe = asked_for(search={"algorithm": "tpe"}, budget={"trials": 3})
    assert told([], tpe) == "up to 3 configurations to try"
    assert told([ended, *waiting], tpe) == "up to 2 configurations to try"
    assert told([ended], asked_for(search={"algorithm": "tpe"}, budget={"trials": 1})) == "0 configurations to try"
    pbt = asked_for(scheduler={"pbt": {"population": 4, "interval_steps": 40}})
    assert told([], pbt) == "a population of 4 in 3 generations"


def test_the_start_tells_which_points_are_not_tried_since_they_are_excluded(tmp_path: Path) -> None:
    search = {"algorithm": "tpe", "points": ["known_good"]}
    sweep = asked_for(search=search, budget={"trials": 3}, exclude=[{"learning_rate": [2e-4]}])
    told = start_words([], SweepFolder(tmp_path), 1, sweep)
    assert told.endswith("; of search.points {learning_rate: 0.0002} is not tried, since `exclude` names it")


def asked_for(**fields: Any) -> SweepConfig:
    space = {"learning_rate": {"log_uniform": [1e-5, 1e-3]}}
    raw = {"name": "x", "model": "builtin:tiny-llama", "data": {"train": "builtin:python-docs"}, "space": space}
    return SweepConfig.model_validate({**raw, "trial": {"max_steps": 100}, **fields})


class Stream(io.StringIO):
    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal


@pytest.mark.parametrize(
    ("stdout", "stderr", "no_color", "lives"),
    [(True, True, False, True), (False, True, False, False), (True, False, False, False), (True, True, True, False)],
)
def test_the_display_lives_where_both_streams_are_terminals_and_nobody_asked_for_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stdout: bool, stderr: bool, no_color: bool, lives: bool
) -> None:
    shown = Stream(stderr)
    monkeypatch.setattr(sys, "stdout", Stream(stdout))
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    with progress_of(tmp_path, trials_of(TrialStatus.PENDING), 1.0):
        pass
    assert ("3 pending" in shown.getvalue()) is lives


def test_a_sweep_goes_on_though_nobody_listens_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    broken = os.fdopen(writer, "w", buffering=1)
    try:
        monkeypatch.setattr(sys, "stderr", broken)
        (record,) = records = [made_up_trial({"rank": 8}, status=TrialStatus.RUNNING)]
        progress = progress_of(tmp_path, records, 1.0)
        progress(record)
        progress(record.model_copy(update={"status": TrialStatus.COMPLETED}))
    finally:
        monkeypatch.undo()
        with contextlib.suppress(BrokenPipeError):
            broken.close()


def test_a_sweep_goes_on_though_the_disk_of_its_messages_is_full_or_stderr_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (record,) = records = [made_up_trial({"rank": 8}, status=TrialStatus.RUNNING)]
    full = os.fdopen(os.open("/dev/full", os.O_WRONLY), "w", buffering=1)
    for stderr in (full, None):
        monkeypatch.setattr(sys, "stderr", stderr)
        progress = progress_of(tmp_path, records, 1.0)
        progress(record.model_copy(update={"status": TrialStatus.COMPLETED}))
        progress.say("more")
    monkeypatch.undo()
    with contextlib.suppress(OSError):
        full.close()
    assert capsys.readouterr().out == ""
