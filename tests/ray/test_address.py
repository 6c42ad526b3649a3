"""A sweep on a cluster that was there before it and stays after it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ray.clusters import started_head
from tests.ray.sweeps import start
from tests.waiting import wait_until

pytestmark = pytest.mark.timeout(500)


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    with started_head({"RAY_AUTH_MODE": "disabled"}) as started:
        yield started.address


def left_on(address: str) -> str:
    """What lives on the cluster beside its own processes."""
    code = (
        "import ray, logging\n"
        f"ray.init({address!r}, logging_level=logging.ERROR)\n"
        "from ray.util import placement_group_table\n"
        "groups = [g for g in placement_group_table().values() if g['state'] != 'REMOVED']\n"
        "print(len(groups), ray.available_resources().get('CPU'))"
    )
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60
    ).stdout.strip()


def test_a_sweep_joins_a_cluster_by_its_address_and_gives_everything_back(head: str, tmp_path: Path) -> None:
    run = start(
        tmp_path,
        "--address",
        head,
        trial={"max_steps": 12},
        space={"learning_rate": [1e-2, 1e-5], "zero_stage": [1, 3]},
        scheduler={"asha": {"grace_steps": 2, "reduction_factor": 2}},
        resources={"workers_per_trial": 2},
    )
    exit_code, _, err = run.wait()
    assert exit_code == 0, err
    assert "completed" in run.statuses()
    assert set(run.statuses()) <= {"completed", "stopped"}
    assert wait_until(lambda: left_on(head), lambda seen: seen == "0 2.0", 60) == "0 2.0"
