"""A cluster with a T4 and an A100 that are not there: which of them trials ask for, and where they run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.results.records import TrialStatus
from tests.clusters.separate_nodes import Cluster, Network, started_cluster, why_not
from tests.ray.sweeps import start

WHY_NOT = why_not()
pytestmark = [pytest.mark.timeout(600), pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))]


def with_gpu(kind: str) -> tuple[str, str]:
    return "--num-gpus=1", f"--resources={json.dumps({f'accelerator_type:{kind}': 1})}"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cluster, dict[str, str]]]:
    """And what GPU each node has, by its name."""
    with (
        Network(tmp_path_factory.mktemp("network")).up() as network,
        started_cluster(network, []) as cluster,
        cluster.joined(1, *with_gpu("T4")) as small,
        cluster.joined(2, *with_gpu("A100")) as large,
    ):
        yield cluster, {small.name: "T4", large.name: "A100"}


@pytest.mark.parametrize(
    ("trial", "space", "kind", "told"),
    [
        pytest.param({}, {"rank": [2, 4]}, "T4", "2 on A100, 2 on T4 can run: all run on T4", id="what fits on both"),
        pytest.param(
            {}, {"precision": ["fp32", "bf16"]}, "A100", "2 on A100, 1 on T4 can run: all run on A100", id="the space"
        ),
        # The estimate is of whole sequences; these rows are short, so that a CPU has room for them.
        pytest.param(
            {"sequence_length": 1024, "micro_batch_size": 512, "global_batch_size": 512},
            {"rank": [2, 4]},
            "A100",
            "2 on A100, 0 on T4 can run: all run on A100",
            id="memory",
        ),
    ],
)
def test_trials_run_on_the_smallest_gpu_that_the_space_and_the_memory_estimate_allow(
    cluster: tuple[Cluster, dict[str, str]],
    tmp_path: Path,
    trial: dict[str, Any],
    space: dict[str, Any],
    kind: str,
    told: str,
) -> None:
    ray, gpu_of = cluster
    run = start(
        tmp_path,
        "--address",
        ray.address,
        within=ray.head.within,
        trial={"max_steps": 2, **trial},
        space=space,
        resources={"gpus_per_worker": 1},
    )
    exit_code, _, err = run.wait()
    assert exit_code == 0, err
    assert told in err
    trials = run.trials().values()
    assert [trial.status for trial in trials] == [TrialStatus.COMPLETED] * 2
    assert [gpu_of[host] for trial in trials for host in trial.hosts] == [kind] * 2
    assert kind in json.loads(run.folder.plan.read_text())["hardware"]
