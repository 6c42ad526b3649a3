"""Who hears that a sweep has ended: a webhook, and callbacks of other packages."""

from __future__ import annotations

import json
import socket
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import ClassVar

import pytest
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.errors import ClusterUnreachableError, InputError
from orchestrator.reporting import findings
from orchestrator.results.provenance import ui_command
from orchestrator.results.records import SweepResult, TrialResult, TrialStatus
from orchestrator.sweep import notification
from orchestrator.sweep.callbacks import GROUP, Callback, Callbacks
from tests.made_up_sweep import made_up_sweep, made_up_trial, simulated, write_made_up
from tests.webhook import webhook


def test_a_webhook_is_told_the_answer_and_where_to_look(tmp_path: Path) -> None:
    folder = write_made_up(tmp_path / "sweep", simulated([2.5, 2.5], 3, seed=0))
    report = findings.build(folder)
    sweep = report.sweep.model_copy(update={"mlflow_run_id": "run17"})
    said: list[str] = []
    with webhook() as (url, told):
        body = notification.end_of(
            _with(report, sweep), "s3://bucket/made-up/report.html", 0, "https://me:secret@mlflow:5000/"
        )
        notification.post(url, body, said.append)
    assert said == []
    (got,) = told
    assert got["name"] == "made-up"
    assert got["status"] == "completed"
    assert got["answer"] == report.recommendation.answer
    assert got["answer"] in got["text"]
    assert got["trials"] == {"completed": 6}
    assert got["report"] == "s3://bucket/made-up/report.html"
    assert got["mlflow"] == "https://mlflow:5000/#/runs/run17"
    assert "secret" not in json.dumps(got)


def _with(report: findings.Report, sweep: SweepResult) -> findings.Report:
    from dataclasses import replace

    return replace(report, sweep=sweep)


def test_a_webhook_that_fails_is_said_without_its_address_and_nothing_else_happens() -> None:
    said: list[str] = []
    with webhook(status=500) as (url, _):
        notification.post(url, {"name": "made-up"}, said.append)
    notification.post(url, {"name": "made-up"}, said.append)
    assert len(said) == 2
    assert "Internal Server Error" in said[0]
    assert "refused" in said[1]
    assert all("127.0.0.1" in line and "secret-token" not in line for line in said)


def test_a_webhook_that_never_answers_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notification, "LIMIT_S", 0.3)
    said: list[str] = []
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        notification.post(f"http://127.0.0.1:{silent.getsockname()[1]}/hook", {}, said.append)
    assert len(said) == 1


def test_a_sweep_that_could_not_go_on_is_told_with_its_reason() -> None:
    error = ClusterUnreachableError("the cluster at ray://me:secret@head:10001 does not answer: start it")
    body = notification.failure_of("made-up", "/sweeps/made-up/report.html", error)
    assert body["status"] == "failed"
    assert "does not answer" in body["error"]
    assert "secret" not in json.dumps(body)


@pytest.mark.parametrize(
    ("storage", "page"),
    [("sweeps", "{home}/sweeps/smoke/report.html"), ("s3://bucket/sweeps", "s3://bucket/sweeps/smoke/report.html")],
)
def test_a_job_tells_where_the_report_of_its_sweep_lies_once_its_own_folders_are_gone(
    storage: str, page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = pytest.importorskip("orchestrator.sweep.cluster")
    monkeypatch.setenv(cluster.JOB, "{}")
    monkeypatch.setenv("HOME", str(tmp_path))
    with webhook() as (url, told):
        words = ["run", "search_spaces/smoke.yaml", "--storage", storage, "--notify", url]
        result = CliRunner().invoke(app, [*words, "--set", "tracking.uri=nowhere://"])
    assert result.exit_code == 2, result.stderr
    assert [body["report"] for body in told] == [page.format(home=tmp_path)]


@pytest.mark.parametrize("url", ["", "example.com/hook", "ftp://example.com", "https://", "http://host:port/"])
def test_an_address_that_cannot_be_told_is_refused_before_anything_starts(url: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--notify"):
        notification.address_of(url)
    words = ["run", "search_spaces/smoke.yaml", "--storage", str(tmp_path), "--notify", url]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert "--notify" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_address_may_stand_in_a_file_so_that_no_list_of_processes_shows_it(tmp_path: Path) -> None:
    file = tmp_path / "webhook.txt"
    file.write_text("https://example.com/hook/secret-token\n")
    assert notification.address_of(f"@{file}") == "https://example.com/hook/secret-token"
    with pytest.raises(InputError, match="nowhere"):
        notification.address_of("@nowhere.txt")
    file.write_text("example.com/secret-token")
    with pytest.raises(InputError, match="--notify") as caught:
        notification.address_of(f"@{file}")
    assert "secret-token" not in str(caught.value)


def test_an_address_is_read_from_a_small_file_alone(tmp_path: Path) -> None:
    large = tmp_path / "large.txt"
    large.write_text("https://example.com/" + "x" * 5000)
    for given in ("/dev/zero", tmp_path, large):
        with pytest.raises(InputError, match="is no file of at most 4 KB"):
            notification.address_of(f"@{given}")


class Listener(Callback):
    """Keeps what it hears."""

    heard: ClassVar[list[str]] = []

    def trial_ended(self, trial: TrialResult) -> None:
        self.heard.append(f"{trial.trial_id} {trial.status}")

    def sweep_ended(self, sweep: SweepResult, folder: Path) -> None:
        self.heard.append(f"{sweep.name} in {folder.name}")


class Clumsy(Callback):
    """Raises at everything."""

    def trial_ended(self, trial: TrialResult) -> None:
        raise RuntimeError("no pager")

    def sweep_ended(self, sweep: SweepResult, folder: Path) -> None:
        raise KeyError("name")


def test_callbacks_hear_of_every_end_once_whatever_others_raise() -> None:
    Listener.heard.clear()
    points = [EntryPoint(name.lower(), f"{__name__}:{name}", GROUP) for name in ("Clumsy", "Missing", "Listener")]
    said: list[str] = []
    callbacks = Callbacks(said.append, (), points)
    trial = made_up_trial({"rank": 8})
    for status in (TrialStatus.PENDING, TrialStatus.RUNNING, TrialStatus.COMPLETED, TrialStatus.COMPLETED):
        callbacks.track(trial.model_copy(update={"status": status}))
    callbacks.sweep_ended(made_up_sweep([trial]), Path("sweeps/made-up"))
    assert Listener.heard == [f"{trial.trial_id} completed", "made-up in made-up"]
    assert [line.split(":")[0] for line in said] == ["callback missing", "callback clumsy", "callback clumsy"]
    assert "no pager" in said[1]


def test_callbacks_hear_of_no_end_of_an_earlier_run_whose_record_is_written_once_more() -> None:
    Listener.heard.clear()
    ended = made_up_trial({"rank": 8})
    refused = made_up_trial({"rank": 16}, status=TrialStatus.INFEASIBLE)
    waits = made_up_trial({"rank": 32}, status=TrialStatus.PENDING)
    callbacks = Callbacks(pytest.fail, (ended, refused, waits), [EntryPoint("listener", f"{__name__}:Listener", GROUP)])
    for trial in (ended, refused):
        callbacks.track(trial.model_copy(update={"mlflow_run_id": "run17"}))
    callbacks.track(made_up_trial({"rank": 32}, status=TrialStatus.CANCELLED))
    assert Listener.heard == [f"{waits.trial_id} cancelled"]


def test_runs_in_a_file_are_told_with_the_command_that_shows_them_and_those_of_a_server_are_not() -> None:
    assert ui_command("sqlite:///sweeps/mlflow.db") == "mlflow ui --backend-store-uri sqlite:///sweeps/mlflow.db"
    assert (
        ui_command("sqlite:///my sweeps/mlflow.db") == "mlflow ui --backend-store-uri 'sqlite:///my sweeps/mlflow.db'"
    )
    assert ui_command("http://mlflow:5000") is None
