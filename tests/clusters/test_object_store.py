"""A sweep whose storage is an object store, on two nodes that share no folder, one of which is lost on the way."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("moto")

from orchestrator.results import lease, remote
from orchestrator.results.folders import SweepFolder
from orchestrator.results.records import SweepResult, TrialStatus
from orchestrator.results.storage import is_at_work, read_sweep, read_trial_results
from tests.object_store import BUCKET, started_store
from tests.ray.clusters import joined_node, started_head
from tests.ray.sweeps import Run, start
from tests.ray.test_nodes import CAN_MOUNT
from tests.waiting import wait_until

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(not CAN_MOUNT, reason="a node with a folder of its own takes the right to mount"),
]
STEPS = 600
STORAGE = f"s3://{BUCKET}/sweeps"
LIMIT_S = 300.0


@dataclass(frozen=True, slots=True)
class Seen:
    """The sweep while it ran and after it."""

    folder: Path
    at_work: bool
    refused: tuple[int, str, str]
    exit_code: int
    told: str


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("store")
    (folder / "cache").mkdir()
    before = os.environ.get("ORCHESTRATOR_CACHE")
    os.environ["ORCHESTRATOR_CACHE"] = str(folder / "cache")
    with started_store():
        yield folder
    del os.environ["ORCHESTRATOR_CACHE"]
    if before is not None:
        os.environ["ORCHESTRATOR_CACHE"] = before


def start_sweep(folder: Path, *arguments: str) -> Run:
    # Each trial's worker takes a whole node, so that both work; long enough that the loss comes in the middle.
    return start(
        folder,
        "--storage",
        STORAGE,
        *arguments,
        trial={"max_steps": STEPS, "eval_every": 50},
        space={"rank": [2, 4, 8]},
        resources={"cpus_per_worker": 2, "max_concurrent": 2},
    )


def in_store() -> SweepFolder:
    return remote.opened(f"{STORAGE}/test")


def steps() -> dict[str, int]:
    """Of the trials that run, as the store has them."""
    folder = in_store()
    return {trial.root.name: len(trial.read_metrics()) for trial in folder.trials() if trial.metrics.exists()}


@pytest.fixture(scope="module")
def seen(folder: Path) -> Seen:
    with started_head({"RAY_AUTH_MODE": "disabled"}) as head:
        with joined_node(head, hides=folder / "cache"):
            run = start_sweep(folder, "--address", head.address)
            both = lambda seen: run.process.poll() is not None or (len(seen) >= 2 and all(seen.values()))  # noqa: E731
            wait_until(steps, both, LIMIT_S)
        at_work = is_at_work(in_store())
        refused = start_sweep(folder).wait()
        exit_code, _, err = run.wait()
    return Seen(folder, at_work, refused, exit_code, err)


def sweep() -> SweepResult:
    return read_sweep(in_store())[0]


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "orchestrator", *arguments], capture_output=True, text=True)


def test_a_second_run_is_refused_while_the_first_is_at_work(seen: Seen) -> None:
    assert seen.at_work
    assert seen.refused[0] == 2
    assert "another run is at work in" in seen.refused[2]
    assert lease.look(f"{STORAGE}/test") is None


def test_all_trials_end_though_a_node_was_lost(seen: Seen) -> None:
    assert seen.exit_code == 0, seen.told
    trials = sweep().trials
    assert [trial.status for trial in trials] == [TrialStatus.COMPLETED] * 3
    assert all(trial.steps == STEPS for trial in trials)


def test_the_store_has_everything_of_every_trial_and_each_step_once(seen: Seen) -> None:
    folder = in_store()
    # Their own records, from which the sweep goes on, and not only those of the sweep's table.
    records, damaged = read_trial_results(folder)
    assert not damaged
    assert [record.status for record in records.values()] == [TrialStatus.COMPLETED] * 3
    for trial in sweep().trials:
        points = folder.trial(trial.trial_id).read_metrics()
        assert [point.step for point in points] == list(range(1, STEPS + 1))
        assert folder.trial(trial.trial_id).log.exists()
        assert folder.trial(trial.trial_id).deepspeed.exists()
        remote.fetch_trial(folder, trial.trial_id)
        assert list(folder.trial(trial.trial_id).adapter.glob("*.safetensors"))
    assert folder.report.exists()
    assert folder.results_csv.exists()


def test_status_report_and_export_read_the_store(seen: Seen) -> None:
    shutil.rmtree(seen.folder / "cache" / "copies")
    told = command("status", f"{STORAGE}/test")
    assert "3 completed" in told.stdout, told.stderr
    told = command("report", f"{STORAGE}/test")
    assert "recommended" in told.stdout, told.stderr
    told = command("export", f"{STORAGE}/test", "--to", str(seen.folder / "exported"))
    assert told.returncode == 0, told.stderr
    assert (seen.folder / "exported" / "adapter_model.safetensors").exists()


def test_the_same_command_on_a_machine_that_has_nothing_runs_nothing_twice(seen: Seen) -> None:
    before = sweep()
    shutil.rmtree(seen.folder / "cache" / "copies")
    exit_code, _, err = start_sweep(seen.folder).wait()
    assert exit_code == 0, err
    assert "3 done before" in err, err
    assert sweep().sweep_id == before.sweep_id
    assert [trial.last for trial in sweep().trials] == [trial.last for trial in before.trials]


def test_no_secret_is_written_anywhere(seen: Seen) -> None:
    for file in (seen.folder / "cache" / "copies").rglob("*"):
        assert not file.is_file() or b"a-secret" not in file.read_bytes()
