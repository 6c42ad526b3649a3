"""What may change between two runs in one folder, and what stays."""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.config.sweep_config import SweepConfig
from orchestrator.config.sweep_file import to_yaml
from orchestrator.errors import FolderError, StorageError
from orchestrator.reporting.times import times_of
from orchestrator.results import folders
from orchestrator.results.files import write_atomically
from orchestrator.results.folders import SweepFolder
from orchestrator.results.records import PeakMemory, Suggestion, TrialStatus
from orchestrator.results.storage import read_sweep, write_result
from orchestrator.sweep.delivered import Delivered, write_delivered
from orchestrator.sweep.resume import (
    Earlier,
    at_work_s,
    changes,
    gone_on_with,
    kept,
    read_earlier,
    require_same_data,
    require_same_question,
    with_time_spent,
    words_for_a_plan,
)
from tests.fast.cases import CPU
from tests.made_up_sweep import START_MS, made_up_point, made_up_trial, simulated, write_made_up

pytest.importorskip("ray")

from orchestrator.sweep.opening import opening_result

BASE: dict[str, Any] = {
    "name": "made-up",
    "model": "builtin:tiny-llama",
    "data": {"train": "builtin:python-docs"},
    "trial": {"max_steps": 20},
    "space": {"rank": [4, 8]},
}
FOLDER = SweepFolder(Path("sweeps/made-up"))


def sweep(**keys: Any) -> SweepConfig:
    return SweepConfig.model_validate(BASE | keys)


def told_in_a_plan(folder: SweepFolder, now: SweepConfig, planned: int, proposed_by: str | None = None) -> list[str]:
    trials = [SimpleNamespace(trial_id=made_up_trial({"rank": rank}).trial_id) for rank in range(1, planned + 1)]
    plan: Any = SimpleNamespace(trials=trials, proposed_by=proposed_by, worker_memory_bytes=2**30)
    return list(words_for_a_plan(folder, now, plan))


def test_a_plan_tells_how_many_of_its_trials_are_done_already(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path / "made-up")
    assert told_in_a_plan(folder, sweep(), 8) == []
    statuses = ["completed", "stopped", "infeasible", "cancelled", "running", "pending", "completed"]
    for rank, status in enumerate(statuses, 1):
        write_result(folder, made_up_trial({"rank": rank}, status=TrialStatus(status)))
    write_atomically(folder.sweep_file, to_yaml(sweep()))
    assert told_in_a_plan(folder, sweep(), 6) == [
        f"2 of these trials are done already in {folder.root}: `run` goes on with the rest"
    ]
    assert told_in_a_plan(folder, sweep(), 1)[0].startswith("1 of these trials is done already in ")
    assert told_in_a_plan(replace(folder, remote="s3://bucket/made-up"), sweep(), 6) == []
    (told,) = told_in_a_plan(folder, sweep(model="builtin:smollm2-135m"), 6)
    assert told.startswith("run would end at once: ")
    assert "model was builtin:tiny-llama, now builtin:smollm2-135m" in told


def test_a_plan_for_a_gpu_tells_that_run_would_refuse_results_of_cpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(BASE | {"storage": str(tmp_path)}))
    folder = SweepFolder(tmp_path / "made-up")
    write_atomically(folder.sweep_file, to_yaml(sweep().on_hardware(has_gpus=False)))

    def plan(*more: str) -> str:
        return CliRunner().invoke(app, ["plan", str(file), "--gpu", "A100", *more]).stdout

    assert "run would end at once: " in plan()
    assert "trial.precision was fp32, now bf16" in plan()
    assert "run would end" not in plan("--set", "trial.precision=fp32")
    monkeypatch.setattr("orchestrator.planning.hardware.hardware_for", lambda *named: CPU)
    assert "run would end" not in plan()


def test_a_plan_with_more_memory_counts_no_trial_that_ran_out_of_it(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path / "made-up")
    write_atomically(folder.sweep_file, to_yaml(sweep()))
    short = PeakMemory(predicted_bytes=2**28, available_bytes=2**29, kind="resident")
    ran_out = made_up_trial({"rank": 1}, status=TrialStatus.OUT_OF_MEMORY).model_copy(update={"peak_memory": short})
    write_result(folder, ran_out)
    assert told_in_a_plan(folder, sweep(), 1) == []


def test_a_plan_of_a_search_tells_how_many_configurations_it_has_tried(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path / "made-up")
    for number, repeat in ((0, 0), (0, 1), (1, 0)):
        proposed = {"suggestion": Suggestion(number=number, settings={"rank": 2 + number})}
        write_result(folder, made_up_trial({"rank": 2 + number}, repeat).model_copy(update=proposed))
    write_atomically(folder.sweep_file, to_yaml(sweep()))
    (told,) = told_in_a_plan(folder, sweep(), 0, proposed_by="tpe")
    assert told.startswith("2 configurations of this search are done already in ")


def test_a_score_may_become_the_objective_once_the_trials_are_there() -> None:
    scored = sweep(objective={"metric": "tiny/acc", "mode": "max"}, evaluate={"tasks": ["tiny"]})
    require_same_question(FOLDER, sweep(), scored)
    with pytest.raises(FolderError, match="objective was"):
        require_same_question(FOLDER, sweep(objective={"metric": "loss"}), scored)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"trial": {"max_steps": 40}}, "trial.max_steps was 20, now 40"),
        ({"trial": {"max_steps": 20, "learning_rate": 0.01}}, "trial.learning_rate was 0.0002, now 0.01"),
        ({"model": "builtin:smollm2-135m"}, "model was builtin:tiny-llama, now builtin:smollm2-135m"),
        (
            {"objective": {"metric": "loss"}},
            "objective was {metric: eval_loss, mode: min}, now {metric: loss, mode: min}",
        ),
        (
            {"objective": [{"metric": "eval_loss"}, {"metric": "tokens_per_s"}]},
            "now [{metric: eval_loss, mode: min}, {metric: tokens_per_s, mode: max}]",
        ),
        ({"trial": {"max_steps": 20, "gradient_checkpointing": True}}, "gradient_checkpointing was false, now true"),
        ({"data": {"train": "builtin:python-docs", "eval": 0.5}}, "data was {train: 'builtin:python-docs', "),
    ],
    ids=str,
)
def test_a_change_after_which_results_cannot_be_compared_is_refused_with_the_difference(
    keys: dict[str, Any], told: str
) -> None:
    with pytest.raises(FolderError) as caught:
        require_same_question(FOLDER, sweep(), sweep(**keys))
    assert str(caught.value).count(told) == 1
    assert "--name" in str(caught.value)


@pytest.mark.parametrize(
    "keys",
    [
        {"space": {"rank": [4, 8, 16]}},
        {"space": {"rank": [4]}},
        {"space": {}, "trial": {"max_steps": 20, "rank": 4}},
        {"search": {"repeats": 3}},
        {"budget": {"hours": 1}},
        {"resources": {"max_concurrent": 1}},
        {"scheduler": {"asha": {"grace_steps": 5}}},
        {"question": "another"},
    ],
    ids=str,
)
def test_a_change_of_what_is_searched_or_spent_goes_on(keys: dict[str, Any]) -> None:
    assert list(changes(sweep(), sweep(**keys), knows_hardware=False)) == []
    require_same_question(FOLDER, sweep(), sweep(**keys))


def test_another_space_is_refused_to_a_population_that_was_born_in_one() -> None:
    pbt = {"scheduler": {"pbt": {"population": 2, "interval_steps": 20}}, "trial": {"max_steps": 40}}
    before = sweep(**pbt, space={"learning_rate": [1e-4, 1e-3]})
    require_same_question(FOLDER, before, sweep(**pbt, space={"learning_rate": [1e-4, 1e-3]}))
    with pytest.raises(FolderError, match=r"space\.rank was not searched, now .*\[4, 8\]"):
        require_same_question(FOLDER, before, sweep(**pbt, space={"learning_rate": [1e-4, 1e-3], "rank": [4, 8]}))


def test_a_precision_that_follows_the_hardware_is_compared_once_it_is_known() -> None:
    before = sweep().on_hardware(has_gpus=False)
    require_same_question(FOLDER, before, sweep())
    require_same_question(FOLDER, before, sweep().on_hardware(has_gpus=False))
    with pytest.raises(FolderError, match=r"trial\.precision was fp32, now bf16"):
        require_same_question(FOLDER, before, sweep(trial={"max_steps": 20, "precision": "bf16"}))


def test_on_other_hardware_a_precision_that_follows_it_is_another(tmp_path: Path) -> None:
    before = sweep().on_hardware(has_gpus=False)
    with pytest.raises(FolderError, match=r"trial\.precision was fp32, now bf16"):
        require_same_question(FOLDER, before, sweep().on_hardware(has_gpus=True), knows_hardware=True)


def test_results_without_their_sweep_file_are_not_written_over(tmp_path: Path) -> None:
    folder = write_made_up(tmp_path, simulated([2.0], 1, 0))
    with pytest.raises(FolderError, match=r"holds results and no sweep\.yaml"):
        read_earlier(folder)


def test_results_that_the_file_no_longer_asks_for_stay_and_open_trials_are_closed(tmp_path: Path) -> None:
    statuses = [TrialStatus.COMPLETED, TrialStatus.RUNNING, TrialStatus.INFEASIBLE, TrialStatus.COMPLETED]
    made_up = simulated([2.0, 2.1, 2.2, 2.3], 1, 0, status_of=lambda place, _: statuses[place])
    folder = write_made_up(tmp_path, made_up)
    write_atomically(folder.sweep_file, to_yaml(sweep()))
    earlier = read_earlier(folder)
    assert earlier is not None
    completed, running, _, planned = (trial.trial_id for trial in made_up.trials)
    late = made_up_point(120, 1.0)
    with folder.trial(running).metrics.open("a", encoding="utf-8") as curve:
        curve.write(late.model_dump_json() + "\n")
    left = kept(earlier, frozenset({planned}), folder)
    assert {identity: record.status for identity, record in left.items()} == {
        completed: TrialStatus.COMPLETED,
        running: TrialStatus.CANCELLED,
    }
    assert left[running].reason
    # Its workers had come further than the run that died had heard.
    assert (left[running].best, left[running].steps) == (late, 120)


def test_what_was_cut_off_and_is_no_longer_asked_for_says_so_until_it_is_asked_for_again(tmp_path: Path) -> None:
    made_up = simulated([2.0], 2, 0, status_of=lambda _, r: TrialStatus.CANCELLED if r else TrialStatus.COMPLETED)
    folder = write_made_up(tmp_path, made_up)
    write_atomically(folder.sweep_file, to_yaml(sweep()))
    first, second = made_up.trials
    earlier = read_earlier(folder)
    assert earlier is not None
    left = kept(earlier, frozenset({first.trial_id}), folder)[second.trial_id]
    assert (left.status, left.asked_for) == (TrialStatus.CANCELLED, False)
    assert left.reason == "the sweep file no longer asks for it"
    own = folder.trial(second.trial_id)
    own.checkpoint(40).mkdir()
    waiting = made_up_trial({"rank": 4}, repeat=1, status=TrialStatus.PENDING)
    assert gone_on_with(left, waiting, own).asked_for


def test_a_folder_whose_summary_is_lost_goes_on_from_the_trials_records(tmp_path: Path) -> None:
    made_up = simulated([2.0, 2.1], 1, 0)
    folder = write_made_up(tmp_path, made_up)
    write_atomically(folder.sweep_file, to_yaml(sweep()))
    folder.results_json.write_text("{")
    earlier = read_earlier(folder)
    assert earlier is not None
    assert earlier.result is None
    assert set(earlier.trials) == {trial.trial_id for trial in made_up.trials}


@pytest.mark.parametrize("left", ["", "{", None], ids=["empty", "cut", "gone"])
def test_a_trial_that_had_ended_is_not_run_again_though_its_record_is_lost(tmp_path: Path, left: str | None) -> None:
    statuses = [TrialStatus.COMPLETED, TrialStatus.COMPLETED, TrialStatus.RUNNING, TrialStatus.COMPLETED]
    made_up = simulated([2.0, 2.1, 2.2, 2.3], 1, 0, status_of=lambda place, _: statuses[place])
    folder = write_made_up(tmp_path, made_up)
    write_atomically(folder.sweep_file, to_yaml(sweep()))
    lost, whole, running, removed = made_up.trials
    for trial in (lost, running):
        folder.trial(trial.trial_id).result.unlink()
        if left is not None:
            folder.trial(trial.trial_id).result.write_text(left)
    shutil.rmtree(folder.trial(removed.trial_id).root)
    earlier = read_earlier(folder)
    assert earlier is not None
    assert dict(earlier.trials) == {lost.trial_id: lost, whole.trial_id: whole}
    damaged = {folder.trial(trial.trial_id).result for trial in (lost, running) if left is not None}
    assert {record.file for record in earlier.damaged} == damaged


def test_a_trial_that_had_ended_is_not_run_again_though_its_own_record_is_older(tmp_path: Path) -> None:
    statuses = [TrialStatus.COMPLETED, TrialStatus.RUNNING, TrialStatus.RUNNING]
    made_up = simulated([2.0, 2.1, 2.2], 1, 0, status_of=lambda place, _: statuses[place])
    ended, running, newer = made_up.trials
    folder = write_made_up(tmp_path, made_up)
    write_atomically(folder.sweep_file, to_yaml(sweep()))
    older = ended.model_copy(update={"status": TrialStatus.RUNNING})
    now = newer.model_copy(update={"status": TrialStatus.COMPLETED})
    for record in (older, now):
        folder.trial(record.trial_id).result.write_text(record.model_dump_json())
    earlier = read_earlier(folder)
    assert earlier is not None
    assert dict(earlier.trials) == {trial.trial_id: trial for trial in (ended, running, now)}
    assert read_sweep(folder)[0].trials == (ended, running, now)


def test_a_trial_that_was_cut_off_keeps_what_it_had_where_it_left_a_checkpoint(tmp_path: Path) -> None:
    old = made_up_trial({"rank": 4, "micro_batch_size": 2}, status=TrialStatus.CANCELLED)
    new = made_up_trial({"rank": 4, "micro_batch_size": 8}, status=TrialStatus.PENDING)
    folder = SweepFolder(tmp_path).trial(old.trial_id)
    assert gone_on_with(old, new, folder) == new
    # Half written, and hence none.
    folder.partial_checkpoint(60).mkdir(parents=True)
    assert gone_on_with(old, new, folder) == new
    folder.checkpoint(40).mkdir()
    record = gone_on_with(old, new, folder)
    assert (record.status, record.reason, record.best, record.steps) == (TrialStatus.PENDING, None, old.best, old.steps)
    assert record.config.micro_batch_size == 2
    timing = record.timing
    assert (
        timing.total_s == timing.startup_s + timing.model_s + timing.training_s + timing.evaluation_s + timing.saving_s
    )
    refused = made_up_trial({"rank": 4, "micro_batch_size": 8}, status=TrialStatus.INFEASIBLE)
    assert gone_on_with(old, refused, folder) == refused
    # They were of an adapter that a better one may take the place of.
    assert gone_on_with(old.model_copy(update={"scores": {"tiny/acc": 0.5}}), new, folder).scores == {}


def test_a_trial_that_has_ended_keeps_no_checkpoint_and_one_that_was_cut_off_does(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path)
    for status, kept_steps in [(TrialStatus.RUNNING, [40]), (TrialStatus.CANCELLED, [40]), (TrialStatus.COMPLETED, [])]:
        record = made_up_trial({"rank": 4}, status=status)
        trial = folder.trial(record.trial_id)
        trial.checkpoint(40).mkdir(parents=True, exist_ok=True)
        write_result(folder, record)
        assert trial.checkpoint_steps() == kept_steps


def test_an_end_is_recorded_after_the_curve_and_before_the_checkpoint_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = SweepFolder(tmp_path)
    record = made_up_trial({"rank": 4})
    trial = folder.trial(record.trial_id)
    trial.checkpoint(40).mkdir(parents=True)
    trial.metrics.touch()
    synced = []

    def fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        synced.append((path.name, trial.result.exists(), trial.checkpoint(40).exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    write_result(folder, record)
    assert synced == [
        (trial.metrics.name, False, True),
        (f".{trial.result.name}.{os.getpid()}", False, True),
        (trial.root.name, True, True),
    ]
    assert not trial.checkpoint(40).exists()


@pytest.mark.parametrize("number", [errno.EIO, errno.EINVAL], ids=errno.errorcode.get)
def test_a_folder_that_cannot_be_synced_is_a_storage_that_fails_or_one_that_cannot_do_it(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = SweepFolder(tmp_path)
    record = made_up_trial({"rank": 4})
    trial = folder.trial(record.trial_id)
    trial.checkpoint(40).mkdir(parents=True)
    fsync = os.fsync

    def of_files_alone(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").is_dir():
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", of_files_alone)
    if number == errno.EINVAL:
        write_result(folder, record)
    else:
        with pytest.raises(StorageError, match=r"Input/output error.*mend the disk"):
            write_result(folder, record)
    assert trial.result.exists()
    assert trial.checkpoint(40).exists() == (number == errno.EIO)


def test_only_the_last_whole_checkpoint_counts_and_the_curve_must_reach_it(tmp_path: Path) -> None:
    trial = SweepFolder(tmp_path).trial("one")
    for step in (9, 40, 100):
        trial.checkpoint(step).mkdir(parents=True)
    trial.partial_checkpoint(200).mkdir()
    (trial.root / "checkpoint-x").mkdir()
    assert trial.checkpoint_steps() == [9, 40, 100]
    lines = [made_up_point(step, 2.0).model_dump_json() for step in range(1, 4)]
    trial.metrics.write_text("\n".join(lines) + '\n{"step": 4, "to')
    whole = len("\n".join(lines[:3])) + 1
    assert [trial.curve_bytes(steps) for steps in (0, 3, 4)] == [0, whole, None]
    points, offset_bytes = trial.read_metrics_from(0, last_step=2)
    assert [point.step for point in points] == [1, 2]
    assert [point.step for point in trial.read_metrics_from(offset_bytes)[0]] == [3]
    trial.forget_checkpoints(but=40)
    assert trial.checkpoint_steps() == [40]
    assert not trial.partial_checkpoint(200).exists()


def test_a_curve_that_the_disk_does_not_give_is_not_taken_for_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = SweepFolder(tmp_path).trial("one")
    trial.root.mkdir(parents=True)
    assert trial.read_metrics_from(7) == ((), 0)
    trial.metrics.touch()

    def fail(file: Path) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(file))

    monkeypatch.setattr(folders, "opened", fail)
    with pytest.raises(StorageError, match=r"cannot read .*metrics\.jsonl .*Stale file handle.*mend the disk"):
        trial.read_metrics_from(7)
    # Of one that trains it is asked again; a report shows what there is.
    assert trial.read_metrics_from(7, last_step=3) == ((), 7)
    assert trial.read_metrics() == ()


def test_time_that_earlier_attempts_held_is_not_forgotten_by_the_budget() -> None:
    cancelled = made_up_trial({"rank": 8}, status=TrialStatus.CANCELLED)
    again = with_time_spent(cancelled, made_up_trial({"rank": 8}, status=TrialStatus.PENDING))
    assert again.timing.earlier_s == cancelled.timing.total_s == 80
    # Its driver was killed a second time: the record has its phases, and no total.
    killed = again.model_copy(update={"timing": again.timing.model_copy(update={"training_s": 30.0})})
    assert with_time_spent(killed, made_up_trial({"rank": 8}, status=TrialStatus.PENDING)).timing.earlier_s == 110


def test_the_pause_between_two_runs_is_no_time_at_work() -> None:
    minute_ms, first = 60_000, simulated([2.0, 2.1], 1, 0)
    now_ms = START_MS + 1000 * minute_ms
    before = Earlier(sweep(), first.model_copy(update={"ended_ms": START_MS + 30 * minute_ms}), {})
    assert at_work_s(before, now_ms) == 1800
    prepared: Any = SimpleNamespace(
        sweep=sweep(), data_hash=None, train_rows=9, eval_rows=1, rows_left_out=0, rows_too_long=()
    )
    again = opening_result(prepared, before, {}, START_MS / 1000 + 900 * 60)
    assert (again.started_ms, again.train_rows, again.eval_rows) == (START_MS, 9, 1)
    second = again.model_copy(update={"ended_ms": START_MS + 915 * minute_ms})
    assert at_work_s(replace(before, result=second), now_ms) == 1800 + 900
    assert times_of(second, 0).wall_s == 1800 + 900


def test_a_run_that_was_killed_was_at_work_until_its_last_evaluation() -> None:
    killed = simulated([2.0, 2.1], 1, 0).model_copy(update={"ended_ms": None})
    trials = {trial.trial_id: trial for trial in killed.trials}
    # Step 100, half a second each.
    now_ms = START_MS + 7_200_000
    assert at_work_s(Earlier(sweep(), killed, trials), now_ms) == 50
    # Its node's clock was ahead.
    assert at_work_s(Earlier(sweep(), killed, trials), START_MS + 20_000) == 20
    assert at_work_s(Earlier(sweep(), killed, {}), now_ms) == 0
    at_once = {"run_started_ms": START_MS + 3_600_000, "earlier_runs_s": 50.0}
    assert at_work_s(Earlier(sweep(), killed.model_copy(update=at_once), trials), now_ms) == 50


def test_the_sweeps_id_is_found_again_where_results_json_is_lost(tmp_path: Path) -> None:
    folder = write_made_up(tmp_path / "sweep", simulated([2.0], 1, 0))
    write_atomically(folder.sweep_file, to_yaml(sweep()))
    write_delivered(folder, Delivered(server="s", sweep_id="abc123"))
    for lost in (False, True):
        if lost:
            folder.results_json.unlink()
        earlier = read_earlier(folder)
        assert earlier
        assert earlier.sweep_id == "abc123"


def test_data_whose_rows_have_changed_under_the_same_name_is_refused_once_a_trial_has_trained(tmp_path: Path) -> None:
    made_up = simulated([2.0, 2.1], 1, 0)
    folder = write_made_up(tmp_path, made_up)
    write_atomically(folder.sweep_file, to_yaml(sweep()))
    earlier = read_earlier(folder)
    assert earlier is not None
    assert made_up.data_hash is not None
    require_same_data(folder, earlier, made_up.data_hash)
    with pytest.raises(FolderError, match=f"builtin:python-docs have changed since .hash {made_up.data_hash}, now b"):
        require_same_data(folder, earlier, "b")
    waiting = {name: trial.model_copy(update={"steps": 0}) for name, trial in earlier.trials.items()}
    require_same_data(folder, replace(earlier, trials=waiting), "b")
