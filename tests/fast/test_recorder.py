from __future__ import annotations

import pickle
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("ray")

import ray
from ray.tune.experiment import Trial

from orchestrator.config.sweep_config import ObjectiveConfig
from orchestrator.results.files import write_atomically
from orchestrator.results.folders import SweepFolder, TrialFolder
from orchestrator.results.records import MetricPoint, Timing, TrialResult, TrialStatus
from orchestrator.results.storage import read_trial_results
from orchestrator.sweep import recorder as recorders
from orchestrator.sweep.closing import as_left_on_disk
from orchestrator.sweep.folder_lock import Tenure
from orchestrator.sweep.recorder import Recorder, share_names
from orchestrator.training.task import TrialProgress
from tests.made_up_sweep import made_up_point, made_up_trial


def test_alike_records_share_the_names_of_what_was_set_and_a_changed_copy_has_its_own() -> None:
    one, other = (made_up_trial({"rank": rank}) for rank in (4, 8))
    before = one.model_dump_json()
    share_names(one)
    share_names(other)
    assert one.model_fields_set is other.model_fields_set
    assert one.config.model_fields_set is other.config.model_fields_set
    assert one.model_dump_json() == before
    names = set(one.model_fields_set)
    copied = one.model_copy(update={"mlflow_run_id": "a"})
    assert "mlflow_run_id" in copied.model_fields_set
    assert one.model_fields_set == names


def test_nobody_hears_of_a_record_that_could_not_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorders, "STORAGE_LIMIT_S", 0.0)
    folder = SweepFolder(tmp_path)
    heard: list[TrialResult] = []
    recorder = Recorder(
        folder,
        {},
        0.0,
        None,
        {},
        lambda config: 0,
        lambda trial_id: True,
        ObjectiveConfig(),
        Tenure(""),
        (heard.append,),
    )
    trial = made_up_trial({"rank": 4})
    recorder.save(trial)
    assert recorder.storage_error
    assert recorder.records == {trial.trial_id: trial}
    assert heard == []
    write_atomically(folder.sweep_file, "")
    recorder.save(trial)
    assert heard == [trial]


def test_what_waits_when_a_sweep_ends_is_written_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other 10,000 take a minute, and Kubernetes gives 30 s from SIGTERM to SIGKILL."""
    folder = SweepFolder(tmp_path)
    write_atomically(folder.sweep_file, "")
    trials = [made_up_trial({"rank": rank}, status=TrialStatus.PENDING) for rank in range(1, 5)]
    both, write = threading.Barrier(2, timeout=30), recorders.write_result

    def waiting_for_another(folder: SweepFolder, record: TrialResult) -> None:
        both.wait()
        write(folder, record)

    monkeypatch.setattr(recorders, "write_result", waiting_for_another)
    heard: list[TrialResult] = []
    records = {trial.trial_id: trial for trial in trials}
    recorder = Recorder(
        folder,
        records,
        0.0,
        None,
        {},
        lambda config: 0,
        lambda trial_id: True,
        ObjectiveConfig(),
        Tenure(""),
        (heard.append,),
    )
    recorder.cancel_rest("interrupted (SIGTERM)")
    assert [(one.trial_id, one.status) for one in heard] == [(one.trial_id, TrialStatus.CANCELLED) for one in trials]
    assert read_trial_results(folder) == (recorder.records, ())


def test_of_many_records_those_that_the_disk_does_not_take_are_waited_for_and_not_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorders, "STORAGE_LIMIT_S", 0.0)
    folder = SweepFolder(tmp_path)
    write_atomically(folder.sweep_file, "")
    good, bad, late = (made_up_trial({"rank": rank}) for rank in (1, 2, 3))
    folder.trial(bad.trial_id).result.mkdir(parents=True)
    heard: list[TrialResult] = []
    recorder = Recorder(
        folder,
        {},
        0.0,
        None,
        {},
        lambda config: 0,
        lambda trial_id: True,
        ObjectiveConfig(),
        Tenure(""),
        (heard.append,),
    )
    recorder.save_all([good, bad, late])
    assert heard == [good, late]
    assert recorder.storage_error
    assert recorder.records.keys() == {good.trial_id, bad.trial_id, late.trial_id}
    lost = Tenure("")
    lost.is_lost = True
    recorder = Recorder(
        folder, {}, 0.0, None, {}, lambda config: 0, lambda trial_id: True, ObjectiveConfig(), lost, (pytest.fail,)
    )
    folder.trial(good.trial_id).result.unlink()
    recorder.save_all([good])
    assert not folder.trial(good.trial_id).result.exists()


def test_the_time_that_a_slot_held_which_died_stays_in_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(recorders, "time", SimpleNamespace(time=lambda: now, monotonic=time.monotonic))
    waiting = made_up_trial({"rank": 4}, status=TrialStatus.PENDING)
    folder = SweepFolder(tmp_path)
    write_atomically(folder.sweep_file, "")
    records = {waiting.trial_id: waiting}
    recorder = Recorder(
        folder, records, now, None, {}, lambda config: 0, lambda trial_id: True, ObjectiveConfig(), Tenure(""), ()
    )
    trial = Trial("sweep", stub=True)
    trial.config = {"trial_id": waiting.trial_id, "task": SimpleNamespace(config=waiting.config)}
    told = {"trial_config": waiting.config, "events": (), "progress": None}
    recorder.on_trial_start(1, [trial], trial)
    recorder.on_trial_result(1, [trial], trial, told | {"launched_at": now})
    now += 100
    recorder.on_trial_start(2, [trial], trial)
    recorder.on_trial_result(2, [trial], trial, told | {"launched_at": now})
    now += 50
    assert recorder.trial_seconds() == 150
    recorder.on_trial_result(3, [trial], trial, told | {"launched_at": now - 50, "status": "completed"})
    assert recorder.trial_seconds() == recorder.records[waiting.trial_id].timing.total_s == 150


def test_what_came_by_message_shares_the_names_of_its_fields_with_the_rest() -> None:
    record = made_up_trial({"rank": 4})
    came = pickle.loads(pickle.dumps(record))
    share_names(record)
    share_names(came)
    assert came == record
    assert record.best is not None
    for one, other in zip((record, record.config, record.best), (came, came.config, came.best), strict=True):
        assert all(name is its for name, its in zip(vars(one), vars(other), strict=True))


def test_a_trial_that_goes_on_has_waited_for_both_of_its_starts(tmp_path: Path) -> None:
    before = {"startup_s": 20.0, "training_s": 30.0, "total_s": 50.0}
    waiting = made_up_trial({"rank": 4}, status=TrialStatus.PENDING).model_copy(update={"timing": Timing(**before)})
    folder = SweepFolder(tmp_path)
    write_atomically(folder.sweep_file, "")
    records = {waiting.trial_id: waiting}
    recorder = Recorder(
        folder, records, 0.0, None, {}, lambda config: 0, lambda trial_id: True, ObjectiveConfig(), Tenure(""), ()
    )
    trial = Trial("sweep", stub=True)
    trial.config = {"trial_id": waiting.trial_id, "task": SimpleNamespace(config=waiting.config)}
    recorder.on_trial_start(1, [trial], trial)
    progress = told_at(made_up_point(8, 2.0), training_s=30.0 + 4.0, went_on_from=4)
    told = {"trial_config": waiting.config, "events": (), "progress": progress, "launched_at": time.time() - 22.0}
    for _ in range(2):
        recorder.on_trial_result(1, [trial], trial, told)
    timing = recorder.records[waiting.trial_id].timing
    assert timing.startup_s == pytest.approx(20.0 + 22.0 - 1.0 - 2.0 - 4.0, abs=1.0)
    recorder.on_trial_result(1, [trial], trial, told | {"status": "completed"})
    timing = recorder.records[waiting.trial_id].timing
    parts_s = sum(timing.model_dump(exclude={"queued_s", "total_s", "earlier_s"}).values())
    assert timing.total_s == pytest.approx(parts_s, abs=1.0)


@pytest.mark.parametrize("is_in_time", [True, False])
def test_a_trial_that_trains_on_until_its_stop_reaches_it_is_told_as_it_ended(
    is_in_time: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its better evaluation is in metrics.jsonl, and the adapter is of that one."""
    monkeypatch.setattr(recorders, "ray", SimpleNamespace(get=lambda answer: answer))
    waiting = made_up_trial({"rank": 4}, status=TrialStatus.PENDING)
    folder = SweepFolder(tmp_path)
    write_atomically(folder.sweep_file, "")
    own, heard_at = folder.trial(waiting.trial_id), made_up_point(20, 6.4)
    write_curve(own, heard_at)
    late = heard_at, made_up_point(40, 6.2, memory_bytes=2**31), made_up_point(45, None)

    def stop(trial_id: str, limit_s: float) -> bool:
        if is_in_time:
            write_curve(own, *late)
        return is_in_time

    board = SimpleNamespace(stop=SimpleNamespace(remote=stop))
    reason = "stopped by asha (20 steps of grace) at step 20: others were better there"
    why, records = {waiting.trial_id: reason}, {waiting.trial_id: waiting}
    recorder = Recorder(
        folder, records, 0.0, board, why, lambda config: 0, lambda trial_id: True, ObjectiveConfig(), Tenure(""), ()
    )
    trial = Trial("sweep", stub=True)
    trial.config = {"trial_id": waiting.trial_id, "task": SimpleNamespace(config=waiting.config)}
    told = {"trial_config": waiting.config, "events": (), "progress": told_at(heard_at), "done": True}
    recorder.on_trial_start(1, [trial], trial)
    recorder.on_trial_result(1, [trial], trial, told)
    if not is_in_time:
        assert recorder.records[waiting.trial_id].best == heard_at
        write_curve(own, *late)
        recorder.look_again()
    record = read_trial_results(folder)[0][waiting.trial_id]
    assert (record.status, record.reason, record.adapter) == (TrialStatus.STOPPED, reason, "adapter")
    assert (record.best, record.last) == late[1:]
    assert (record.steps, record.tokens) == (45, late[2].tokens)
    assert record.peak_memory is not None
    assert record.peak_memory.measured_bytes == 2**31


def test_what_the_workers_of_a_slot_that_died_do_until_they_have_ended_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorders, "ray", SimpleNamespace(get=lambda end: end(), exceptions=ray.exceptions))
    waiting = made_up_trial({"rank": 4}, status=TrialStatus.PENDING)
    folder = SweepFolder(tmp_path)
    write_atomically(folder.sweep_file, "")
    late = made_up_point(40, 6.2)
    ended = SimpleNamespace(remote=lambda trial_id, limit_s: lambda: write_curve(folder.trial(trial_id), late))
    records, board = {waiting.trial_id: waiting}, SimpleNamespace(abandon=ended)
    recorder = Recorder(
        folder, records, 0.0, board, {}, lambda config: 0, lambda trial_id: True, ObjectiveConfig(), Tenure(""), ()
    )
    config = {"trial_id": waiting.trial_id, "task": SimpleNamespace(config=waiting.config)}
    trial = SimpleNamespace(config=config, error_file=None)
    recorder.on_trial_start(1, [trial], trial)
    recorder.on_trial_error(1, [trial], trial)
    record = recorder.records[waiting.trial_id]
    assert (record.status, record.best, record.steps) == (TrialStatus.FAILED, late, 40)


def test_a_trial_that_was_to_go_on_and_did_not_is_told_as_the_run_before_left_it(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path)
    write_atomically(folder.sweep_file, "")
    before = made_up_trial({"rank": 4}, status=TrialStatus.RUNNING, steps=20, objective=6.4)
    late = made_up_point(40, 6.2)
    write_curve(folder.trial(before.trial_id), made_up_point(20, 6.4), late)
    waiting = {before.trial_id: before.model_copy(update={"status": TrialStatus.PENDING})}
    recorder = Recorder(
        folder, waiting, 0.0, None, {}, lambda config: 0, lambda trial_id: True, ObjectiveConfig(), Tenure(""), ()
    )
    recorder.cancel_rest("interrupted (SIGINT)")
    record = recorder.records[before.trial_id]
    assert (record.status, record.best, record.steps) == (TrialStatus.CANCELLED, late, 40)


def test_what_a_trial_left_changes_its_best_only_by_what_its_adapter_is_kept_by(tmp_path: Path) -> None:
    folder = TrialFolder(tmp_path)
    record = made_up_trial({"rank": 4}, steps=20, objective=6.4)
    worse, unevaluated = made_up_point(40, 6.5), made_up_point(45, None)
    write_curve(folder, made_up_point(20, 6.4), worse, unevaluated)
    left = as_left_on_disk(record, folder, ObjectiveConfig())
    assert (left.best, left.last) == (record.best, unevaluated)
    left = as_left_on_disk(record, folder, ObjectiveConfig(metric="eval_loss", mode="max"))
    assert left.best == worse
    # It began again at a checkpoint, and did not come as far: the adapter of the attempt before is still there.
    write_curve(folder, made_up_point(10, 6.6), made_up_point(12, None))
    left = as_left_on_disk(record, folder, ObjectiveConfig())
    assert (left.best, left.steps, left.adapter) == (record.best, 12, "adapter")
    folder.metrics.unlink()
    assert as_left_on_disk(record, folder, ObjectiveConfig()) == record


def told_at(last: MetricPoint, training_s: float = 4.0, went_on_from: int | None = None) -> TrialProgress:
    return TrialProgress(
        last=last,
        best=last,
        trainable_parameters=1,
        startup_s=0.0,
        data_s=1.0,
        model_s=2.0,
        training_s=training_s,
        evaluation_s=0.0,
        saving_s=0.0,
        peak_memory_bytes=2**30,
        reserved_bytes=None,
        memory_kind="resident",
        device="a CPU",
        host="a",
        has_adapter=True,
        went_on_from=went_on_from,
    )


def write_curve(folder: TrialFolder, *points: MetricPoint) -> None:
    folder.root.mkdir(parents=True, exist_ok=True)
    folder.metrics.write_text("".join(point.model_dump_json() + "\n" for point in points), encoding="utf-8")
