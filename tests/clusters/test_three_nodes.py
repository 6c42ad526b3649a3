"""Three nodes that share a network and a storage, as machines do: trials on all of them, and one is lost on the way."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("moto")

from orchestrator.results import remote
from orchestrator.results.folders import SweepFolder
from orchestrator.results.records import TrialResult, TrialStatus
from orchestrator.results.storage import read_sweep
from tests.clusters.separate_nodes import Cluster, Network, Node, started_cluster, why_not
from tests.object_store import BUCKET, started_store
from tests.ray.sweeps import Run, start
from tests.waiting import wait_until

WHY_NOT = why_not()
pytestmark = [pytest.mark.timeout(600), pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))]
LIMIT_S = 200.0
STEPS = 800
EVERY = 20


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    with Network(tmp_path_factory.mktemp("network")).up() as network:
        yield network


@pytest.fixture(scope="module")
def cluster(network: Network, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cluster, Node]]:
    """A head and a node that stay."""
    cache = tmp_path_factory.mktemp("cache")
    before = os.environ.get("ORCHESTRATOR_CACHE")
    # Of the same name on every node, and a folder of its own on each.
    os.environ["ORCHESTRATOR_CACHE"] = str(cache)
    with started_store(network.own_address), started_cluster(network, [cache]) as cluster, cluster.joined(1) as node:
        yield cluster, node
    del os.environ["ORCHESTRATOR_CACHE"]
    if before is not None:
        os.environ["ORCHESTRATOR_CACHE"] = before


def at_work(folder: SweepFolder) -> Mapping[str, int]:
    """Of each host with a trial at work: steps from the first checkpoint seen to the last evaluation; below 0 none."""
    # Of the opening records a store has some before others.
    if not folder.results_json.exists():
        return {}
    found = {}
    for trial in read_sweep(folder)[0].trials:
        if trial.status is TrialStatus.RUNNING and trial.last and trial.last.step < STEPS:
            steps = folder.trial(trial.trial_id).checkpoint_steps()
            found[trial.hosts[0]] = trial.last.step - steps[0] if steps else -1
    return found


def has_ended(run: Run) -> bool:
    return run.process.poll() is not None


def assert_whole(folder: SweepFolder, trial: TrialResult) -> None:
    """Each step once, and all that a trial leaves."""
    left = folder.trial(trial.trial_id)
    assert [point.step for point in left.read_metrics()] == list(range(1, STEPS + 1))
    assert left.log.exists()
    assert left.deepspeed.exists()
    assert list(left.adapter.glob("*.safetensors"))


def test_a_trial_whose_workers_lie_on_three_nodes_comes_to_the_same_under_every_zero_stage(
    cluster: tuple[Cluster, Node], tmp_path: Path
) -> None:
    ray, _ = cluster
    with ray.joined(2):
        run = start(
            tmp_path,
            "--address",
            ray.address,
            within=ray.head.within,
            trial={"global_batch_size": 6, "micro_batch_size": 2, "max_steps": 3},
            space={"zero_stage": [0, 3]},
            # A node has one CPU.
            resources={"workers_per_trial": 3},
        )
        exit_code, _, err = run.wait()
    assert exit_code == 0, err
    replicated, sharded = run.trials().values()
    assert (replicated.status, sharded.status) == (TrialStatus.COMPLETED, TrialStatus.COMPLETED)
    assert sharded.best is not None
    assert replicated.best is not None
    assert sharded.best.eval_loss == pytest.approx(replicated.best.eval_loss, rel=1e-5)


@pytest.mark.parametrize("kind", ["shared folder", "S3"])
def test_trials_on_three_nodes_are_all_whole_though_one_node_is_lost(
    cluster: tuple[Cluster, Node], tmp_path: Path, kind: str
) -> None:
    ray, second = cluster
    storage = f"s3://{BUCKET}/sweeps" if kind == "S3" else str(tmp_path / "sweeps")
    with ray.joined(4 if kind == "S3" else 3) as third:
        run = start(
            tmp_path,
            "--storage",
            storage,
            "--address",
            ray.address,
            within=ray.head.within,
            trial={"max_steps": STEPS, "eval_every": EVERY},
            space={"rank": [2, 4, 8]},
            # A trial's worker takes a whole node.
            resources={"cpus_per_worker": 1, "max_concurrent": 3},
        )
        everywhere = {ray.head.name, second.name, third.name}
        # A store has all of an evaluation's checkpoint with the next one.
        apart = EVERY if kind == "S3" else 0
        seen = wait_until(
            lambda: at_work(remote.opened(f"{storage}/test")),
            lambda seen: has_ended(run) or (set(seen) == everywhere and seen[third.name] >= apart),
            LIMIT_S,
        )
        third.kill()
        assert set(seen) == everywhere, run.wait()
    exit_code, _, err = run.wait()
    assert exit_code == 0, err
    folder = remote.opened(f"{storage}/test")
    trials = read_sweep(folder)[0].trials
    assert [trial.status for trial in trials] == [TrialStatus.COMPLETED] * 3
    assert {host for trial in trials for host in trial.hosts} == {ray.head.name, second.name}
    assert any(note.startswith("went on from step") for trial in trials for note in trial.notes)
    for trial in trials:
        remote.fetch_trial(folder, trial.trial_id)
        assert_whole(folder, trial)
    assert folder.report.exists()
    assert len(json.loads(folder.results_json.read_text())["trials"]) == 3


def start_over_two_nodes(cluster: Cluster, folder: Path, **keys: Any) -> Run:
    """Trials whose two workers lie on two nodes, with a store alone between them."""
    storage = f"s3://{BUCKET}/{folder.name}"
    where = ("--storage", storage, "--address", cluster.address)
    # A node has one CPU.
    return start(folder, *where, within=cluster.head.within, resources={"workers_per_trial": 2}, **keys)


def test_a_trial_over_two_nodes_goes_on_from_a_checkpoint_in_the_store_of_which_each_node_has_stored_its_part(
    cluster: tuple[Cluster, Node], tmp_path: Path
) -> None:
    ray, _ = cluster
    trial = {"max_steps": STEPS, "eval_every": EVERY}
    run = start_over_two_nodes(ray, tmp_path, trial=trial, space={"rank": [2]})
    where = f"s3://{BUCKET}/{tmp_path.name}/test"
    wait_until(
        lambda: [trial.checkpoint_steps() for trial in remote.opened(where).trials()],
        lambda seen: has_ended(run) or any(seen),
        LIMIT_S,
    )
    assert not has_ended(run), run.wait()
    # The driver, and not the command that brought it to its node.
    for process in psutil.Process(run.process.pid).children():
        process.kill()
    run.process.communicate()
    exit_code, _, err = start_over_two_nodes(ray, tmp_path, trial=trial, space={"rank": [2]}).wait()
    assert exit_code == 0, err
    folder = remote.opened(where)
    (ended,) = read_sweep(folder)[0].trials
    assert any(note.startswith("went on from step") for note in ended.notes)
    remote.fetch_trial(folder, ended.trial_id)
    assert_whole(folder, ended)


def test_the_members_of_a_population_over_two_nodes_begin_with_checkpoints_of_both(
    cluster: tuple[Cluster, Node], tmp_path: Path
) -> None:
    ray, _ = cluster
    run = start_over_two_nodes(
        ray,
        tmp_path,
        trial={"max_steps": 4, "eval_every": 2},
        space={"learning_rate": {"log_uniform": [1e-4, 1e-2]}},
        scheduler={"pbt": {"population": 4, "interval_steps": 2}},
    )
    exit_code, _, err = run.wait()
    assert exit_code == 0, err
    trials = read_sweep(remote.opened(f"s3://{BUCKET}/{tmp_path.name}/test"))[0].trials
    assert sorted(trial.status for trial in trials) == [TrialStatus.COMPLETED] * 4 + [TrialStatus.STOPPED] * 4
