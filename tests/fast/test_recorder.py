from __future__ import annotations

import pickle
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("ray")

from ray.tune.experiment import Trial

from orchestrator.results.files import write_atomically
from orchestrator.results.folders import SweepFolder
from orchestrator.results.records import Timing, TrialResult, TrialStatus
from orchestrator.results.storage import read_trial_results
from orchestrator.sweep import recorder as recorders
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
    recorder = Recorder(folder, {}, 0.0, None, {}, lambda config: 0, lambda trial_id: True, Tenure(""), (heard.append,))
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
        folder, records, 0.0, None, {}, lambda config: 0, lambda trial_id: True, Tenure(""), (heard.append,)
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
    recorder = Recorder(folder, {}, 0.0, None, {}, lambda config: 0, lambda trial_id: True, Tenure(""), (heard.append,))
    recorder.save_all([good, bad, late])
    assert heard == [good, late]
    assert recorder.storage_error
    assert recorder.records.keys() == {good.trial_id, bad.trial_id, late.trial_id}
    lost = Tenure("")
    lost.is_lost = True
    recorder = Recorder(folder, {}, 0.0, None, {}, lambda config: 0, lambda trial_id: True, lost, (pytest.fail,))
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
    recorder = Recorder(folder, records, now, None, {}, lambda config: 0, lambda trial_id: True, Tenure(""), ())
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
    recorder = Recorder(folder, records, 0.0, None, {}, lambda config: 0, lambda trial_id: True, Tenure(""), ())
    trial = Trial("sweep", stub=True)
    trial.config = {"trial_id": waiting.trial_id, "task": SimpleNamespace(config=waiting.config)}
    recorder.on_trial_start(1, [trial], trial)
    progress = TrialProgress(
        last=made_up_point(8, 2.0),
        best=None,
        trainable_parameters=1,
        startup_s=0.0,
        data_s=1.0,
        model_s=2.0,
        training_s=30.0 + 4.0,
        evaluation_s=0.0,
        saving_s=0.0,
        peak_memory_bytes=2**30,
        reserved_bytes=None,
        memory_kind="resident",
        device="a CPU",
        host="a",
        has_adapter=True,
        went_on_from=4,
    )
    told = {"trial_config": waiting.config, "events": (), "progress": progress, "launched_at": time.time() - 22.0}
    for _ in range(2):
        recorder.on_trial_result(1, [trial], trial, told)
    timing = recorder.records[waiting.trial_id].timing
    assert timing.startup_s == pytest.approx(20.0 + 22.0 - 1.0 - 2.0 - 4.0, abs=1.0)
    recorder.on_trial_result(1, [trial], trial, told | {"status": "completed"})
    timing = recorder.records[waiting.trial_id].timing
    parts_s = sum(timing.model_dump(exclude={"queued_s", "total_s", "earlier_s"}).values())
    assert timing.total_s == pytest.approx(parts_s, abs=1.0)
