"""Who is at work in a sweep folder of an object store, which has no locks: an object that its owner writes anew."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from orchestrator.errors import FolderError, StorageError
from orchestrator.results import remote
from orchestrator.results.heartbeat import beating

_LEASE = re.compile(r"\w+ \S+ [1-9][0-9]{0,8}")
log = logging.getLogger(__name__)
BEAT_S = 20.0
LAPSE_S = 90.0
"""An owner that has been silent for so long is dead."""
LOOK_S = 2.0
"""So often somebody else's lease is looked at; stores tell times in whole seconds."""
SETTLE_S = 1.0
"""Of two that begin in the same moment, the later write stands, and both see whose it is after this time."""


@dataclass(frozen=True, slots=True)
class Found:
    """A lease as it lies in the store."""

    owner: str
    """`TOKEN HOST PID`."""
    age_s: float
    """By the store's own clock."""

    @property
    def is_alive(self) -> bool:
        """Whether its owner must be taken to be at work; one of this machine can be looked for."""
        _, host, pid = self.owner.split()
        return self.age_s < LAPSE_S and (host != socket.gethostname() or _runs(int(pid)))


def look(uri: str) -> Found | None:
    """The lease on a sweep's folder, or None where there is none, or what lies there is no lease.

    Raises:
        StorageError: the store cannot be asked.
    """
    found = remote.read_text(_object(uri))
    if found is None or not _LEASE.fullmatch(found[0]):
        return None
    # Clocks differ between machines: the store's own is asked by writing something.
    probe = f"{uri}/.clock-{uuid.uuid4().hex}"
    try:
        remote.write_text(probe, "")
        now = remote.read_text(probe)
    finally:
        remote.delete(probe)
    return Found(found[0], now[1] - found[1] if now else 0.0)


@contextmanager
def held(uri: str, lost: Callable[[], None]) -> Iterator[None]:
    """Hold the lease; `lost` is called from a thread where somebody else has taken it.

    Where the block ends with a StorageError it is left to lapse: each request to a store that is away takes seconds,
    to one that is silent a minute, and who was interrupted has few.

    Raises:
        FolderError: another run is at work there.
        StorageError: the store cannot be written.
    """
    owner = f"{uuid.uuid4().hex} {socket.gethostname()} {os.getpid()}"
    _wait_for_owner(uri)
    remote.write_text(_object(uri), owner)
    time.sleep(SETTLE_S)
    _require_ours(uri, owner)

    def renew() -> bool:
        if _owner(uri) not in (owner, None):
            lost()
            return False
        remote.write_text(_object(uri), owner)
        return True

    try:
        with beating(BEAT_S, renew):
            yield
    except StorageError:
        raise
    except BaseException:
        _release(uri, owner)
        raise
    else:
        _release(uri, owner)


def _release(uri: str, owner: str) -> None:
    # In a store that is away it lapses by itself.
    with contextlib.suppress(StorageError):
        if _owner(uri) == owner:
            remote.delete(_object(uri))


def _wait_for_owner(uri: str) -> None:
    """Return once nobody holds the lease, or who did has been silent for so long that it is dead.

    Raises:
        FolderError: it is renewed.
        StorageError: the store cannot be asked.
    """
    before = None
    while (found := look(uri)) and found.is_alive:
        _, host, pid = found.owner.split()
        if before is None:
            log.warning(
                "a run on %s was at work in %s %.0f s ago: it is waited for until it shows itself again, or has been "
                "silent for %.0f s and is given up",
                host,
                uri,
                found.age_s,
                LAPSE_S,
            )
        elif found.owner != before.owner or found.age_s < before.age_s:
            raise FolderError(
                f"another run is at work in {uri} (process {pid} on {host}): wait for it, or give this sweep another "
                "--name"
            )
        before = found
        time.sleep(LOOK_S)


def _require_ours(uri: str, owner: str) -> None:
    if _owner(uri) != owner:
        raise FolderError(f"another run began in {uri} in the same moment: wait for it, or take another --name")


def _owner(uri: str) -> str | None:
    found = remote.read_text(_object(uri))
    return found[0] if found else None


def _object(uri: str) -> str:
    return f"{uri}/.lease"


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
