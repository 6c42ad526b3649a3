"""A cluster of two nodes: what they must share, and trials that lie on both."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.results.records import TrialStatus
from tests.ray.clusters import Head, joined_node, nodes_of_slots, started_head
from tests.ray.sweeps import start
from tests.waiting import wait_until

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


def test_a_trial_whose_node_is_drained_is_started_again_by_us_and_not_by_ray_within_its_group(
    head: Head, tmp_path: Path
) -> None:
    with joined_node(head) as node:
        run = start(
            tmp_path,
            "--address",
            head.address,
            trial={"global_batch_size": 4, "micro_batch_size": 2, "max_steps": 150, "eval_every": 25},
            resources={"workers_per_trial": 2, "cpus_per_worker": 2},
        )
        wait_until(lambda: [trial.checkpoint_steps() for trial in run.folder.trials()], any, 200)
        # As Kubernetes does when it deletes the pod.
        node.terminate()
        node.wait(60)
    with joined_node(head):
        exit_code, _, err = run.wait()
    assert exit_code == 0, err
    (trial,) = run.trials().values()
    assert trial.status is TrialStatus.COMPLETED
    assert any(note.startswith("started again (1 of 2): a worker or its node died") for note in trial.notes)
    assert any(note.startswith("went on from step") for note in trial.notes)
    assert [point.step for point in run.folder.trial(trial.trial_id).read_metrics()] == list(range(1, 151))
