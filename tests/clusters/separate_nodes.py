"""A Ray cluster whose nodes share a network and nothing else, as machines do: each in namespaces of its own.

A node has its own addresses, name, processes, `/dev/shm`, `/tmp/ray` and what else a test names. Other folders are
everybody's, as a mount is.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import requests

from tests.ray.clusters import BIN
from tests.waiting import wait_until

LIMIT_S = 180.0
PORT, DASHBOARD_PORT = 6379, 8265
OWN = ("/dev/shm", "/tmp/ray")


def why_not() -> str | None:
    """What this machine lacks for it; None: nothing."""
    if os.geteuid() != 0:
        return "network namespaces take root"
    if not (shutil.which("ip") and shutil.which("unshare") and shutil.which("nsenter")):
        return "network namespaces take `ip`, `unshare` and `nsenter`"
    name = f"try-{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if tried.returncode:
        return f"this machine makes no network namespace: {tried.stderr.strip()}"
    _ip("netns", "del", name)
    return None


@dataclass(frozen=True, slots=True)
class Node:
    """One machine of the cluster."""

    name: str
    address: str
    process: subprocess.Popen[bytes]

    @property
    def within(self) -> tuple[str, ...]:
        """The command that runs another one on this node."""
        (init,) = psutil.Process(self.process.pid).children()
        return ("nsenter", f"--target={init.pid}", "--net", "--uts", "--mount", "--pid")

    def kill(self) -> None:
        """All that runs there at once, as when the power goes."""
        self.process.kill()
        self.process.wait(30)


class Network:
    """A bridge with an address of ours, by which the nodes find services on this machine."""

    def __init__(self, folder: Path) -> None:
        """`folder` is for the files that name the nodes."""
        self._folder, self._prefix = folder, f"10.213.{os.getpid() % 250}"
        self._bridge = f"ray{os.getpid()}"
        self.own_address = f"{self._prefix}.1"

    @contextmanager
    def up(self) -> Iterator[Network]:
        """The bridge, for the block."""
        _ip("link", "add", self._bridge, "type", "bridge")
        try:
            _ip("address", "add", f"{self.own_address}/24", "dev", self._bridge)
            _ip("link", "set", self._bridge, "up")
            yield self
        finally:
            _ip("link", "del", self._bridge)

    @contextmanager
    def node(self, number: int, own: Sequence[Path], *start: str) -> Iterator[Node]:
        """A node with a CPU that runs `ray start` with these options, and has each of the folders `own` for itself."""
        name, address = f"{self._bridge}-node-{number}", f"{self._prefix}.{10 + number}"
        with self._namespace(name, f"veth{os.getpid()}-{number}"[:15], address):
            # As Debian sets a machine up: by its own name it finds itself, and by an address that no other can reach.
            hosts = self._folder / f"hosts-{number}"
            hosts.write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n")
            mounts = " && ".join(f'mkdir -p "{at}" && mount -t tmpfs tmpfs "{at}"' for at in (*OWN, *own))
            ray = shlex.join(
                [str(BIN / "ray"), "start", f"--node-ip-address={address}", "--num-cpus=1", "--block", *start]
            )
            inside = f'hostname {name} && mount --bind "{hosts}" /etc/hosts && {mounts} && exec {ray}'
            apart = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
            with (self._folder / f"{name}.log").open("w") as log:
                process = subprocess.Popen(
                    ["ip", "netns", "exec", name, *apart, "sh", "-c", inside],
                    env={**os.environ, "RAY_AUTH_MODE": "disabled"},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            node = Node(name, address, process)
            try:
                yield node
            finally:
                node.kill()

    @contextmanager
    def _namespace(self, name: str, link: str, address: str) -> Iterator[None]:
        with ExitStack() as made:
            _ip("netns", "add", name)
            made.callback(_ip, "netns", "del", name)
            _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("link", "set", link, "master", self._bridge, "up")
            _ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", name, "link", "set", device, "up")
            _ip("-n", name, "route", "add", "default", "via", self.own_address)
            yield


class Cluster:
    """A head and what has joined it."""

    def __init__(self, network: Network, own: Sequence[Path], head: Node) -> None:
        self._network, self._own, self.head = network, own, head
        self.address = f"{head.address}:{PORT}"

    @contextmanager
    def joined(self, number: int, *start: str) -> Iterator[Node]:
        """One node more, for the block; afterwards the cluster knows that it is gone."""
        with self._network.node(number, self._own, f"--address={self.address}", *start) as node:
            wait_until(self.alive, lambda names: node.name in names, LIMIT_S)
            yield node
        wait_until(self.alive, lambda names: node.name not in names, LIMIT_S)

    def alive(self) -> set[str]:
        """Names of the nodes that the head believes to be there."""
        try:
            told: Any = requests.get(
                f"http://{self.head.address}:{DASHBOARD_PORT}/nodes?view=summary", timeout=5
            ).json()
        except (requests.RequestException, ValueError):
            return set()
        nodes = told["data"]["summary"]
        # Of a node that has just joined the head knows the raylet before it knows the name.
        return {node.get("hostname", "") for node in nodes if node.get("raylet", {}).get("state") == "ALIVE"}


@contextmanager
def started_cluster(network: Network, own: Sequence[Path]) -> Iterator[Cluster]:
    """A head with a CPU, alone; each node has the folders `own` for itself."""
    options = ("--head", f"--port={PORT}", "--dashboard-host=0.0.0.0", f"--dashboard-port={DASHBOARD_PORT}")
    with network.node(0, own, *options) as head:
        cluster = Cluster(network, own, head)
        wait_until(cluster.alive, lambda names: head.name in names, LIMIT_S)
        yield cluster


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
