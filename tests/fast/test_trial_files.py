"""The driver's and the workers' sides of a sweep in an object store, without Ray."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("moto")

from orchestrator.config.trial_config import TrialConfig
from orchestrator.errors import FolderError, StorageError
from orchestrator.results import remote
from orchestrator.results.folders import SweepFolder, TrialFolder, checkpoint_part
from orchestrator.results.records import Suggestion, TrialResult, TrialStatus
from orchestrator.results.remote import Mirror
from orchestrator.results.storage import write_result
from orchestrator.sweep import carrier as carriers
from orchestrator.sweep.carrier import carried
from orchestrator.sweep.folder_lock import Tenure
from orchestrator.sweep.resume import useless_checkpoints
from orchestrator.sweep.trial_files import leave_nothing, on_this_node, weights_on_this_node
from orchestrator.training.task import TrialTask, WorkerPlace
from tests.object_store import BUCKET, started_store
from tests.waiting import wait_until

LIMIT_S = 60.0


@pytest.fixture(scope="module", autouse=True)
def _store() -> Iterator[None]:
    with started_store():
        yield


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SweepFolder:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path))
    folder = remote.sweep_folder(f"s3://{BUCKET}/{abs(hash(request.node.name))}", "demo")
    folder.root.mkdir(parents=True)
    folder.sweep_file.write_text("name: demo")
    folder.data.mkdir()
    (folder.data / "train.bin").write_text("tokens")
    return folder


def record(status: TrialStatus) -> TrialResult:
    return TrialResult(
        trial_id="t", configuration_id="t", status=status, config=TrialConfig(), repeat=0, seed=0, reason="told"
    )


def task_in(folder: SweepFolder) -> TrialTask:
    config = TrialConfig()
    places = {"data_folder": folder.location(folder.data), "trial_folder": folder.location(folder.trial("t").root)}
    return TrialTask("t", config, "model", best_metric="eval_loss", best_mode="min", **places)


def store_adapter(folder: SweepFolder, weights: str) -> Path:
    """By a worker; its own copy."""
    task, keep = on_this_node(task_in(folder), place(0), "group")
    adapter = TrialFolder(Path(task.trial_folder)).adapter
    adapter.mkdir(exist_ok=True)
    (adapter / "weights").write_text(weights)
    keep(0.0)
    return adapter


def place(rank: int) -> WorkerPlace:
    return WorkerPlace(rank, 2, rank, "host", 1, "meeting")


def test_what_a_worker_keeps_the_driver_has_at_the_trials_end(folder: SweepFolder, tmp_path: Path) -> None:
    with carried(folder, Tenure("")) as carrier:
        # The store had nothing of this sweep: what lay here is of another time.
        assert not folder.sweep_file.exists()
        folder.sweep_file.write_text("name: demo")
        folder.data.mkdir(exist_ok=True)
        (folder.data / "train.bin").write_text("tokens")
        write_result(folder, record(TrialStatus.PENDING))
        carrier.push()
        task, keep = on_this_node(task_in(folder), place(0), "group")
        assert (Path(task.data_folder) / "train.bin").read_text() == "tokens"
        assert Path(task.trial_folder) != folder.trial("t").root
        theirs = TrialFolder(Path(task.trial_folder))
        theirs.metrics.write_text("1")
        keep(0.0)
        write_result(folder, record(TrialStatus.RUNNING))
        carrier.track(record(TrialStatus.RUNNING))
        wait_until(folder.trial("t").metrics.exists, bool, LIMIT_S)
        theirs.metrics.write_text("12")
        for made in (theirs.adapter / "weights", theirs.checkpoint(2) / checkpoint_part(0, 1)):
            made.parent.mkdir()
            made.write_text("w")
        keep(0.0)
        carrier.fetch("t")
        assert folder.trial("t").metrics.read_text() == "12"
        assert (folder.trial("t").adapter / "weights").exists()
        # Only workers go on from it; that it is there the driver sees.
        assert list((folder.trial("t").root / "checkpoint-2").iterdir()) == []
        write_result(folder, record(TrialStatus.FAILED))
        carrier.track(record(TrialStatus.FAILED))
        leave_nothing(task_in(folder), "group")
        assert not theirs.root.exists()
    kept = remote.opened(folder.shown)
    assert b"failed" in kept.trial("t").result.read_bytes()
    assert kept.trial("t").metrics.read_text() == "12"
    assert (kept.trial("t").root / "adapter").exists()
    assert not (kept.trial("t").root / "checkpoint-2").exists()


def test_workers_of_one_node_share_a_copy_and_carry_each_file_once(folder: SweepFolder) -> None:
    (first, keep_first), (second, keep_second) = (on_this_node(task_in(folder), place(r), "group") for r in (0, 1))
    assert first.trial_folder == second.trial_folder
    ours = TrialFolder(Path(first.trial_folder))
    for file in (ours.metrics, ours.worker_log(0), ours.worker_log(1)):
        file.write_text("x")
    keep_second(0.0)
    found = remote.opened(folder.shown).trial("t").root
    assert {file.name for file in found.iterdir()} == {ours.worker_log(1).name}
    keep_first(0.0)
    found = remote.opened(folder.shown).trial("t").root
    assert {file.name for file in found.iterdir()} == {f.name for f in (ours.metrics, ours.log, ours.worker_log(1))}


def test_a_checkpoint_of_two_nodes_counts_once_both_have_stored_their_part_and_the_one_before_stays_until_then(
    folder: SweepFolder,
) -> None:
    nodes = [on_this_node(task_in(folder), replace(place(rank), local_rank=0), f"node{rank}") for rank in (0, 1)]

    def save(rank: int, step: int) -> None:
        ours, keep = TrialFolder(Path(nodes[rank][0].trial_folder)), nodes[rank][1]
        ours.checkpoint(step).mkdir()
        (ours.checkpoint(step) / checkpoint_part(rank, 2)).write_text("w")
        ours.forget_checkpoints(but=step)
        keep(0.0)

    def known() -> tuple[list[int], set[str]]:
        """As the driver sees it, and whoever goes on with the trial."""
        trial = remote.opened(folder.shown).trial("t")
        steps = trial.checkpoint_steps()
        shutil.rmtree(trial.root, ignore_errors=True)
        ours, _ = on_this_node(task_in(folder), place(0), "next")
        files = {file.relative_to(ours.trial_folder).as_posix() for file in Path(ours.trial_folder).rglob("*/*")}
        leave_nothing(task_in(folder), "next")
        return steps, files

    def parts(step: int, *ranks: int) -> set[str]:
        return {f"checkpoint-{step}/{checkpoint_part(rank, 2)}" for rank in ranks}

    save(0, 3)
    assert known() == ([], parts(3, 0))
    save(1, 3)
    assert known() == ([3], parts(3, 0, 1))
    save(0, 6)
    assert known() == ([3], parts(3, 0, 1) | parts(6, 0))
    save(1, 6)
    assert known() == ([6], parts(6, 0, 1))
    # All of it was useless, as with other settings: nothing of it stays.
    for task, keep in nodes:
        TrialFolder(Path(task.trial_folder)).forget_checkpoints()
        keep(0.0)
    assert known() == ([], set())


def test_a_trial_that_begins_with_anothers_checkpoint_finds_it_on_its_node_until_nobody_needs_it(
    folder: SweepFolder,
) -> None:
    with carried(folder, Tenure("")) as carrier:
        folder.sweep_file.write_text("name: demo")
        folder.data.mkdir(exist_ok=True)
        (folder.data / "train.bin").write_text("tokens")
        carrier.push()
        task, keep = on_this_node(task_in(folder), place(0), "group")
        left = TrialFolder(Path(task.trial_folder)).checkpoint(2)
        left.mkdir()
        (left / checkpoint_part(0, 1)).write_text("w")
        keep(0.0)
        leave_nothing(task_in(folder), "group")
        parent = record(TrialStatus.STOPPED).model_copy(
            update={"suggestion": Suggestion(number=0, settings={}, member=0)}
        )
        write_result(folder, parent)
        carrier.track(parent)
        carrier.push()
        child = replace(
            task_in(folder),
            trial_id="u",
            trial_folder=folder.location(folder.trial("u").root),
            parent_folder=folder.location(folder.trial("t").root),
            first_step=2,
        )
        here, _ = on_this_node(child, place(0), "group")
        assert here.parent_folder
        found = TrialFolder(Path(here.parent_folder)).checkpoint(2)
        assert (found / checkpoint_part(0, 1)).read_text() == "w"
        assert not (Path(here.parent_folder) / "result.json").exists()
        leave_nothing(child, "group")
        assert not found.exists()
        carrier.forget_checkpoints("t")
    kept = remote.opened(folder.shown)
    assert kept.trial("t").result.exists()
    assert not kept.trial("t").checkpoint(2).exists()


def test_a_group_has_copies_of_no_more_than_the_trial_it_is_at_and_the_one_that_it_began_with(
    folder: SweepFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin(trial_id: str, parent_id: str | None = None) -> tuple[TrialFolder, Callable[[float], None]]:
        where = {"trial_folder": folder.location(folder.trial(trial_id).root), "first_step": 2}
        parent = parent_id and folder.location(folder.trial(parent_id).root)
        task, keep = on_this_node(
            replace(task_in(folder), trial_id=trial_id, parent_folder=parent, **where), place(0), "group"
        )
        return TrialFolder(Path(task.trial_folder)), keep

    first, keep_first = begin("t")
    first.metrics.write_text("1")
    keep_first(0.0)
    begin("u")
    assert not first.root.exists()
    # Whoever is late finds nothing to carry, waits for nothing, and takes nothing from the store.
    with monkeypatch.context() as late:
        late.setattr(time, "sleep", lambda seconds: pytest.fail(f"waited {seconds} s"))
        with pytest.raises(StorageError, match=f"^{first.root}, .* was removed") as told:
            keep_first(LIMIT_S)
    assert "credentials" not in str(told.value)
    assert remote.read_text(folder.location(folder.trial("t").metrics))
    second, _ = begin("v", "u")
    assert {copy.name for copy in second.root.parent.iterdir() if copy.is_dir()} == {"u", "v"}
    begin("v")
    assert {copy.name for copy in second.root.parent.iterdir() if copy.is_dir()} == {"v"}


def test_a_worker_gives_up_a_store_that_stays_away_after_its_time(
    folder: SweepFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, keep = on_this_node(task_in(folder), place(0), "group")
    TrialFolder(Path(task.trial_folder)).metrics.write_text("1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match="cannot be written"):
        keep(0.0)


def test_nothing_is_put_into_the_store_by_a_sweep_that_did_not_start(folder: SweepFolder) -> None:
    def fail() -> None:
        with carried(folder, Tenure("")):
            raise FolderError("no")

    with pytest.raises(FolderError):
        fail()
    assert not list(remote.opened(folder.shown).root.rglob("*"))


def test_what_a_worker_stored_since_is_not_put_back_by_a_driver_that_has_an_older_copy(folder: SweepFolder) -> None:
    store_adapter(folder, "older")
    with carried(folder, Tenure("")) as carrier:
        folder.sweep_file.write_text("name: demo")
        carrier.fetch("t")
    assert (folder.trial("t").adapter / "weights").read_text() == "older"
    # On another host the trial went on, and there its sweep has ended.
    store_adapter(folder, "newer")
    with carried(folder, Tenure("")) as carrier:
        carrier.push()
        assert carrier.fetch("t")
    assert (folder.trial("t").adapter / "weights").read_text() == "newer"


def test_a_run_whose_sweep_was_taken_over_puts_nothing_into_the_store_any_more(folder: SweepFolder) -> None:
    tenure = Tenure(folder.shown)
    with carried(folder, tenure) as carrier:
        folder.sweep_file.write_text("name: demo")
        write_result(folder, record(TrialStatus.RUNNING))
        carrier.push()
        tenure.is_lost = True
        write_result(folder, record(TrialStatus.CANCELLED))
        carrier.track(record(TrialStatus.CANCELLED))
        carrier.push()
    assert b"running" in remote.opened(folder.shown).trial("t").result.read_bytes()


def test_who_hears_of_a_trial_that_ended_while_the_store_was_away_hears_it_once_its_files_are_here(
    folder: SweepFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(carriers, "RETRY_S", 0.1)
    told: list[tuple[str, bool]] = []
    metrics = folder.trial("t").metrics
    with carried(folder, Tenure("")) as carrier:
        folder.sweep_file.write_text("name: demo")
        carrier.push()
        track = carrier.once_stored(lambda record: told.append((record.status.value, metrics.exists())))
        task, keep = on_this_node(task_in(folder), place(0), "group")
        TrialFolder(Path(task.trial_folder)).metrics.write_text("1")
        keep(0.0)
        track(record(TrialStatus.RUNNING))
        with monkeypatch.context() as away:
            away.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
            assert not carrier.fetch("t")
            track(record(TrialStatus.FAILED))
        assert told == [("running", False)]
        carrier.track(record(TrialStatus.FAILED))
        wait_until(lambda: len(told), lambda count: count == 2, LIMIT_S)
    assert told[1] == ("failed", True)


def test_nobody_hears_of_an_end_that_the_store_does_not_know(
    folder: SweepFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(carriers, "RETRY_S", 0.1)
    told: list[tuple[str, bool]] = []

    def tell(record: TrialResult) -> None:
        found = remote.read_text(folder.location(folder.trial("t").result))
        told.append((record.status.value, bool(found) and record.status.value in found[0]))

    def save(status: TrialStatus) -> None:
        write_result(folder, record(status))
        carrier.track(record(status))
        track(record(status))

    with carried(folder, Tenure("")) as carrier:
        folder.sweep_file.write_text("name: demo")
        carrier.push()
        track = carrier.once_stored(tell)
        with monkeypatch.context() as away:
            away.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
            save(TrialStatus.FAILED)
            wait_until(lambda: carrier._why_away, bool, LIMIT_S)
            assert told == []
        wait_until(lambda: told, bool, LIMIT_S)
        assert told == [("failed", True)]
        # At the end of the sweep all is told before MLflow is waited for, and what that leaves to write comes after.
        save(TrialStatus.COMPLETED)
        carrier.finish()
        assert told[1:] == [("completed", True)]
        folder.results_json.write_text("{}")
    assert remote.read_text(folder.location(folder.results_json))


def test_a_store_that_stays_away_at_the_end_of_a_sweep_is_waited_for_once(
    folder: SweepFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(carriers, "RETRY_S", 0.1)
    monkeypatch.setattr(carriers, "INTERRUPTED_END_LIMIT_S", 0.5)
    told: list[TrialResult] = []

    def end() -> None:
        with carried(folder, Tenure("")) as carrier:
            folder.sweep_file.write_text("name: demo")
            carrier.push()
            monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
            write_result(folder, record(TrialStatus.COMPLETED))
            carrier.hurry()
            carrier.once_stored(told.append)(record(TrialStatus.COMPLETED))
            try:
                carrier.finish()
            finally:
                monkeypatch.setattr(Mirror, "push", lambda *_: pytest.fail("the store was asked again"))

    with pytest.raises(StorageError, match="run the same command again once it answers"):
        end()
    assert told == []


def test_while_a_sweep_runs_the_trials_that_were_written_are_carried_over_and_at_its_end_all_is(
    folder: SweepFolder,
) -> None:
    other, evaluated = folder.trial("u").result, folder.trial("v").evaluation
    with carried(folder, Tenure("")) as carrier:
        folder.sweep_file.write_text("name: demo")
        for file in (other, evaluated):
            file.parent.mkdir(parents=True)
            file.write_text("{}")
        write_result(folder, record(TrialStatus.FAILED))
        carrier.track(record(TrialStatus.FAILED))
        wait_until(lambda: remote.read_text(folder.location(folder.trial("t").result)), bool, LIMIT_S)
        assert remote.read_text(folder.location(folder.sweep_file))
        carrier.wrote("v")
        wait_until(lambda: remote.read_text(folder.location(evaluated)), bool, LIMIT_S)
        assert remote.read_text(folder.location(other)) is None
    assert remote.read_text(folder.location(other))


def test_a_copy_that_was_removed_while_the_sweep_runs_takes_nothing_from_the_store(folder: SweepFolder) -> None:
    with carried(folder, Tenure("")) as carrier:
        folder.sweep_file.write_text("name: demo")
        before = folder.trial("u")
        for file in (before.result, before.metrics, before.adapter / "weights", folder.results_json):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("{}")
        carrier.push()
        shutil.rmtree(folder.root)
        write_result(folder, record(TrialStatus.FAILED))
        carrier.track(record(TrialStatus.FAILED))
        folder.sweep_file.write_text("name: demo")
    kept = remote.opened(folder.shown)
    assert b"failed" in kept.trial("t").result.read_bytes()
    assert kept.results_json.exists()
    remote.fetch_trial(kept, "u")
    assert {file.name for file in kept.trial("u").root.rglob("*") if file.is_file()} == {
        "result.json",
        "metrics.jsonl",
        "weights",
    }


def test_a_trials_checkpoints_stay_in_the_store_until_its_final_record_is_there(
    folder: SweepFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    pull, remove = Mirror.pull, Mirror.remove
    known_at_removal: list[str] = []
    with carried(folder, Tenure("")) as carrier:
        folder.sweep_file.write_text("name: demo")
        write_result(folder, record(TrialStatus.RUNNING))

        def end_meanwhile(*arguments: Any, **more: Any) -> None:
            if not known_at_removal:
                write_result(folder, record(TrialStatus.FAILED))
                carrier.track(record(TrialStatus.FAILED))
            pull(*arguments, **more)

        def look(*arguments: Any, **more: Any) -> None:
            found = remote.read_text(folder.location(folder.trial("t").result))
            known_at_removal.append(TrialResult.model_validate_json(found[0]).status if found else "nothing")
            remove(*arguments, **more)

        monkeypatch.setattr(Mirror, "pull", end_meanwhile)
        monkeypatch.setattr(Mirror, "remove", look)
        carrier.track(record(TrialStatus.RUNNING))
        wait_until(lambda: known_at_removal, bool, LIMIT_S)
    assert set(known_at_removal) == {"failed"}


def test_a_checkpoint_that_outlived_its_trials_end_goes_with_the_next_run(folder: SweepFolder) -> None:
    def leave_checkpoint(group_id: str) -> None:
        task, keep = on_this_node(task_in(folder), place(0), group_id)
        left = TrialFolder(Path(task.trial_folder)).checkpoint(2)
        left.mkdir(exist_ok=True)
        (left / checkpoint_part(0, 1)).write_text("w")
        keep(0.0)

    stopped = record(TrialStatus.STOPPED)
    members = stopped.model_copy(update={"suggestion": Suggestion(number=0, settings={}, member=0)})
    kept = {}
    for name, ended in (("needless", stopped), ("needed", members)):
        leave_checkpoint(name)
        with carried(folder, Tenure("")) as carrier:
            folder.sweep_file.write_text("name: demo")
            useless = useless_checkpoints([ended], folder)
            write_result(folder, ended)
            carrier.push()
            for trial_id in useless:
                carrier.forget_checkpoints(trial_id)
        kept[name] = remote.opened(folder.shown).trial("t").checkpoint_steps()
    assert kept == {"needless": [], "needed": [2]}


def test_weights_that_are_evaluated_are_brought_to_the_node_and_removed_again(folder: SweepFolder) -> None:
    adapter = store_adapter(folder, "w")
    with weights_on_this_node(folder.location(folder.trial("t").adapter)) as weights:
        assert (weights / "weights").read_text() == "w"
        assert weights != adapter
    assert not weights.exists()


def test_a_folder_that_all_share_needs_nobody_to_carry(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path)
    with carried(folder, Tenure("")) as carrier:
        carrier.push()
        carrier.track(record(TrialStatus.RUNNING))
        carrier.fetch("t")
    task, keep = on_this_node(task_in(folder), place(0), "group")
    keep(0.0)
    assert task == task_in(folder)
