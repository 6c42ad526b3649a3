"""A cluster of two nodes: what they must share, and trials that lie on both."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.results.records import TrialStatus
from tests.ray.clusters import Head, joined_node, nodes_of_slots, started_head
from tests.ray.sweeps import start

pytestmark = pytest.mark.timeout(600)
CAN_MOUNT = subprocess.run(["unshare", "--mount", "true"], check=False, capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with started_head({"RAY_AUTH_MODE": "disabled"}) as started:
        yield started


@pytest.mark.skipif(not CAN_MOUNT, reason="a node with a folder of its own takes the right to mount")
def test_a_storage_that_one_node_has_for_itself_is_refused_before_anything_starts(head: Head, tmp_path: Path) -> None:
    storage = tmp_path / "sweeps"
    storage.mkdir()
    with joined_node(head, hides=storage):
        exit_code, _, err = start(storage, "--address", head.address).wait()
    assert exit_code == 3
    assert "is not one for all 2 nodes" in err
    assert "Name a mount that all of them see with --storage" in err
    assert [file.name for file in storage.iterdir()] == ["sweep.yaml"]


def test_a_trial_that_no_single_node_has_room_for_runs_on_both_and_its_slot_beside_the_driver(
    head: Head, tmp_path: Path
) -> None:
    with joined_node(head):
        run = start(
            tmp_path,
            "--address",
            head.address,
            trial={"global_batch_size": 4, "micro_batch_size": 2, "max_steps": 2},
            space={"zero_stage": [0, 3]},
            resources={"workers_per_trial": 2, "cpus_per_worker": 2},
        )
        exit_code, _, err = run.wait()
        drivers, *slots = nodes_of_slots(head)
    assert exit_code == 0, err
    assert slots
    assert set(slots) == {drivers}
    trials = list(run.trials().values())
    assert [trial.status for trial in trials] == [TrialStatus.COMPLETED] * 2
    assert trials[0].best.eval_loss == pytest.approx(trials[1].best.eval_loss, rel=1e-5)
