"""One run a folder: a lock on this host, a lease between hosts.

The kernel frees a dead owner's lock at once, but a mount may keep locks to each host (NFS with `nolock` or
`local_lock=flock`). So the run also renews a small file. A run on another host watches it: while it changes somebody is
alive, and no two clocks have to agree.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from filelock import FileLock, Timeout

from orchestrator.errors import FolderError, StorageError
from orchestrator.results.files import require_there, write_atomically
from orchestrator.results.folders import SweepFolder
from orchestrator.results.heartbeat import beating
from orchestrator.results.storage import DEAD_AFTER_S, read_lease

RENEWED_EVERY_S = 5.0


class Tenure:
    """Whether the folder is still this run's: one that was silent for long is given up by others."""

    def __init__(self, where: str) -> None:
        self._where = where
        self.is_lost = False
        """What is there is another run's by now, and must not be written over."""

    def lose(self) -> None:
        """End this run, as SIGTERM does."""
        self.is_lost = True
        os.kill(os.getpid(), signal.SIGTERM)

    def require(self) -> None:
        """Go on only where the folder is this run's.

        Raises:
            FolderError: it is not.
        """
        if self.is_lost:
            raise FolderError(
                f"another run has taken {self._where} over, since this one was silent for long: it goes on there, and "
                "this one ends without writing more"
            )


@contextmanager
def only_one(folder: SweepFolder, host: str | None = None) -> Iterator[Tenure]:
    """Hold the folder; what was made for nothing, since nothing was started, is removed again.

    host: this machine's name.

    Raises:
        FolderError: another run is at work there.
        StorageError: it cannot be written to.
    """
    made = [path for path in (folder.root, *folder.root.parents) if not path.exists()]
    host = host or socket.gethostname()
    try:
        folder.root.mkdir(parents=True, exist_ok=True)
        lock = _locked(folder, host)
    except OSError as error:
        raise StorageError(f"cannot write to {folder.root} ({error.strerror}): name another --storage") from error
    try:
        with _lease(folder, host) as tenure:
            yield tenure
    finally:
        # On a mount that has gone there is nothing to be asked or removed.
        with contextlib.suppress(OSError):
            if made and not (folder.sweep_file.exists() or folder.results_json.exists() or any(folder.trials())):
                # Nothing was started: nothing is left behind. Still under the lock, or another run could begin in it.
                shutil.rmtree(folder.root, ignore_errors=True)
                for parent in made[1:]:
                    parent.rmdir()
        lock.release()


def _locked(folder: SweepFolder, host: str) -> FileLock:
    """The lock, taken.

    A server of NFS may keep the lock of a host that is gone, for ever with NLM (version 3). Where the lease names
    another host and stands still, its owner is dead: the lock's file is left to it, and another one takes its name.

    Raises:
        FolderError: another run has it.
    """
    # A moment, since `status` takes it to see whether it is free.
    lock = FileLock(folder.lock, timeout=1)
    try:
        lock.acquire()
    except Timeout as error:
        if read_lease(folder).get("host") in (None, host):
            raise FolderError(_taken(folder)) from error
        _wait_for_owner(folder, host)
        folder.lock.unlink(missing_ok=True)
        try:
            lock.acquire()
        except Timeout:
            raise FolderError(_taken(folder)) from error
    return lock


def _taken(folder: SweepFolder, where: str = "") -> str:
    return f"another run is at work in {folder.shown}{where}: wait for it, or give this sweep another --name"


@contextmanager
def _lease(folder: SweepFolder, host: str) -> Iterator[Tenure]:
    _wait_for_owner(folder, host)
    owner, renewals = f"{host} {os.getpid()} {uuid.uuid4().hex}", itertools.count()
    tenure = Tenure(folder.shown)

    def is_ours() -> bool:
        return read_lease(folder).get("owner") in (owner, None)

    def write() -> None:
        lease = {"host": host, "owner": owner, "renewals": next(renewals)}
        require_there(folder.root)
        write_atomically(folder.lease, json.dumps(lease) + "\n")

    def renew() -> bool:
        if not is_ours():
            tenure.lose()
            return False
        write()
        return True

    write()
    try:
        with beating(RENEWED_EVERY_S, renew):
            yield tenure
    finally:
        # On a mount that has gone it stands still, and is given up.
        with contextlib.suppress(OSError):
            if is_ours():
                folder.lease.unlink(missing_ok=True)


def _wait_for_owner(folder: SweepFolder, host: str) -> None:
    """Return once an owner on another host is known to be gone; of one on this host, the lock has told already.

    Raises:
        FolderError: it renews its lease.
    """
    first = read_lease(folder)
    if not first or first.get("host") == host:
        return
    until_s = time.monotonic() + DEAD_AFTER_S
    while time.monotonic() < until_s:
        time.sleep(0.5)
        now = read_lease(folder)
        if not now:
            return
        if now != first:
            raise FolderError(_taken(folder, f" on host {now.get('host')}"))
