"""A sweep on a cluster that was there before it and stays after it."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.ray.sweeps import start
from tests.waiting import wait_until

pytestmark = pytest.mark.timeout(500)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    port, dashboard_port = free_port(), free_port()
    # Ray's sockets need a short path, which pytest's folders are not.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        command = [Path(sys.executable).parent / "ray", "start", "--head", "--block", "--disable-usage-stats"]
        options = [f"--port={port}", f"--dashboard-port={dashboard_port}", "--num-cpus=2", f"--temp-dir={folder}"]
        environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
        environment.pop("RAY_API_SERVER_ADDRESS", None)
        process = subprocess.Popen(
            [*command, *options],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            wait_until(lambda: answers(port) and answers(dashboard_port), bool, 90)
            yield f"127.0.0.1:{port}"
        finally:
            # Not `ray stop`, which would end every other cluster of this machine too.
            below = psutil.Process(process.pid).children(recursive=True)
            for one in [*below, psutil.Process(process.pid)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
            process.wait(30)


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
