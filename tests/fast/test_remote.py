"""Sweep folders in an object store, against a real S3 server."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("moto")

from orchestrator.cli import app
from orchestrator.errors import FolderError, StorageError
from orchestrator.results import lease, remote
from orchestrator.results.folders import TrialFolder, checkpoint_part
from orchestrator.results.remote import Mirror
from orchestrator.results.storage import is_at_work
from tests.object_store import BUCKET, started_store
from tests.waiting import wait_until

LIMIT_S = 30.0


@pytest.fixture(scope="module", autouse=True)
def _store() -> Iterator[None]:
    with started_store():
        yield


@pytest.fixture
def uri(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    return f"s3://{BUCKET}/{abs(hash(request.node.name))}/demo"


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        file = folder / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def names(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def test_what_one_copy_carries_over_another_finds_and_only_changes_travel(uri: str, tmp_path: Path) -> None:
    one, other = Mirror(tmp_path / "one", uri), Mirror(tmp_path / "other", uri)
    write(one.local, plan="1", trials__a__metrics="12", trials__a__adapter__weights="w" * 100, tune__state="no")
    write(one.local, **{".lock": "no", "trials__a__.partial": "no"})
    one.push()
    other.pull()
    assert names(other.local) == {"plan", "trials/a/metrics", "trials/a/adapter/weights"}
    untouched = (other.local / "plan").stat().st_ino
    write(one.local, trials__a__metrics="123")
    one.push()
    # Not its own to write: an older file here never takes the place of a newer one there.
    other.push()
    other.pull()
    assert (other.local / "trials/a/metrics").read_text() == "123"
    assert (other.local / "plan").stat().st_ino == untouched


def test_what_is_missing_here_stays_there_and_an_exact_copy_has_nothing_else(uri: str, tmp_path: Path) -> None:
    one, other = Mirror(tmp_path / "one", uri), Mirror(tmp_path / "other", uri)
    write(one.local, a="1", b="2")
    one.push()
    (one.local / "a").unlink()
    one.push()
    write(other.local, left="of an earlier run", **{".lock": "kept"})
    other.pull(exact=True)
    assert names(other.local) == {"a", "b", ".lock"}


def test_a_reader_gets_the_records_and_an_export_the_adapter_of_its_trial(uri: str, tmp_path: Path) -> None:
    driver = Mirror(tmp_path / "driver", uri)
    write(driver.local, **{"results.json": "{}", "data__rows": "1"})
    for trial in ("a", "b"):
        write(driver.local, **{f"trials__{trial}__result.json": "{}", f"trials__{trial}__adapter__weights": "w"})
    driver.push()
    folder = remote.opened(uri)
    assert names(folder.root) == {"results.json", "trials/a/result.json", "trials/b/result.json"}
    record = folder.trial("b").result
    record.write_text("newer than the store's")
    remote.fetch_trial(folder, "b")
    assert record.read_text() == "newer than the store's"
    assert "trials/b/adapter/weights" in names(folder.root)
    assert "trials/a/adapter/weights" not in names(folder.root)
    folder.report.write_text("the answer")
    remote.publish(folder, folder.report)
    assert remote.read_text(f"{uri}/report.html")[0] == "the answer"


def test_of_a_sweep_that_lay_at_the_address_before_a_reader_sees_nothing_and_keeps_the_pages_it_made(
    uri: str, tmp_path: Path
) -> None:
    # Of unlike length: by size and the store's whole second what was written anew is known.
    for sweep, trial in (("before", "a"), ("now", "b")):
        driver = Mirror(tmp_path / sweep, uri)
        write(driver.local, **{"sweep.yaml": sweep, f"trials__{trial}__result.json": "{}"})
        write(driver.local, **{f"trials__{trial}__adapter__weights": sweep})
        driver.push()
        folder = remote.opened(uri)
        remote.fetch_trial(folder, trial)
        write(folder.root, **{"report.html": sweep, "comparison.html": sweep})
        assert folder.sweep_file.read_text() == sweep
        if sweep == "before":
            driver.remove(remote.everything)
    made = {"report.html", "comparison.html"}
    assert names(remote.opened(uri).root) == {"sweep.yaml", "trials/b/result.json", "trials/b/adapter/weights"} | made


def test_of_a_trial_whose_folder_was_removed_from_the_store_an_exact_copy_has_no_folder_either(
    uri: str, tmp_path: Path
) -> None:
    driver = Mirror(tmp_path / "driver", uri)
    for trial in ("removed", "kept"):
        of_checkpoint = f"trials__{trial}__checkpoint-3__{checkpoint_part(0, 1)}"
        write(driver.local, **{f"trials__{trial}__result.json": "{}", f"trials__{trial}__adapter__weights": "w"})
        write(driver.local, **{of_checkpoint: "w"})
    driver.push()
    folder = remote.opened(uri)
    remote.fetch_trial(folder, "removed")
    driver.remove(remote.everything, under="trials/removed")
    folder = remote.opened(uri)
    assert [trial.root.name for trial in folder.trials()] == ["kept"]
    assert folder.trial("kept").checkpoint_steps() == [3]


@pytest.mark.parametrize(
    ("last", "others"),
    [
        ("results.json", ("trials/a/result.json", "sweep.yaml")),
        (f"checkpoint-3/{checkpoint_part(0, 1)}", ("metrics.jsonl", "adapter/weights")),
    ],
)
def test_what_speaks_of_other_files_is_stored_after_them(
    last: str, others: tuple[str, ...], uri: str, tmp_path: Path
) -> None:
    one = Mirror(tmp_path / "one", uri)
    for name in (last, *others):
        write(one.local, **{name: "1"})
    # None of the others arrives: a link that opens, and whose first byte is an input/output error.
    for name in others:
        (one.local / name).unlink()
        (one.local / name).symlink_to("/proc/self/mem")
    with pytest.raises(StorageError):
        one.push()
    assert remote.read_text(f"{uri}/{last}") is None


class Around:
    """The store, but for what a test does to it."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


class CutShort(Around):
    """The store on a line that breaks: so many files arrive as a half."""

    def __init__(self, store: Any, times: int) -> None:
        super().__init__(store)
        self._left = times

    def open_input_stream(self, path: str) -> Any:
        whole = self._store.open_input_stream(path)
        if not self._left:
            return whole
        self._left -= 1
        content = whole.read()
        return io.BytesIO(content[: len(content) // 2])


def test_a_file_that_arrives_in_part_is_fetched_again_and_never_taken_for_the_whole(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = Mirror(tmp_path / "one", uri), Mirror(tmp_path / "other", uri)
    write(one.local, a="0123456789")
    one.push()
    real = remote.store(uri)
    for times, arrives in ((remote.ATTEMPTS, False), (1, True)):
        cutting = CutShort(real, times)
        with monkeypatch.context() as cut:
            cut.setattr(remote, "store", lambda _, cutting=cutting: cutting)
            if arrives:
                other.pull()
            else:
                with pytest.raises(StorageError, match="of a 5 bytes arrived where it has 10"):
                    other.pull()
        assert names(other.local) == ({"a"} if arrives else set())
    assert (other.local / "a").read_text() == "0123456789"


class Replacing(Around):
    """The store, where a file is written anew as soon as it has been opened, once."""

    def __init__(self, store: Any, replace: Callable[[], None]) -> None:
        super().__init__(store)
        self._replace = replace

    def open_input_stream(self, path: str) -> Any:
        stream = self._store.open_input_stream(path)
        self._replace()
        self._replace = lambda: None
        return stream


def test_a_file_that_is_written_anew_while_it_is_fetched_arrives_as_it_is_then_and_is_not_cut(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = Mirror(tmp_path / "one", uri), Mirror(tmp_path / "other", uri)
    write(one.local, a="older")
    one.push()
    write(one.local, a="newer, and longer")
    replacing = Replacing(remote.store(uri), one.push)
    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(remote, "store", lambda _: replacing)
        other.pull()
    assert (other.local / "a").read_text() == "newer, and longer"


class BrokenBut(Around):
    """The store, of which one file arrives and then no other."""

    def __init__(self, store: Any, arrives: Path) -> None:
        super().__init__(store)
        self._arrives = arrives

    def open_input_stream(self, path: str) -> Any:
        if path.endswith(f"/{self._arrives.name}"):
            return self._store.open_input_stream(path)
        wait_until(self._arrives.exists, bool, LIMIT_S)
        raise OSError("broken")


def test_what_arrived_before_the_store_failed_is_not_put_back_over_what_is_newer_there(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = Mirror(tmp_path / "one", uri), Mirror(tmp_path / "other", uri)
    write(one.local, a="1", b="older")
    one.push()
    real = remote.store(uri)
    with monkeypatch.context() as breaking:
        breaking.setattr(remote, "store", lambda _: BrokenBut(real, other.local / "b"))
        with pytest.raises(StorageError, match="broken"):
            other.pull()
    write(one.local, b="newer than that")
    one.push()
    other.push()
    assert remote.read_text(f"{uri}/b")[0] == "newer than that"


def test_a_copy_names_the_checkpoints_that_the_store_has_and_no_other(uri: str, tmp_path: Path) -> None:
    worker, driver = Mirror(tmp_path / "worker", f"{uri}/trials/a"), Mirror(tmp_path / "driver", uri)
    ours, known = TrialFolder(worker.local), TrialFolder(driver.local / "trials" / "a")
    for step in (3, 6):
        write(ours.checkpoint(step), **{checkpoint_part(0, 1): "w"})
    worker.push()
    driver.pull(remote.is_record, under="trials/a")
    assert known.checkpoint_steps() == [3, 6]
    # The last one is damaged: it goes on from the one before.
    ours.forget_checkpoints(but=3)
    worker.push()
    driver.pull(remote.is_record, under="trials/a")
    assert known.checkpoint_steps() == [3]
    ours.forget_checkpoints()
    worker.push()
    driver.pull(remote.is_record, exact=True)
    assert known.checkpoint_steps() == []


def test_a_file_that_cannot_be_read_to_its_end_is_not_stored_in_part(uri: str, tmp_path: Path) -> None:
    one = Mirror(tmp_path / "one", uri)
    write(one.local, a="1", b="2")
    one.push()
    (one.local / "a").unlink()
    # It opens, and its first byte is an input/output error.
    (one.local / "a").symlink_to("/proc/self/mem")
    with pytest.raises(StorageError, match="Input/output error"):
        one.push()
    assert remote.read_text(f"{uri}/a") is None
    (one.local / "a").unlink()
    write(one.local, a="3")
    one.push()
    assert remote.read_text(f"{uri}/a")[0] == "3"


@pytest.mark.parametrize("where", ["s3://bucket/../x", "s3://key:secret@bucket/x", "gs://bucket/x", "s3://"])
def test_an_address_that_cannot_be_used_is_refused(where: str) -> None:
    with pytest.raises(FolderError, match="takes a folder"):
        remote.opened(where)


def test_a_store_that_does_not_answer_is_told_with_what_to_check(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert remote.access_problem(uri) is None
    assert "NO_SUCH_BUCKET" in remote.access_problem("s3://no-such-bucket/x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match="AWS_ENDPOINT_URL"):
        remote.opened(uri)


def test_doctor_tries_the_store(uri: str) -> None:
    good = CliRunner().invoke(app, ["doctor", "--json", "--storage", uri])
    assert good.exit_code == 0
    assert next(check for check in json.loads(good.stdout)["checks"] if check["what"].startswith("storage"))["ok"]
    bad = CliRunner().invoke(app, ["doctor", "--storage", "s3://no-such-bucket/x"])
    assert bad.exit_code == 3
    assert "NO_SUCH_BUCKET" in bad.stdout


def test_of_two_runs_in_one_folder_the_second_is_refused_until_the_first_has_ended(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A store tells whole seconds, and by them it is seen that the lease is renewed.
    monkeypatch.setattr(lease, "BEAT_S", 2.5)
    monkeypatch.setattr(lease, "LOOK_S", 0.2)
    folder = remote.opened(uri)
    with lease.held(uri, pytest.fail):
        assert is_at_work(folder)
        with pytest.raises(FolderError, match="another run is at work"), lease.held(uri, pytest.fail):
            pass
    assert not is_at_work(folder)
    with lease.held(uri, pytest.fail):
        pass


def test_a_dead_owner_of_this_machine_is_given_up_at_once_and_one_elsewhere_after_its_silence(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    remote.write_text(f"{uri}/.lease", f"token {socket.gethostname()} {gone.pid}")
    assert not lease.look(uri).is_alive
    remote.write_text(f"{uri}/.lease", "token elsewhere 1")
    assert lease.look(uri).is_alive
    monkeypatch.setattr(lease, "LAPSE_S", 0.0)
    with lease.held(uri, pytest.fail):
        assert str(os.getpid()) in lease.look(uri).owner


@pytest.mark.parametrize("found", [b"", b"a-machine", b"token elsewhere 99999999999999", b"a b c", b"\xff\xfe"])
def test_what_is_no_lease_holds_no_folder(uri: str, found: bytes) -> None:
    with remote.store(uri).open_output_stream(f"{uri.removeprefix(remote.SCHEME)}/.lease") as target:
        target.write(found)
    assert not is_at_work(remote.opened(uri))
    with lease.held(uri, pytest.fail):
        assert is_at_work(remote.opened(uri))


def test_a_run_that_died_elsewhere_a_moment_ago_is_waited_for_until_it_is_given_up(
    uri: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lease, "LOOK_S", 0.2)
    monkeypatch.setattr(lease, "LAPSE_S", 3.0)
    remote.write_text(f"{uri}/.lease", "token elsewhere 1")
    with lease.held(uri, pytest.fail):
        assert str(os.getpid()) in lease.look(uri).owner
    assert "a run on elsewhere was at work" in caplog.text


def test_an_owner_whose_lease_was_taken_is_told(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.05)
    told: list[float] = []
    with lease.held(uri, lambda: told.append(time.monotonic())):
        remote.write_text(f"{uri}/.lease", "another elsewhere 1")
        deadline = time.monotonic() + LIMIT_S
        while not told:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert remote.read_text(f"{uri}/.lease")[0] == "another elsewhere 1"


def test_names_that_are_hidden_or_tunes_own_are_records_of_nobody() -> None:
    assert remote.is_record(PurePosixPath("plan.json"))
    assert remote.is_record(PurePosixPath("trials/a/log.txt"))
    assert not remote.is_record(PurePosixPath("trials/a/adapter/x"))
    assert not remote.is_record(PurePosixPath("data/train.npy"))
