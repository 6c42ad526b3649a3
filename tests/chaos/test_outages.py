"""What stands behind MLflow goes away under it, and a server that is silent while a sweep is to end."""

from __future__ import annotations

import contextlib
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from orchestrator.results.records import TrialStatus
from orchestrator.sweep.tracking import Tracker
from tests import tracking_servers
from tests.ray.sweeps import command_of, processes_of, start, trial_processes
from tests.ray.test_nodes import CAN_MOUNT
from tests.tracking_servers import PASSWORD, S3_KEYS, FragileServer, PostgreSQL
from tests.training.test_tracking_outage import SWEEP_ID, a_sweep, assert_equal_to_disk, delivered
from tests.waiting import wait_until

pytestmark = pytest.mark.timeout(1200)
LIMIT_S = 400.0
KUBERNETES_S = 30.0


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@pytest.fixture
def database() -> Iterator[PostgreSQL]:
    with tracking_servers.made_postgresql() as made:
        yield made


@pytest.mark.usefixtures("impatient")
def test_postgresql_and_s3_that_are_restarted_under_mlflow_lose_nothing_and_double_nothing(
    database: PostgreSQL, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    s3_port = tracking_servers.free_port()
    more = {**S3_KEYS, "MLFLOW_S3_ENDPOINT_URL": f"http://127.0.0.1:{s3_port}"}
    server = FragileServer(tmp_path, database.uri, "s3://mlflow", **more)
    with ExitStack() as serving:
        postgresql = serving.enter_context(ExitStack())
        s3 = serving.enter_context(ExitStack())
        postgresql.enter_context(database.running())
        s3.enter_context(tracking_servers.moto(tmp_path, s3_port))
        server.start()
        serving.callback(server.kill)
        config, result, folder = a_sweep(tmp_path / "sweeps", server.uri)
        first, second, third, *_ = result.trials
        tracker = Tracker(config, SWEEP_ID, folder)
        runs = {}
        tracker.track(first)
        runs[first.trial_id] = delivered(tracker, first)

        postgresql.close()
        tracker.track(second)
        wait_until(lambda: caplog.text, lambda text: "MLflow does not answer" in text, LIMIT_S)
        postgresql.enter_context(database.running())
        runs[second.trial_id] = delivered(tracker, second)

        caplog.clear()
        s3.close()
        tracker.track(third)
        wait_until(lambda: caplog.text, lambda text: "MLflow does not answer" in text, LIMIT_S)
        s3.enter_context(tracking_servers.moto(tmp_path, s3_port))
        runs[third.trial_id] = delivered(tracker, third)
        assert "result.json" in {f.path for f in MlflowClient(server.uri).list_artifacts(runs[third.trial_id])}

        assert tracker.finish(LIMIT_S)
        assert_equal_to_disk(server, folder, runs)
        assert len(MlflowClient(server.uri).search_runs([tracker._experiment_id])) == 4


@pytest.mark.parametrize("mlflow", ["answers", "is silent"])
def test_sigterm_ends_a_sweep_that_trains_within_kubernetes_thirty_seconds(tmp_path: Path, mlflow: str) -> None:
    (tmp_path / "server").mkdir()
    server = FragileServer(tmp_path / "server")
    server.start()
    keys = {"tracking": {"uri": server.uri}, "trial": {"max_steps": 400, "eval_every": 50}, "space": {"rank": [2, 4]}}
    try:
        run = start(tmp_path, **keys)
        wait_until(lambda: [trial.checkpoint_steps() for trial in run.folder.trials()], any, LIMIT_S)
        assert trial_processes(run)
        below = processes_of(run)
        # The tracking server's address in the sweep file has it, and everybody may list the processes of a machine.
        assert [command for command in map(command_of, below) if PASSWORD in command] == []
        if mlflow == "is silent":
            server.signal(signal.SIGSTOP)
        started_s = time.monotonic()
        run.process.send_signal(signal.SIGTERM)
        exit_code, _, err = run.wait()
        exit_s = time.monotonic() - started_s
        left = psutil.wait_procs(below, KUBERNETES_S)[1]
        gone_s = time.monotonic() - started_s
        print(f"MLflow {mlflow}: exit code {exit_code} after {exit_s:.1f} s, all processes gone after {gone_s:.1f} s")
        assert exit_code == 130, err
        assert left == []
        assert gone_s < KUBERNETES_S
        assert {trial.status for trial in run.trials().values()} <= {TrialStatus.CANCELLED, TrialStatus.COMPLETED}

        server.signal(signal.SIGCONT)
        again = start(tmp_path, **keys)
        exit_code, _, err = again.wait()
        assert exit_code == 0, err
        assert again.statuses() == ["completed"] * 2
        assert any("went on from step" in note for trial in again.trials().values() for note in trial.notes)
        runs = MlflowClient(server.uri).search_runs(["1"], "tags.kind = 'trial'")
        assert_equal_to_disk(server, again.folder, {run.data.tags["trial_id"]: run.info.run_id for run in runs})
    finally:
        server.signal(signal.SIGCONT)
        server.kill()


def test_a_server_that_is_not_there_at_the_start_starts_nothing(tmp_path: Path) -> None:
    run = start(tmp_path, tracking={"uri": f"http://127.0.0.1:{tracking_servers.free_port()}"})
    exit_code, out, err = run.wait()
    assert (exit_code, out) == (3, "")
    assert "does not answer" in err
    assert list(run.folder.trials()) == []


@pytest.mark.skipif(not CAN_MOUNT, reason="a /dev/shm of its own takes the right to mount")
def test_a_sweep_whose_shared_memory_is_full_ends_as_ever(tmp_path: Path) -> None:
    own = ["unshare", "--mount", "bash", "-c", 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"', "sweep"]
    run = start(tmp_path, within=own, trial={"max_steps": 300, "eval_every": 50}, space={"rank": [2, 4]})
    wait_until(lambda: [trial.checkpoint_steps() for trial in run.folder.trials()], any, LIMIT_S)
    shared_memory = Path(f"/proc/{run.process.pid}/root/dev/shm")
    with contextlib.suppress(OSError), (shared_memory / "full").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(2**20))
    assert shutil.disk_usage(shared_memory).free < 2**20
    exit_code, _, err = run.wait()
    assert exit_code == 0, err
    assert run.statuses() == ["completed"] * 2
