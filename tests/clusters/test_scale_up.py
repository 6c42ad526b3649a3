"""A cluster without a single worker node, whose autoscaler starts fake ones of two types of GPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.results.records import TrialStatus
from tests.ray.clusters import Head, free_port, metrics_of, resources_of, started_head
from tests.ray.sweeps import start
from tests.waiting import wait_until

pytestmark = [
    pytest.mark.timeout(500),
]
LIMIT_S = 300.0
HEAD_ID = "f" * 51 + "00000"


def node_type(gpu: str) -> dict[str, Any]:
    resources = {"CPU": 2, "GPU": 1, f"accelerator_type:{gpu}": 1, "object_store_memory": 10**8}
    return {"resources": resources, "node_config": {}, "min_workers": 0, "max_workers": 1}


def autoscaling(gcs_address: str) -> dict[str, Any]:
    """As `ray.cluster_utils.AutoscalingCluster` writes it, whose start and end would end every other cluster here."""
    lists = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands")
    lists += ("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files")
    return {
        "cluster_name": "from-zero",
        "max_workers": 2,
        "idle_timeout_minutes": 0.1,
        "upscaling_speed": 1.0,
        "provider": {
            # By its class, since under its own name Ray looks for a file that its wheel does not have (2.60.0).
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": gcs_address,
            "launch_multiple": True,
            "head_node_id": HEAD_ID,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "small": node_type("T4"),
            "large": node_type("A100"),
        },
        "head_node_type": "ray.head.default",
        "auth": {},
        "docker": {},
        "file_mounts": {},
        **{name: [] for name in lists},
    }


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    port = free_port()
    config = tmp_path_factory.mktemp("autoscaler") / "config.json"
    config.write_text(json.dumps(autoscaling(f"127.0.0.1:{port}")))
    variables = {
        "RAY_AUTH_MODE": "disabled",
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
    }
    options = ("--node-ip-address=127.0.0.1", f"--autoscaling-config={config}")
    with started_head(variables, *options, cpus=0, port=port) as started:
        yield started


def test_a_sweep_brings_the_nodes_that_it_asks_for_up_from_zero_and_they_go_again(head: Head, tmp_path: Path) -> None:
    assert "CPU" not in resources_of(head)
    run = start(
        tmp_path,
        "--address",
        head.address,
        space={"rank": [2, 4]},
        resources={"gpus_per_worker": 1, "cpus_per_worker": 2, "accelerator": "A100", "scale_up_minutes": 4},
    )
    there = wait_until(lambda: resources_of(head), lambda seen: "CPU" in seen, LIMIT_S)
    assert "accelerator_type:A100" in there
    shown = wait_until(
        lambda: metrics_of(head.address),
        lambda seen: "ray_orchestrator_trials" in seen or run.process.poll() is not None,
        LIMIT_S,
    )
    assert any("ray_orchestrator_trials{" in line and 'sweep="test"' in line for line in shown.splitlines())
    exit_code, _, err = run.wait()
    assert exit_code == 0, err
    assert "asking the cluster for room for one trial (1 workers of 2 CPUs and 1 A100 GPUs each)" in err
    assert [trial.status for trial in run.trials().values()] == [TrialStatus.COMPLETED] * 2
    assert "A100" in json.loads(run.folder.plan.read_text())["hardware"]
    assert "accelerator_type:T4" not in resources_of(head)
    wait_until(lambda: resources_of(head), lambda seen: "CPU" not in seen, 90)
