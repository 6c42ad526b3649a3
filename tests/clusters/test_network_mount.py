"""A folder that two machines have mounted from a server which knows nothing of either's locks (sshfs)."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from orchestrator.results.storage import read_sweep
from tests.ray.sweeps import Run, processes_of, start
from tests.waiting import wait_until

SERVER = next(
    (path for path in map(Path, ("/usr/lib/openssh/sftp-server", "/usr/libexec/sftp-server")) if path.exists()), None
)
CAN = os.geteuid() == 0 and SERVER and shutil.which("sshfs") and shutil.which("unshare") and Path("/dev/fuse").exists()
pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(not CAN, reason="mounts take root, `sshfs`, `sftp-server`, `unshare` and /dev/fuse"),
]
LIMIT_S = 200.0
STEPS = 1200
SILENCE_S = 20.0


@dataclass(frozen=True, slots=True)
class Machine:
    """A name of its own, and its own mount of the folder."""

    name: str
    mount: Path
    server: psutil.Process

    def run(self) -> Run:
        named = ("unshare", "--uts", "sh", "-c", f'hostname {self.name} && exec "$@"', "sh")
        trial, resources = {"max_steps": STEPS, "eval_every": 50}, {"max_concurrent": 2}
        return start(self.mount, within=named, trial=trial, resources=resources, space={"rank": [2, 4]})


@contextmanager
def mounted(folder: Path, name: str, where: Path) -> Iterator[Machine]:
    where.mkdir()
    before = set(psutil.pids())
    command = ["sshfs", "-o", f"ssh_command={_without_ssh(where.parent)}", f"host:{folder}", str(where)]
    subprocess.run(command, check=True, capture_output=True)
    new = [psutil.Process(pid) for pid in set(psutil.pids()) - before if psutil.pid_exists(pid)]
    (server,) = (process for process in new if SERVER and process.name() == SERVER.name)
    try:
        yield Machine(name, where, server)
    finally:
        if server.is_running():
            server.resume()
        subprocess.run(["umount", "--lazy", str(where)], check=False)


def _without_ssh(folder: Path) -> Path:
    """In place of a connection to another machine, its server here."""
    script = folder / "connect.sh"
    script.write_text(f"#!/bin/sh\nexec {SERVER}\n")
    script.chmod(0o755)
    return script


@pytest.fixture
def machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Machine, Machine]]:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "served"
    folder.mkdir()
    with ExitStack() as stack:
        one, other = (
            stack.enter_context(mounted(folder, f"machine-{letter}", tmp_path / letter)) for letter in ("a", "b")
        )
        yield one, other


def steps(run: Run) -> int:
    """Of all trials."""
    return sum(len(trial.read_metrics()) for trial in run.folder.trials())


def assert_whole(run: Run) -> None:
    for trial in read_sweep(run.folder)[0].trials:
        assert trial.status.value == "completed"
        curve = [point.step for point in run.folder.trial(trial.trial_id).read_metrics()]
        assert curve == list(range(1, STEPS + 1))


def test_a_second_machine_is_refused_and_goes_on_once_the_first_is_gone(machines: tuple[Machine, Machine]) -> None:
    one, other = machines
    first = one.run()
    wait_until(lambda: steps(first), lambda done: done > 200, LIMIT_S)

    exit_code, _, err = other.run().wait()
    assert exit_code == 2, err
    assert "another run is at work in" in err
    assert "on host machine-a" in err

    below = processes_of(first)
    for process in (psutil.Process(first.process.pid), *below):
        process.kill()
    psutil.wait_procs(below, 30)
    second = other.run()
    exit_code, _, err = second.wait()
    assert exit_code == 0, err
    assert_whole(second)
    assert all(any("went on from step" in note for note in trial.notes) for trial in second.sweep().trials)


def test_a_server_that_is_silent_for_a_while_costs_that_while_and_nothing_else(
    machines: tuple[Machine, Machine],
) -> None:
    one, _ = machines
    run = one.run()
    wait_until(lambda: steps(run), lambda done: done > 200, LIMIT_S)
    one.server.send_signal(signal.SIGSTOP)
    try:
        # That nothing comes of it is what is to be seen, and takes its time.
        time.sleep(SILENCE_S)
        assert run.process.poll() is None
    finally:
        one.server.send_signal(signal.SIGCONT)
    exit_code, _, err = run.wait()
    assert exit_code == 0, err
    assert_whole(run)
