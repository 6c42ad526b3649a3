"""Two runs in one folder: on this host, on another, and after one that died."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from filelock import FileLock

from orchestrator.errors import FolderError
from orchestrator.results.folders import SweepFolder
from orchestrator.results.storage import DEAD_AFTER_S, is_at_work
from orchestrator.sweep import folder_lock
from orchestrator.sweep.folder_lock import only_one
from tests.waiting import wait_until


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SweepFolder:
    monkeypatch.setattr(folder_lock, "RENEWED_EVERY_S", 0.1)
    monkeypatch.setattr(folder_lock, "DEAD_AFTER_S", 1.0)
    (tmp_path / "sweep.yaml").touch()
    return SweepFolder(tmp_path)


def test_a_second_run_on_the_same_host_is_refused_at_once(folder: SweepFolder) -> None:
    with only_one(folder), pytest.raises(FolderError, match="another run is at work"), only_one(folder):
        pass
    with only_one(folder):
        assert folder.lease.exists()
    assert not folder.lease.exists()


def test_a_run_on_another_host_is_seen_by_its_lease_where_the_mount_keeps_locks_to_each_host(
    folder: SweepFolder,
) -> None:
    with only_one(folder, host="one"):
        # What a mount with local locks does: the other host sees a free one.
        folder.lock.unlink()
        with pytest.raises(FolderError, match=r"at work .* on host one"), only_one(folder, host="two"):
            pass


def test_a_run_on_another_host_whose_lock_is_not_seen_here_is_at_work_as_long_as_it_renews_its_lease(
    folder: SweepFolder,
) -> None:
    for host, at_work in (("elsewhere", True), (socket.gethostname(), False)):
        with only_one(folder, host):
            # What a mount with local locks does: this host sees a free one.
            folder.lock.unlink()
            folder.lock.touch()
            assert is_at_work(folder) == at_work
    folder.lease.write_text(json.dumps({"host": "gone", "owner": "gone 1", "renewals": 7}))
    assert is_at_work(folder)
    long_ago_s = time.time() - DEAD_AFTER_S
    os.utime(folder.lease, (long_ago_s, long_ago_s))
    assert not is_at_work(folder)


def test_an_owner_that_died_on_another_host_is_waited_for_once(folder: SweepFolder) -> None:
    folder.lease.write_text(json.dumps({"host": "gone", "owner": "gone 1", "renewals": 7}))
    started = time.monotonic()
    with only_one(folder, host="here"):
        assert 1.0 <= time.monotonic() - started < 10
        assert json.loads(folder.lease.read_text())["host"] == "here"


def test_an_owner_that_ends_meanwhile_is_not_waited_for_any_longer(
    folder: SweepFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_lock, "DEAD_AFTER_S", 60.0)
    folder.lease.write_text(json.dumps({"host": "other", "owner": "other 1", "renewals": 7}))
    threading.Timer(0.2, folder.lease.unlink).start()
    with only_one(folder, host="here"):
        pass


def test_a_killed_owner_on_this_host_is_no_hindrance(folder: SweepFolder) -> None:
    code = f"""
import os, signal
from pathlib import Path
from orchestrator.results.folders import SweepFolder
from orchestrator.sweep.folder_lock import only_one
from tests.waiting import wait_until
with only_one(SweepFolder(Path({str(folder.root)!r}))):
    while not SweepFolder(Path({str(folder.root)!r})).lease.exists():
        pass
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert folder.lease.exists()
    with only_one(folder):
        pass


def test_a_run_that_was_given_up_notices_that_another_goes_on_and_leaves_its_lease_alone(
    folder: SweepFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    signals: list[int] = []
    monkeypatch.setattr(folder_lock.os, "kill", lambda pid, number: signals.append(number))
    theirs = json.dumps({"host": "two", "owner": "two 1", "renewals": 0})
    with only_one(folder, host="one") as tenure:
        tenure.require()
        folder.lease.write_text(theirs)
        wait_until(lambda: signals, bool, 10)
        with pytest.raises(FolderError, match=r"another run has taken .* over"):
            tenure.require()
    assert signals == [signal.SIGTERM]
    assert folder.lease.read_text() == theirs


def test_a_lock_that_a_server_keeps_for_a_host_that_is_gone_is_no_hindrance_once_its_lease_stands_still(
    folder: SweepFolder,
) -> None:
    with FileLock(folder.lock):
        folder.lease.write_text(json.dumps({"host": "gone", "owner": "gone 1", "renewals": 7}))
        with only_one(folder, host="here"):
            assert json.loads(folder.lease.read_text())["host"] == "here"
            # And it keeps others out as ever.
            with pytest.raises(FolderError, match="another run is at work"), only_one(folder, host="here"):
                pass


def test_a_lock_of_another_host_whose_lease_is_renewed_is_respected(folder: SweepFolder) -> None:
    with (
        only_one(folder, host="one"),
        pytest.raises(FolderError, match=r"at work .* on host one"),
        only_one(folder, host="two"),
    ):
        pass


def test_results_are_not_removed_though_their_sweep_file_has_gone(tmp_path: Path) -> None:
    made = SweepFolder(tmp_path / "new")
    with only_one(made):
        made.results_json.write_text("{}")
    assert made.results_json.exists()
    with only_one(SweepFolder(tmp_path / "unused")):
        pass
    assert not (tmp_path / "unused").exists()


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"host": 3}'])
def test_a_damaged_lease_is_no_traceback(folder: SweepFolder, text: str) -> None:
    folder.lease.write_text(text)
    with only_one(folder):
        pass
