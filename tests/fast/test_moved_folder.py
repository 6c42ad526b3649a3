"""A running sweep's folder that is moved away: nothing is begun in its place, so that it can be brought back."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.config.trial_config import TrialConfig
from orchestrator.errors import StorageError
from orchestrator.results.files import write_atomically
from orchestrator.results.folders import SweepFolder
from tests.waiting import wait_until

pytest.importorskip("ray")

from orchestrator.sweep import folder_lock
from orchestrator.sweep.delivered import Delivered, write_delivered
from orchestrator.sweep.folder_lock import only_one
from orchestrator.sweep.launch import remove_in_its_place
from orchestrator.sweep.trial_files import on_this_node
from orchestrator.training.task import TrialTask, WorkerPlace


@pytest.fixture
def folder(tmp_path: Path) -> SweepFolder:
    folder = SweepFolder(tmp_path / "demo")
    folder.root.mkdir()
    folder.sweep_file.write_text("name: demo")
    return folder


def move_away(folder: SweepFolder) -> Path:
    return folder.root.rename(folder.root.with_name("moved"))


def test_no_trial_is_begun_there_until_the_folder_is_back(folder: SweepFolder) -> None:
    own = str(folder.trial("t").root)
    task = TrialTask("t", TrialConfig(), "model", str(folder.data), own, "eval_loss", "min")
    place = WorkerPlace(0, 1, 0, "host", 1, "meeting")
    moved = move_away(folder)
    with pytest.raises(StorageError, match=r"demo is gone, as where it was moved .*: bring it back"):
        on_this_node(task, place, "group")
    assert not folder.root.exists()
    moved.rename(folder.root)
    assert on_this_node(task, place, "group")[0] == task


def test_the_lease_is_not_renewed_there_and_is_again_once_the_folder_is_back(
    folder: SweepFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[Path] = []
    require = folder_lock.require_there

    def counted(path: Path) -> None:
        tries.append(path)
        require(path)

    monkeypatch.setattr(folder_lock, "require_there", counted)
    monkeypatch.setattr(folder_lock, "RENEWED_EVERY_S", 0.02)
    with only_one(folder):
        moved = move_away(folder)
        before = len(tries)
        wait_until(lambda: len(tries) > before + 3, bool, 10)
        assert not folder.root.exists()
        old = (moved / folder.lease.name).read_text()
        moved.rename(folder.root)
        wait_until(lambda: folder.lease.read_text() != old, bool, 10)


def test_what_mlflow_has_is_not_written_there(folder: SweepFolder) -> None:
    write_delivered(folder, Delivered(server="sqlite:///x", sweep_id="abc"))
    move_away(folder)
    with pytest.raises(StorageError, match="bring it back"):
        write_delivered(folder, Delivered(server="sqlite:///x", sweep_id="abc"))
    assert not folder.root.exists()


def test_tunes_own_state_goes_that_it_began_there_and_nothing_else(folder: SweepFolder) -> None:
    write_atomically(folder.tune / "state.json", "{}")
    remove_in_its_place(folder)
    assert (folder.tune / "state.json").exists(), "the sweep's own"
    move_away(folder)
    write_atomically(folder.tune / "state.json", "{}")
    remove_in_its_place(folder)
    assert not folder.root.exists()
    write_atomically(folder.trial("t").result, "{}")
    remove_in_its_place(folder)
    assert folder.trial("t").result.exists()
