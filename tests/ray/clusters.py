"""Ray clusters that are there before a sweep and stay after it: a head as a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.waiting import wait_until

BIN = Path(sys.executable).parent


@dataclass(frozen=True, slots=True)
class Head:
    """A head with two CPUs."""

    address: str
    dashboard: str


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def started_head(variables: Mapping[str, str], *more: str, cpus: int = 2, port: int = 0) -> Iterator[Head]:
    """A head that has `variables` in its environment, and ends with the block; `more` goes to `ray start`."""
    port, dashboard_port = port or free_port(), free_port()
    # Ray's sockets need a short path, which pytest's folders are not.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        command = [BIN / "ray", "start", "--head", "--block", "--disable-usage-stats"]
        options = [f"--port={port}", f"--dashboard-port={dashboard_port}", f"--num-cpus={cpus}"]
        options += [f"--temp-dir={folder}", *more]
        environment = {**os.environ, **variables}
        environment.pop("RAY_API_SERVER_ADDRESS", None)
        process = subprocess.Popen(
            [*command, *options],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            wait_until(lambda: answers(port) and answers(dashboard_port), bool, 180)
            yield Head(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard_port}")
        finally:
            end_all(process)


@contextmanager
def joined_node(head: Head, *, hides: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A second node with two CPUs; `hides` is a folder of which it sees one of its own in that place."""
    command = [str(BIN / "ray"), "start", f"--address={head.address}", "--num-cpus=2", "--block"]
    # Far more than the head's, as that of a node with GPUs: whoever asks for memory alone is put there (ray 2.60.0).
    command += [f"--memory={2**40}"]
    if hides is not None:
        inside = f'mount -t tmpfs tmpfs "{hides}" && exec {" ".join(command)}'
        command = ["unshare", "--mount", "bash", "-c", inside]
    process = subprocess.Popen(
        command,
        # So long it drains where it is told to end; Ray's own 30 s prove no more.
        env={**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_until(lambda: _cpus_of(head), lambda cpus: cpus == 4, 180)
        yield process
    finally:
        end_all(process)
        # Ray notices after some seconds; until then it would still be counted.
        wait_until(lambda: _cpus_of(head), lambda cpus: cpus == 2, 180)


def _cpus_of(head: Head) -> int:
    return int(resources_of(head).get("CPU", 0))


def resources_of(head: Head) -> dict[str, float]:
    """What the cluster has, asked in a process of its own: this one may join another later."""
    return dict(_asked(head.address, "ray.cluster_resources()") or {})


def nodes_of_slots(head: Head) -> list[str]:
    """The head's own id, and then that of the node of each slot that a trial ever had."""
    table = "ray.util.placement_group_table().values()"
    slots = f"[group['bundles_to_node_id'][0] for group in {table} if {{*group['bundles'][0]}} == {{'memory'}}]"
    return list(_asked(head.address, f"[ray.get_runtime_context().get_node_id(), *{slots}]"))


def metrics_of(address: str) -> str:
    """What the nodes offer to Prometheus."""
    ports = _asked(address, "[node['MetricsExportPort'] for node in ray.nodes() if node['Alive']]") or []
    told = ""
    for port in ports:
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as page,
        ):
            told += page.read().decode()
    return told


def _asked(address: str, question: str) -> Any:
    code = f"import json, ray; ray.init({address!r}); print('FOUND', json.dumps({question}))"
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    found = re.search(r"^FOUND (.*)$", done.stdout, re.MULTILINE)
    return json.loads(found[1]) if found else None


def end_all(process: subprocess.Popen[bytes]) -> None:
    """Not `ray stop`, which would end every other cluster of this machine too."""
    with contextlib.suppress(psutil.NoSuchProcess):
        whole = psutil.Process(process.pid)
        for one in [*whole.children(recursive=True), whole]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait(30)
