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
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from filelock import FileLock, Timeout

from orchestrator.errors import FolderError, StorageError
from orchestrator.results.heartbeat import beating
from orchestrator.results.storage import SweepFolder, read_record, write_atomically

RENEWED_EVERY_S = 5.0
DEAD_AFTER_S = 20.0
"""An owner on another host that has not renewed its lease for so long is gone."""


@contextmanager
def only_one(folder: SweepFolder, host: str | None = None) -> Iterator[None]:
    """Hold the folder; what was made for nothing, since nothing was started, is removed again.

    host: this machine's name.

    Raises:
        FolderError: another run is at work there.
        StorageError: it cannot be written to.
    """
    made = [path for path in (folder.root, *folder.root.parents) if not path.exists()]
    try:
        folder.root.mkdir(parents=True, exist_ok=True)
        # A moment, since `status` takes it to see whether it is free.
        lock = FileLock(folder.lock, timeout=1)
        lock.acquire()
    except Timeout as error:
        raise FolderError(_taken(folder)) from error
    except OSError as error:
        raise StorageError(f"cannot write to {folder.root} ({error.strerror}): name another --storage") from error
    try:
        with _lease(folder, host or socket.gethostname()):
            yield
    finally:
        if made and not folder.sweep_file.exists():
            # Nothing was started: nothing is left behind. Still under the lock, or another run could begin in it.
            shutil.rmtree(folder.root, ignore_errors=True)
            with contextlib.suppress(OSError):
                for parent in made[1:]:
                    parent.rmdir()
        lock.release()


def _taken(folder: SweepFolder, where: str = "") -> str:
    return f"another run is at work in {folder.shown}{where}: wait for it, or give this sweep another --name"


@contextmanager
def _lease(folder: SweepFolder, host: str) -> Iterator[None]:
    _wait_for_owner(folder, host)
    owner, renewals = f"{host} {os.getpid()} {uuid.uuid4().hex}", itertools.count()

    def renew() -> bool:
        lease = {"host": host, "owner": owner, "renewals": next(renewals)}
        write_atomically(folder.lease, json.dumps(lease) + "\n")
        return True

    renew()
    try:
        with beating(RENEWED_EVERY_S, renew):
            yield
    finally:
        folder.lease.unlink(missing_ok=True)


def _wait_for_owner(folder: SweepFolder, host: str) -> None:
    """Return once an owner on another host is known to be gone; of one on this host, the lock has told already.

    Raises:
        FolderError: it renews its lease.
    """
    first = _read(folder)
    if not first or first.get("host") == host:
        return
    until_s = time.monotonic() + DEAD_AFTER_S
    while time.monotonic() < until_s:
        time.sleep(0.5)
        now = _read(folder)
        if not now:
            return
        if now != first:
            raise FolderError(_taken(folder, f" on host {now.get('host')}"))


def _read(folder: SweepFolder) -> dict[str, object]:
    """The lease; empty where there is none, or what stands there is none."""
    try:
        found = json.loads(read_record(folder.lease))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
