"""A real MLflow server, stopped, killed and started again under a Tracker: the disk is the truth, MLflow its copy."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil
import signal
import socket
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow.store.db.utils
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.server.auth.client import AuthServiceClient
from mlflow.tracking._tracking_service.utils import _artifact_repos_cache
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.config.sweep_config import EvaluateConfig, SweepConfig, TrackingConfig
from orchestrator.config.sweep_file import to_yaml
from orchestrator.errors import TrackingUnreachableError
from orchestrator.results.evaluation import Evaluation, write_evaluation
from orchestrator.results.files import write_atomically
from orchestrator.results.folders import SweepFolder
from orchestrator.results.records import SweepResult, TrialResult, TrialStatus
from orchestrator.results.remote import Mirror, is_record, sweep_folder
from orchestrator.results.secrets import without_secret
from orchestrator.results.storage import read_sweep, write_sweep
from orchestrator.sweep import evaluation, logged_model, mlflow_patience, system_metrics
from orchestrator.sweep.delivered import Delivered, read_delivered, write_delivered
from orchestrator.sweep.delivery import deliver
from orchestrator.sweep.tracking import Tracker, awaited_tracker
from orchestrator.sweep.tracking_address import tracking_uri
from tests.made_up_sweep import made_up_point, made_up_sweep, made_up_trial, write_made_up
from tests.object_store import BUCKET, fragile_store
from tests.tracking_servers import (
    PASSWORD,
    FragileServer,
    Server,
    always,
    dripping,
    free_port,
    late_once,
    on_sqlite_with_a_login,
)
from tests.waiting import wait_until

LIMIT_S = 180.0
SWEEP_ID = "abc123"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FragileServer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        made = FragileServer(tmp_path_factory.mktemp("server"))
        try:
            made.start()
            yield made
        finally:
            made.signal(signal.SIGCONT)
            made.kill()


def a_sweep(folder: Path, uri: str | None, **keys: Any) -> tuple[SweepConfig, SweepResult, SweepFolder]:
    result = made_up_sweep([made_up_trial({"rank": rank}) for rank in (2, 4, 8, 16, 32)])
    config = SweepConfig.model_validate(
        {
            "name": folder.name,
            "model": "builtin:tiny-llama",
            "data": {"train": "builtin:python-docs"},
            "storage": str(folder),
            "tracking": {"uri": uri},
            **keys,
        }
    )
    return config, result, write_made_up(folder / "sweep", result)


def delivered(tracker: Tracker, trial: TrialResult) -> str:
    found = wait_until(lambda: tracker.run_id(trial.trial_id), bool, LIMIT_S)
    assert found
    return found


def assert_equal_to_disk(server: FragileServer | Server, folder: SweepFolder, run_ids: dict[str, str]) -> None:
    client = MlflowClient(server.uri)
    for trial_id, run_id in run_ids.items():
        points = folder.trial(trial_id).read_metrics()
        assert points
        for name in ("loss", "eval_loss", "learning_rate"):
            there = sorted((m.step, m.timestamp, m.value) for m in client.get_metric_history(run_id, name))
            here = [(p.step, p.time_ms, getattr(p, name)) for p in points if getattr(p, name) is not None]
            assert here
            assert there == sorted(here)


@pytest.mark.timeout(600)
def test_an_outage_loses_nothing_adds_nothing_and_stops_nobody(
    server: FragileServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, result, folder = a_sweep(tmp_path / "outage", server.uri)
    first, second, third, fourth, fifth = result.trials
    tracker = Tracker(config, SWEEP_ID, folder)
    runs = {}
    tracker.track(first)
    runs[first.trial_id] = delivered(tracker, first)

    # Slow without end: the server takes connections and says nothing.
    server.signal(signal.SIGSTOP)
    tracker.track(second)
    wait_until(lambda: caplog.text, lambda text: "MLflow does not answer" in text, LIMIT_S)
    server.signal(signal.SIGCONT)
    runs[second.trial_id] = delivered(tracker, second)
    assert "MLflow answers again" in caplog.text

    # Gone, and back with its database.
    server.kill()
    caplog.clear()
    tracker.track(third)
    wait_until(lambda: caplog.text, lambda text: "MLflow does not answer" in text, LIMIT_S)
    server.start()
    runs[third.trial_id] = delivered(tracker, third)

    # Gone for good: the sweep ends all the same, and knows that it was not heard.
    server.kill()
    tracker.track(fourth)
    assert not tracker.finish(3)
    assert not tracker.close_parent(result, first)
    with pytest.raises(TrackingUnreachableError) as caught:
        Tracker(config, SWEEP_ID, folder)
    assert PASSWORD not in str(caught.value) + caplog.text + folder.tracking.read_text()

    # The next run of the sweep delivers the rest, in the same runs, and knows what had arrived.
    server.start()
    kept = read_delivered(folder, f"http://127.0.0.1:{server.port}", SWEEP_ID)
    assert {trial_id: kept.trials[trial_id].run_id for trial_id in runs} == runs
    again = Tracker(config, SWEEP_ID, folder)
    assert again.parent_run_id == tracker.parent_run_id
    for trial in (first, second, third, fourth, fifth):
        again.track(trial)
    assert all(again.run_id(trial_id) == run_id for trial_id, run_id in runs.items())
    runs |= {trial.trial_id: delivered(again, trial) for trial in (fourth, fifth)}
    assert again.finish(LIMIT_S)
    assert again.close_parent(result, first)
    assert_equal_to_disk(server, folder, runs)
    everything = MlflowClient(server.uri).search_runs([again._experiment_id])
    assert len(everything) == 1 + len(result.trials)


def test_a_server_that_comes_up_late_is_waited_for_where_that_was_asked_and_told_once(
    server: FragileServer, tmp_path: Path
) -> None:
    config, result, folder = a_sweep(tmp_path / "early", server.uri)
    server.kill()
    said: list[str] = []
    with pytest.raises(TrackingUnreachableError):
        awaited_tracker(config, SWEEP_ID, folder, 0.0, said.append)
    said.clear()

    def start_it(told: str) -> None:
        said.append(told)
        server.launch()

    tracker = awaited_tracker(config, SWEEP_ID, folder, LIMIT_S, start_it)
    assert len(said) == 1
    assert "does not answer" in said[0]
    assert "waiting for it, 3 minutes at most" in said[0]
    tracker.track(result.trials[0])
    assert tracker.finish(LIMIT_S)


class Waited(Exception):
    """What a test stops a wait by."""


def starts_to_wait(tmp_path: Path, uri: str) -> bool:
    """Whether a server that cannot be had now is waited for."""

    def stop(told: str) -> None:
        raise Waited(told)

    config, _, folder = a_sweep(tmp_path / "awaited", uri)
    try:
        awaited_tracker(config, SWEEP_ID, folder, LIMIT_S, stop)
    except Waited:
        return True
    except TrackingUnreachableError:
        return False
    raise AssertionError("it can be had")


@pytest.mark.parametrize(("status", "is_awaited"), [(401, False), (403, False), (404, False), (503, True)])
def test_a_server_that_lets_nobody_in_is_not_waited_for_and_one_that_says_it_is_not_ready_is(
    tmp_path: Path, status: int, is_awaited: bool
) -> None:
    with always(status) as uri:
        assert starts_to_wait(tmp_path, uri) is is_awaited


def test_a_server_that_refuses_the_login_is_told_as_that_and_not_as_one_that_does_not_answer(tmp_path: Path) -> None:
    with always(401) as uri:
        config, _, folder = a_sweep(tmp_path / "stranger", uri)
        with pytest.raises(TrackingUnreachableError, match=r"refuses this account .*401.*set MLFLOW_TRACKING_USERNAME"):
            Tracker(config, SWEEP_ID, folder)


@pytest.mark.parametrize("body", [b'{"experiment":{"experiment_id":5}}', b'{"runs":[5]}'])
def test_a_server_that_answers_otherwise_than_mlflow_is_told_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: bytes
) -> None:
    with always(200, body) as uri:
        config, result, folder = a_sweep(tmp_path / "other", uri)
        with pytest.raises(TrackingUnreachableError, match=r"answers otherwise than MLflow does .*tracking.uri"):
            Tracker(config, SWEEP_ID, folder)

        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        write_atomically(folder.sweep_file, to_yaml(config))
        write_sweep(folder, result.model_copy(update={"ended_ms": 1, "sweep_id": SWEEP_ID}))
        write_delivered(folder, Delivered(server=uri, sweep_id=SWEEP_ID, is_complete=False))
        told = CliRunner().invoke(app, ["report", str(folder.root)])
        assert (told.exit_code, told.stderr.count("MLflow still lacks a part of this sweep")) == (0, 1)
        assert not starts_to_wait(tmp_path / "waits", uri)


def test_a_server_that_never_ends_its_answer_holds_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_patience, "WHOLE_ANSWER_LIMIT_S", 1.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with dripping() as uri:
        config, _, folder = a_sweep(tmp_path / "drips", uri)
        with pytest.raises(TrackingUnreachableError, match="no whole answer in 3 s"):
            Tracker(config, SWEEP_ID, folder)


def test_a_database_that_refuses_the_connection_is_waited_for_and_one_without_its_driver_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # MLflow's own tries take minutes.
    monkeypatch.setattr(mlflow.store.db.utils, "MAX_RETRY_COUNT", 1)
    where = f"me@127.0.0.1:{free_port()}/mlflow"
    assert starts_to_wait(tmp_path / "refused", f"postgresql+psycopg2://{where}")
    assert importlib.util.find_spec("pg8000") is None
    assert not starts_to_wait(tmp_path / "no-driver", f"postgresql+pg8000://{where}")


def test_a_server_that_is_away_is_told_of_once_though_a_trial_has_nothing_new_to_tell_it(
    server: FragileServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, result, folder = a_sweep(tmp_path / "quiet", server.uri)
    running, ended, waits = result.trials[:3]
    tracker = Tracker(config, SWEEP_ID, folder)
    tracker.track(running.model_copy(update={"status": TrialStatus.RUNNING}))
    tracker.track(ended)
    delivered(tracker, ended)
    server.kill()
    tracker.track(waits)
    away = "MLflow does not answer"
    wait_until(lambda: (tracker._failures, caplog.text.count(away)), lambda seen: max(seen) >= 2, LIMIT_S)
    assert caplog.text.count(away) == 1
    assert "answers again" not in caplog.text
    server.start()
    delivered(tracker, waits)
    assert caplog.text.count("answers again") == 1
    assert tracker.finish(LIMIT_S)


def test_report_delivers_what_the_sweep_could_not(server: FragileServer, tmp_path: Path) -> None:
    config, result, folder = a_sweep(tmp_path / "late", server.uri)
    write_atomically(folder.sweep_file, without_secret(to_yaml(config)))
    tracker = Tracker(config, SWEEP_ID, folder)
    server.kill()
    for trial in result.trials:
        tracker.track(trial)
    assert not tracker.finish(3)
    write_sweep(folder, result.model_copy(update={"ended_ms": 1, "sweep_id": SWEEP_ID}))

    away = CliRunner().invoke(app, ["report", str(folder.root)])
    assert (away.exit_code, away.stderr.count("MLflow still lacks a part of this sweep")) == (0, 1)
    assert PASSWORD not in away.output
    server.start()
    back = CliRunner().invoke(app, ["report", "--json", str(folder.root)])
    assert (back.exit_code, back.stderr.count("MLflow lacked a part of this sweep: delivered")) == (0, 1)
    json.loads(back.stdout)
    run_ids = {trial.trial_id: str(trial.mlflow_run_id) for trial in read_sweep(folder)[0].trials}
    assert_equal_to_disk(server, folder, run_ids)
    parent = MlflowClient(server.uri).get_run(tracker.parent_run_id)
    assert parent.info.status == "FINISHED"
    assert "MLflow" not in CliRunner().invoke(app, ["report", str(folder.root)]).stderr


def test_report_sends_nothing_to_a_server_that_the_folder_alone_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        uri = f"http://127.0.0.1:{elsewhere.getsockname()[1]}"
        config, result, folder = a_sweep(tmp_path / "hostile", uri)
        write_atomically(folder.sweep_file, to_yaml(config))
        write_sweep(folder, result.model_copy(update={"ended_ms": 1, "sweep_id": SWEEP_ID}))
        write_delivered(folder, Delivered(server=uri, sweep_id=SWEEP_ID, is_complete=False))
        told = CliRunner().invoke(app, ["report", str(folder.root)])
        assert told.exit_code == 0
        assert "nothing was sent there" in told.stderr
        elsewhere.settimeout(0)
        with pytest.raises(BlockingIOError):
            elsewhere.accept()


@pytest.mark.parametrize("is_copied", [False, True])
def test_a_storage_that_was_moved_or_copied_has_the_artifacts_of_its_own_database_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_copied: bool
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    old, new = tmp_path / "old" / "sweeps", tmp_path / "with space" / "sweeps"
    config, result, folder = a_sweep(old, None)
    earlier, later, *_ = result.trials
    tracker = Tracker(config, SWEEP_ID, folder)
    tracker.track(earlier)
    assert tracker.finish(LIMIT_S)
    registers_a_model(tracking_uri(config), str(tracker.run_id(earlier.trial_id)), monkeypatch)
    shutil.copytree(old, new)
    if not is_copied:
        shutil.rmtree(old)
    before = sorted(old.rglob("*"))
    # Of a run's artifacts, which another process has not.
    _artifact_repos_cache.clear()

    config = config.model_copy(update={"storage": str(new)})
    tracker = Tracker(config, SWEEP_ID, SweepFolder(new / "sweep"))
    for trial in (earlier, later):
        tracker.track(trial)
    assert tracker.finish(LIMIT_S)
    assert sorted(old.rglob("*")) == before
    for trial in (earlier, later):
        run_id = str(tracker.run_id(trial.trial_id))
        assert (new / "mlartifacts" / run_id / "artifacts" / "result.json").is_file()
        assert "result.json" in {file.path for file in MlflowClient(tracking_uri(config)).list_artifacts(run_id)}
    with contextlib.closing(sqlite3.connect(new / "mlflow.db")) as connection:
        assert [line for line in connection.iterdump() if old.as_uri() in line] == []


@pytest.mark.parametrize("is_of_an_older_release", [False, True])
def test_report_delivers_to_the_storages_own_database_wherever_the_storage_lies_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_of_an_older_release: bool
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    old, new = tmp_path / "old" / "sweeps", tmp_path / "new" / "sweeps"
    config, result, folder = a_sweep(old, None)
    write_atomically(folder.sweep_file, to_yaml(config))
    tracker = Tracker(config, SWEEP_ID, folder)
    tracker.track(result.trials[0])
    assert tracker.finish(LIMIT_S)
    write_sweep(folder, result.model_copy(update={"ended_ms": 1, "sweep_id": SWEEP_ID}))
    if is_of_an_older_release:
        kept = json.loads(folder.tracking.read_text())
        del kept["is_own"]
        folder.tracking.write_text(json.dumps(kept))
    shutil.copytree(old, new)
    if is_of_an_older_release:
        shutil.rmtree(old)
    before = sorted(old.rglob("*"))

    told = CliRunner().invoke(app, ["report", str(new / "sweep")])
    assert (told.exit_code, told.stderr.count("MLflow lacked a part of this sweep: delivered")) == (0, 1)
    assert sorted(old.rglob("*")) == before
    run_ids = {trial.trial_id: str(trial.mlflow_run_id) for trial in read_sweep(SweepFolder(new / "sweep"))[0].trials}
    assert run_ids[result.trials[0].trial_id] == tracker.run_id(result.trials[0].trial_id)
    assert_equal_to_disk(Server(f"sqlite:///{new / 'mlflow.db'}", None, None), SweepFolder(new / "sweep"), run_ids)


def test_report_takes_a_database_that_was_named_for_no_own_one_of_the_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    named = f"sqlite:///{tmp_path / 'mlflow.db'}"
    config, result, folder = a_sweep(tmp_path / "sweeps", None)
    write_atomically(folder.sweep_file, to_yaml(config))
    write_sweep(folder, result.model_copy(update={"ended_ms": 1, "sweep_id": SWEEP_ID}))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", named)
    tracker = Tracker(config, SWEEP_ID, folder)
    tracker.track(result.trials[0])
    assert tracker.finish(LIMIT_S)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    told = CliRunner().invoke(app, ["report", str(folder.root)])
    assert f"it went to {named}" in told.stderr
    assert not (tmp_path / "sweeps" / "mlflow.db").exists()


def registers_a_model(uri: str, run_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = MlflowClient(uri)
    model = client.create_logged_model(client.get_run(run_id).info.experiment_id, "model", run_id)
    client.finalize_logged_model(model.model_id, "READY")
    client.create_registered_model("model")
    with monkeypatch.context() as patch:
        # A registry in a database looks for the model there, whatever its client was told (3.17.2).
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        # What an earlier sweep of this process has set goes before.
        patch.setattr(mlflow.tracking._tracking_service.utils, "_tracking_uri", None)
        client.create_model_version("model", f"models:/{model.model_id}", run_id, model_id=model.model_id)


def test_another_server_gets_what_had_ended_before_too(server: FragileServer, tmp_path: Path) -> None:
    config, result, folder = a_sweep(tmp_path / "moved", server.uri)
    trial = result.trials[0]
    first = Tracker(config, SWEEP_ID, folder)
    first.track(trial)
    there = delivered(first, trial)
    assert first.finish(LIMIT_S)
    elsewhere = config.model_copy(update={"tracking": TrackingConfig(uri=f"sqlite:///{tmp_path / 'other.db'}")})
    second = Tracker(elsewhere, SWEEP_ID, folder)
    second.track(trial.model_copy(update={"mlflow_run_id": there}))
    run_id = delivered(second, trial)
    assert run_id != there
    assert second.finish(LIMIT_S)
    client = MlflowClient(f"sqlite:///{tmp_path / 'other.db'}")
    assert client.get_run(run_id).data.tags["status"] == "completed"


def test_a_store_of_artifacts_that_cannot_be_used_keeps_no_figure_back(
    server: FragileServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, result, folder = a_sweep(tmp_path / "artifacts", server.uri)
    log_artifact = MlflowClient.log_artifact

    def lacks_boto3(client: MlflowClient, run_id: str, file: str) -> None:
        if result.trials[0].trial_id in file:
            raise ModuleNotFoundError("No module named 'boto3'")
        log_artifact(client, run_id, file)

    monkeypatch.setattr(MlflowClient, "log_artifact", lacks_boto3)
    tracker = Tracker(config, SWEEP_ID, folder)
    for trial in result.trials[:2]:
        tracker.track(trial)
    runs = {trial.trial_id: delivered(tracker, trial) for trial in result.trials[1:2]}
    assert tracker.finish(LIMIT_S)
    assert f"MLflow refuses trial {result.trials[0].trial_id}: No module named 'boto3'" in caplog.text
    refused = tracker.run_id(result.trials[0].trial_id)
    assert refused
    assert_equal_to_disk(server, folder, {**runs, result.trials[0].trial_id: refused})


def test_a_database_that_is_none_is_told_as_damaged(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("no database at all, and longer than a header of one would be")
    config, _, folder = a_sweep(tmp_path / "broken", f"sqlite:///{tmp_path / 'mlflow.db'}")
    with pytest.raises(TrackingUnreachableError, match=r"mlflow.db is damaged .*not a database.*move it away"):
        Tracker(config, SWEEP_ID, folder)


def test_a_link_that_leads_out_of_the_sweeps_folder_is_not_sent(server: FragileServer, tmp_path: Path) -> None:
    config, result, folder = a_sweep(tmp_path / "links", server.uri)
    private = tmp_path / "id_rsa"
    private.write_text("private")
    linked, honest, *_ = result.trials
    for trial in (linked, honest):
        own = folder.trial(trial.trial_id)
        own.log.write_text("said\n")
        own.adapter.mkdir(exist_ok=True)
        (own.adapter / "adapter_model.safetensors").write_bytes(b"weights")
    folder.trial(linked.trial_id).log.unlink()
    folder.trial(linked.trial_id).log.symlink_to(private)
    (folder.trial(linked.trial_id).adapter / "key").symlink_to(private)
    tracker = Tracker(config, SWEEP_ID, folder)
    sent = {}
    for trial in (linked, honest):
        tracker.track(trial)
        run_id = delivered(tracker, trial)
        sent[trial.trial_id] = {file.path for file in MlflowClient(server.uri).list_artifacts(run_id)}
    assert sent[honest.trial_id] == {"log.txt", "result.json", "adapter"}
    assert sent[linked.trial_id] == {"result.json"}


def test_the_log_of_a_trial_whose_worker_was_lost_goes_to_mlflow_without_its_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_API_KEY", "s3cr3t-Value")
    config, _, folder = a_sweep(tmp_path / "lost", f"sqlite:///{tmp_path / 'mlflow.db'}")
    lost = made_up_trial({"rank": 2}, status=TrialStatus.PREEMPTED)
    folder.trial(lost.trial_id).log.write_bytes(b"\xff s3cr3t-Value, hf_abcdefghijklmnopqrstuv, said\n")
    tracker = Tracker(config, SWEEP_ID, folder)
    tracker.track(lost)
    assert tracker.finish(LIMIT_S)
    run_id = str(tracker.run_id(lost.trial_id))
    sent = Path(MlflowClient(str(config.tracking.uri)).download_artifacts(run_id, "log.txt", str(tmp_path)))
    assert sent.read_text() == "\ufffd [hidden], [hidden], said\n"


def test_what_a_trial_of_an_earlier_run_trained_comes_out_of_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    config, result, first = a_sweep(tmp_path / "first", uri)
    trial = result.trials[0]
    first.trial(trial.trial_id).adapter.mkdir()
    (first.trial(trial.trial_id).adapter / "adapter_model.safetensors").write_bytes(b"weights")
    address = f"s3://{BUCKET}/sweeps"
    with fragile_store() as store:
        Mirror(first.root, f"{address}/moved").push()
        # Another machine goes on with it.
        folder = sweep_folder(address, "moved")
        Mirror(folder.root, f"{address}/moved").pull(is_record)
        store.stop()
        tracker = Tracker(config, SWEEP_ID, folder)
        tracker.track(trial)
        wait_until(lambda: caplog.text, lambda text: "the sweep's storage does not answer" in text, LIMIT_S)
        assert tracker.run_id(trial.trial_id) is None
        store.start()
        assert tracker.finish(LIMIT_S)
    assert "the sweep's storage answers again" in caplog.text
    client, run_id = MlflowClient(uri), str(tracker.run_id(trial.trial_id))
    assert [file.path for file in client.list_artifacts(run_id, "adapter")] == ["adapter/adapter_model.safetensors"]
    assert client.get_run(run_id).info.status == "FINISHED"
    # No copy of it stays here, which the sweep's end would carry back.
    assert list((tmp_path / "cache").rglob("*.safetensors")) == []


def test_a_trial_that_went_on_says_how_it_ended_at_last_and_the_parent_what_is_the_best_now(tmp_path: Path) -> None:
    config, result, folder = a_sweep(tmp_path / "gone-on", f"sqlite:///{tmp_path / 'mlflow.db'}")
    client, (trial, other, *_) = MlflowClient(str(config.tracking.uri)), result.trials
    cut_off = made_up_trial({"rank": 2}, status=TrialStatus.CANCELLED).model_copy(update={"notes": ("smaller",)})
    long = other.model_copy(update={"best": made_up_point(200, 2.5)})
    tags, bests = [], []
    for ended, best in ((cut_off, long), (trial, trial.model_copy(update={"best": made_up_point(100, 2.25)}))):
        tracker = Tracker(config, SWEEP_ID, folder)
        tracker.track(ended)
        assert tracker.finish(LIMIT_S)
        run = client.get_run(str(tracker.run_id(trial.trial_id)))
        tags.append({key: run.data.tags.get(key) for key in ("status", "reason", "notes")})
        for _ in range(2):
            assert tracker.close_parent(result, best)
        parent = client.get_run(tracker.parent_run_id)
        bests.append((parent.data.metrics["best_eval_loss"], parent.data.tags["best_trial"]))
    assert tags == [
        {"status": "cancelled", "reason": cut_off.reason, "notes": "smaller"},
        {"status": "completed", "reason": None, "notes": None},
    ]
    assert bests == [(2.5, other.trial_id), (2.25, trial.trial_id)]
    told = client.get_metric_history(tracker.parent_run_id, "best_eval_loss")
    assert sorted(metric.value for metric in told) == [2.25, 2.5]


def test_a_score_that_was_measured_anew_is_the_latest_whichever_is_larger(tmp_path: Path) -> None:
    config, result, folder = a_sweep(tmp_path / "anew-scored", f"sqlite:///{tmp_path / 'mlflow.db'}")
    uri, trial = str(config.tracking.uri), result.trials[0]
    tracker = Tracker(config, SWEEP_ID, folder)
    tracker.track(trial)
    trial = trial.model_copy(update={"mlflow_run_id": delivered(tracker, trial)})
    assert tracker.finish(LIMIT_S)
    for score in (0.6, 0.6, 0.41):
        write_evaluation(
            folder.trial(trial.trial_id), Evaluation(asked=EvaluateConfig(), scores={"a/b": score}, seconds=1.0)
        )
        evaluation.log(uri, result.model_copy(update={"trials": (trial,)}), folder, pytest.fail)
    client = MlflowClient(uri)
    assert client.get_run(trial.mlflow_run_id).data.metrics["a/b"] == 0.41
    assert [metric.value for metric in client.get_metric_history(trial.mlflow_run_id, "a/b")] == [0.6, 0.41]


def test_scores_of_a_trial_whose_run_a_person_deleted_keep_no_others_back(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    config, result, folder = a_sweep(tmp_path / "scored", uri)
    client, tracker = MlflowClient(uri), Tracker(config, SWEEP_ID, folder)
    trials = []
    for trial in result.trials[:2]:
        tracker.track(trial)
        trials.append(trial.model_copy(update={"mlflow_run_id": delivered(tracker, trial)}))
        scored = Evaluation(asked=EvaluateConfig(), scores={"a/b": 0.5}, seconds=1.0)
        write_evaluation(folder.trial(trial.trial_id), scored)
    client.delete_run(str(trials[0].mlflow_run_id))
    evaluation.log(uri, result.model_copy(update={"trials": tuple(trials)}), folder, pytest.fail)
    assert client.get_run(str(trials[1].mlflow_run_id)).data.metrics["a/b"] == 0.5


def test_an_unfinished_trial_is_no_champion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, _, folder = a_sweep(tmp_path / "budget", f"sqlite:///{tmp_path / 'mlflow.db'}")
    logged: list[str] = []
    monkeypatch.setattr(logged_model, "log_best", lambda sweep, result, best, *_: logged.append(best.status.value))
    for status in (TrialStatus.CANCELLED, TrialStatus.COMPLETED):
        result = made_up_sweep([made_up_trial({"rank": 2}, status=status)])
        tracker = Tracker(config, SWEEP_ID, folder)
        tracker.track(result.trials[0])
        _, is_complete = deliver(config, result, tracker, folder, LIMIT_S, None, lambda _: None, print)
        assert is_complete
    assert logged == ["completed"]


def test_a_run_is_named_by_the_searched_settings_shortly_and_without_secrets_and_an_older_one_keeps_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "s3cr3t-Value")
    space = {"rank": [2, 4, 8], "target_modules": [["q"], ["v"]]}
    config, _, folder = a_sweep(tmp_path / "named", f"sqlite:///{tmp_path / 'mlflow.db'}", space=space)
    older, short, long = (
        made_up_trial({"rank": rank, "target_modules": modules})
        for rank, modules in ((2, ("q",)), (4, ("s3cr3t-Value", "v")), (8, ("m" * 500,)))
    )
    # As an earlier release has left it.
    client, tracker = MlflowClient(str(config.tracking.uri)), Tracker(config, SWEEP_ID, folder)
    tags = {"sweep_id": SWEEP_ID, "trial_id": older.trial_id, "mlflow.parentRunId": tracker.parent_run_id}
    there = client.create_run(tracker._experiment_id, run_name=older.trial_id, tags=tags).info.run_id
    for trial in (older, short, long):
        tracker.track(trial)
    assert tracker.finish(LIMIT_S)
    assert tracker.run_id(older.trial_id) == there
    names = {t.trial_id: client.get_run(str(tracker.run_id(t.trial_id))).info.run_name for t in (older, short, long)}
    assert names[older.trial_id] == older.trial_id
    assert names[short.trial_id] == f"rank=4 target_modules=[hidden]+v · {short.trial_id}"
    assert names[long.trial_id].startswith("rank=8 target_modules=mmm")
    assert names[long.trial_id].endswith(f"m… · {long.trial_id}")
    assert len(names[long.trial_id]) < 250


def test_what_mlflow_does_not_know_to_have_is_told_again_and_is_there_once(
    server: FragileServer, tmp_path: Path
) -> None:
    config, result, folder = a_sweep(tmp_path / "again", server.uri)
    trial = result.trials[0]
    run_ids = set()
    for loses_its_memory in (False, True):
        if loses_its_memory:
            folder.tracking.write_text("{")
        tracker = Tracker(config, SWEEP_ID, folder)
        # As after a resume on which its micro-batch had to become smaller: the logged parameter stays.
        smaller = trial.config.model_copy(update={"micro_batch_size": 1 + loses_its_memory})
        tracker.track(trial.model_copy(update={"config": smaller}))
        run_ids.add(delivered(tracker, trial))
        assert tracker.finish(LIMIT_S)
    (run_id,) = run_ids
    assert_equal_to_disk(server, folder, {trial.trial_id: run_id})
    run = MlflowClient(server.uri).get_run(run_id)
    assert (run.data.params["micro_batch_size"], run.data.tags["now.micro_batch_size"]) == ("1", "2")


def test_a_server_whose_database_is_of_yesterday_is_told_what_came_since_and_not_what_a_person_has_deleted(
    tmp_path: Path,
) -> None:
    database = tmp_path / "mlflow.db"
    config, result, folder = a_sweep(tmp_path / "restored", f"sqlite:///{database}")
    before, across, since, deleted = result.trials[:4]
    client = MlflowClient(f"sqlite:///{database}")
    tracker = Tracker(config, SWEEP_ID, folder)
    for trial in (before, deleted):
        tracker.track(trial)
    client.delete_run(delivered(tracker, deleted))
    own = folder.trial(across.trial_id)
    own.checkpoint(own.read_metrics()[0].step).mkdir()
    tracker.track(across.model_copy(update={"status": TrialStatus.RUNNING}))
    wait_until(lambda: tracker._trials[across.trial_id].offset_bytes, bool, LIMIT_S)
    delivered(tracker, before)
    dump = database.read_bytes()
    for trial in (across, since):
        tracker.track(trial)
    assert tracker.finish(LIMIT_S)

    database.write_bytes(dump)
    again = Tracker(config, SWEEP_ID, folder)
    for trial in (before, across, since, deleted):
        again.track(trial)
    assert again.finish(LIMIT_S)
    runs = {trial.trial_id: str(again.run_id(trial.trial_id)) for trial in (before, across, since)}
    assert_equal_to_disk(Server(f"sqlite:///{database}", None, None), folder, runs)
    made = client.search_runs([again._experiment_id], f"tags.trial_id = '{deleted.trial_id}'")
    assert made == []
    assert len(client.search_runs([again._experiment_id])) == 1 + len(runs)


def test_runs_that_a_person_deleted_are_told_with_what_brings_them_back_and_what_is_left_gets_a_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config, result, folder = a_sweep(tmp_path / "sweeps", None)
    write_atomically(folder.sweep_file, to_yaml(config))
    deleted, kept, later, *_ = result.trials
    tracker = Tracker(config, SWEEP_ID, folder)
    own = folder.trial(deleted.trial_id)
    own.checkpoint(own.read_metrics()[0].step).mkdir()
    tracker.track(deleted.model_copy(update={"status": TrialStatus.RUNNING}))
    tracker.track(kept)
    delivered(tracker, kept)
    client = MlflowClient(tracking_uri(config))
    run_id = str(wait_until(lambda: tracker._trials[deleted.trial_id].run_id, bool, LIMIT_S))
    for run in (run_id, tracker.parent_run_id):
        client.delete_run(run)
    tracker.track(deleted)
    assert tracker.finish(LIMIT_S)
    assert not tracker.close_parent(result, None)
    restore = f"mlflow runs restore --run-id {run_id}"
    assert (caplog.text.count("MLflow refuses trial"), caplog.text.count(restore)) == (1, 1)

    result = result.model_copy(update={"ended_ms": 1, "sweep_id": SWEEP_ID, "trials": (deleted, kept, later)})
    write_sweep(folder, result)
    told = CliRunner().invoke(app, ["report", str(folder.root)])
    assert f"delivered, without 1 trial that it refuses ({deleted.trial_id})" in told.stderr
    again = Tracker(config, SWEEP_ID, folder)
    assert again.parent_run_id != tracker.parent_run_id
    nested = client.search_runs([again._experiment_id], f"tags.mlflow.parentRunId = '{again.parent_run_id}'")
    assert {run.data.tags["trial_id"] for run in nested} == {kept.trial_id, later.trial_id}

    # What was said helps.
    said: list[str] = []
    best = deleted.model_copy(update={"mlflow_run_id": run_id})
    logged_model.log_best(config, result, best, folder, said.append)
    assert restore in said[0]
    client.restore_run(run_id)
    again.track(deleted)
    assert again.finish(LIMIT_S)
    assert again.refused() == []
    assert_equal_to_disk(Server(tracking_uri(config), None, None), folder, {deleted.trial_id: run_id})
    assert client.get_run(run_id).info.status == "FINISHED"


@pytest.mark.parametrize("last", [TrialStatus.COMPLETED, TrialStatus.CANCELLED])
def test_a_server_whose_database_is_of_yesterday_is_told_of_a_trial_that_had_ended_early_and_went_on_since(
    tmp_path: Path, last: TrialStatus
) -> None:
    database = tmp_path / "mlflow.db"
    config, result, folder = a_sweep(tmp_path / "went-on", f"sqlite:///{database}")
    trial = result.trials[0]
    own = folder.trial(trial.trial_id)
    points = own.read_metrics()
    tracker = Tracker(config, SWEEP_ID, folder)
    own.checkpoint(points[0].step).mkdir()
    tracker.track(trial.model_copy(update={"status": TrialStatus.CANCELLED}))
    delivered(tracker, trial)
    dump = database.read_bytes()
    own.checkpoint(points[-1].step).mkdir()
    tracker.track(trial.model_copy(update={"status": TrialStatus.RUNNING}))
    delivered(tracker, trial)
    ended = trial.model_copy(update={"status": last})
    tracker.track(ended)
    assert tracker.finish(LIMIT_S)

    database.write_bytes(dump)
    again = Tracker(config, SWEEP_ID, folder)
    again.track(ended)
    assert again.finish(LIMIT_S)
    run_id = str(again.run_id(trial.trial_id))
    assert_equal_to_disk(Server(f"sqlite:///{database}", None, None), folder, {trial.trial_id: run_id})
    run = MlflowClient(f"sqlite:///{database}").get_run(run_id)
    assert run.data.tags["status"] == last.value


def begins(folder: SweepFolder, trial: TrialResult, steps: int, time_ms: int) -> None:
    """Its curve anew, with a checkpoint after the last of so many steps."""
    own = folder.trial(trial.trial_id)
    own.forget_checkpoints()
    points = [
        made_up_point(step, 3 - step / 10).model_copy(update={"time_ms": time_ms + step}) for step in range(1, steps)
    ]
    own.metrics.write_text("".join(point.model_dump_json() + "\n" for point in points))
    own.checkpoint(steps - 1).mkdir()


def test_a_trial_that_begins_again_has_each_step_once_in_a_run_of_its_own(
    server: FragileServer, tmp_path: Path
) -> None:
    config, result, folder = a_sweep(tmp_path / "anew", server.uri)
    trial, ended, *_ = result.trials
    running = trial.model_copy(update={"status": TrialStatus.RUNNING})
    tracker = Tracker(config, SWEEP_ID, folder)
    tracker.track(ended)
    delivered(tracker, ended)
    for attempt in range(3):
        if attempt == 2:
            # A later run of the sweep: what the server has is known from the folder alone.
            assert tracker.finish(LIMIT_S)
            tracker = Tracker(config, SWEEP_ID, folder)
        # Each longer than what had arrived of the one before.
        begins(folder, trial, 5 + 5 * attempt, 1_000_000 * (attempt + 1))
        tracker.track(running)
        latest = runs_with(server, tracker, trial, 4 + 5 * attempt)
        assert len(latest) == 1
        assert_equal_to_disk(server, folder, {trial.trial_id: latest[0].info.run_id})
    tracker.track(trial)
    assert delivered(tracker, trial) == latest[0].info.run_id
    assert tracker.finish(LIMIT_S)


@pytest.mark.timeout(600)
def test_an_account_that_may_not_delete_leaves_the_run_of_a_trial_that_begins_again_and_makes_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with on_sqlite_with_a_login(tmp_path) as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        experiment_id = MlflowClient(server.uri).create_experiment("edited")
        accounts = AuthServiceClient(server.uri)
        accounts.create_user("editor", PASSWORD)
        accounts.grant_user_permission("editor", "experiment", experiment_id, "EDIT")
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "editor")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
        config, result, folder = a_sweep(tmp_path / "edited", server.uri)
        trial = result.trials[0]
        tracker = Tracker(config, SWEEP_ID, folder)
        for attempt in range(2):
            begins(folder, trial, 5 + 5 * attempt, 1_000_000 * (attempt + 1))
            tracker.track(trial.model_copy(update={"status": TrialStatus.RUNNING}))
            (run,) = runs_with(server, tracker, trial, 4 + 5 * attempt)
        tracker.track(trial)
        assert tracker.finish(LIMIT_S)
        assert tracker.run_id(trial.trial_id) == run.info.run_id
        assert_equal_to_disk(server, folder, {trial.trial_id: run.info.run_id})
        left = MlflowClient(server.uri).search_runs([experiment_id], "tags.kind = 'left'")
        assert [run.info.status for run in left] == ["KILLED"]
    assert "refuses" not in caplog.text


def runs_with(server: FragileServer | Server, tracker: Tracker, trial: TrialResult, steps: int) -> list[Run]:
    """The trial's runs, once the newest of them has so many steps."""
    client = MlflowClient(server.uri)

    def runs() -> list[Run]:
        return list(client.search_runs([tracker._experiment_id], f"tags.trial_id = '{trial.trial_id}'"))

    def are_there(found: list[Run]) -> bool:
        return bool(found) and len(client.get_metric_history(found[0].info.run_id, "loss")) >= steps

    return wait_until(runs, are_there, LIMIT_S)


def test_a_run_whose_making_is_answered_too_late_is_not_made_twice(
    server: FragileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES")
    with late_once(server, "/api/2.0/mlflow/runs/create", 3.0) as uri:
        config, result, folder = a_sweep(tmp_path / "slow", uri)
        tracker = Tracker(config, SWEEP_ID, folder)
        tracker.track(result.trials[0])
        delivered(tracker, result.trials[0])
        assert tracker.finish(LIMIT_S)
    made = MlflowClient(server.uri).search_runs([tracker._experiment_id])
    assert sorted(run.data.tags["kind"] for run in made) == ["sweep", "trial"]


def test_a_file_that_takes_too_long_keeps_no_other_trial_back_and_gets_more_time(
    server: FragileServer, tmp_path: Path
) -> None:
    # Twice as late as a small file is waited for.
    with late_once(server, "/log.txt", 6.0) as uri:
        config, result, folder = a_sweep(tmp_path / "large", uri)
        large, *others = result.trials
        folder.trial(large.trial_id).log.write_text("of many GB\n")
        tracker = Tracker(config, SWEEP_ID, folder)
        tracker.track(large)
        wait_until(lambda: tracker._trials[large.trial_id].late, lambda late: late >= 1, LIMIT_S)
        for trial in others:
            tracker.track(trial)
        assert tracker.finish(LIMIT_S)
    runs = {trial.trial_id: str(tracker.run_id(trial.trial_id)) for trial in result.trials}
    ended = {trial_id: MlflowClient(server.uri).get_run(run_id).info.end_time for trial_id, run_id in runs.items()}
    assert max(ended, key=lambda trial_id: ended[trial_id]) == large.trial_id
    assert_equal_to_disk(server, folder, runs)


def test_a_large_file_that_arrives_at_the_end_has_the_time_that_it_takes_and_is_told_of_once(
    server: FragileServer, tmp_path: Path
) -> None:
    with late_once(server, "/log.txt", 6.0) as uri:
        config, result, folder = a_sweep(tmp_path / "last-large", uri)
        large, other, *_ = result.trials
        a_large_log(folder, large)
        tracker = Tracker(config, SWEEP_ID, folder)
        tracker.track(large)
        wait_until(lambda: tracker._sends_files, bool, LIMIT_S)
        tracker.track(other)
        said: list[str] = []
        # Less than the file takes, and enough for the other trial on a busy machine.
        assert tracker.finish(3.0, said.append)
    assert said == ["waiting for MLflow to take 95 MiB"]
    assert MlflowClient(server.uri).get_run(str(tracker.run_id(large.trial_id))).info.status == "FINISHED"


def test_a_sweep_that_was_interrupted_waits_for_no_file_and_the_next_run_of_it_gives_a_late_one_more_time(
    server: FragileServer, tmp_path: Path
) -> None:
    with late_once(server, "/log.txt", 6.0) as uri:
        config, result, folder = a_sweep(tmp_path / "late-large", uri)
        trial = result.trials[0]
        folder.trial(trial.trial_id).log.write_text("of many GB\n")
        tracker = Tracker(config, SWEEP_ID, folder)
        tracker.track(trial)
        wait_until(lambda: tracker._sends_files, bool, LIMIT_S)
        assert not tracker.finish(0.1)
        assert tracker._sends_files
        tracker._thread.join(LIMIT_S)
        again = Tracker(config, SWEEP_ID, folder)
        again.track(trial)
        assert again._trials[trial.trial_id].late == 1
        assert again.finish(LIMIT_S)


def a_large_log(folder: SweepFolder, trial: TrialResult) -> None:
    """For which MLflow waits ten seconds more."""
    with folder.trial(trial.trial_id).log.open("wb") as log:
        log.truncate(100 * 10**6)


def test_what_comes_last_is_sent_once_more_where_its_first_answer_is_lost(
    server: FragileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, result, folder = a_sweep(tmp_path / "last", server.uri)
    trial = result.trials[0]
    tracker = Tracker(config, SWEEP_ID, folder)
    tracker.track(trial)
    trial = trial.model_copy(update={"mlflow_run_id": delivered(tracker, trial)})
    assert tracker.finish(LIMIT_S)
    with late_once(server, "/api/2.0/mlflow/runs/set-tag", 3.0) as uri:
        monkeypatch.setattr(tracker, "_client", MlflowClient(uri))
        assert tracker.close_parent(result, trial)
    write_evaluation(folder.trial(trial.trial_id), Evaluation(asked=EvaluateConfig(), scores={"a/b": 0.5}, seconds=1.0))
    said: list[str] = []
    with late_once(server, "/api/2.0/mlflow/runs/log-metric", 3.0) as uri:
        evaluation.log(uri, result.model_copy(update={"trials": (trial,)}), folder, said.append)
    assert said == []
    client = MlflowClient(server.uri)
    assert client.get_run(tracker.parent_run_id).info.status == "FINISHED"
    assert [metric.value for metric in client.get_metric_history(trial.mlflow_run_id, "a/b")] == [0.5]


def test_a_trial_that_a_failing_database_refused_is_told_once_more_at_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    database = tmp_path / "mlflow.db"
    config, result, folder = a_sweep(tmp_path / "broken", f"sqlite:///{database}")
    tracker = Tracker(config, SWEEP_ID, folder)
    whole = database.read_bytes()
    database.write_bytes(b"no database" * 1000)
    tracker.track(result.trials[0])
    wait_until(lambda: caplog.text, lambda text: "MLflow refuses" in text, LIMIT_S)
    assert "not a database" in caplog.text
    database.write_bytes(whole)
    assert tracker.finish(LIMIT_S)
    assert tracker.run_id(result.trials[0].trial_id)
    runs = MlflowClient(f"sqlite:///{database}").search_runs([tracker._experiment_id])
    assert len(runs) == 2


def test_a_database_that_fails_is_told_in_our_words_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    database = tmp_path / "tracked.db"
    config, result, folder = a_sweep(tmp_path / "failing", f"sqlite:///{database}")
    tracker = Tracker(config, SWEEP_ID, folder)
    with system_metrics.logged(tracking_uri(config), tracker.parent_run_id):
        # To MLflow the same kind of error as a lock, for which it waits 20 s.
        change(database, "ALTER TABLE metrics RENAME TO gone")
        tracker.track(result.trials[0])
        wait_until(lambda: caplog.text, lambda text: "MLflow does not answer" in text, LIMIT_S)
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")
    change(database, "ALTER TABLE gone RENAME TO metrics")
    assert tracker.finish(LIMIT_S)


def change(database: Path, statement: str) -> None:
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.execute(statement)
