"""Who is at work in a sweep folder of an object store, which has no locks: an object that its owner writes anew."""

from __future__ import annotations

import contextlib
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from orchestrator.errors import FolderError, StorageError
from orchestrator.results import remote
from orchestrator.results.heartbeat import beating

BEAT_S = 20.0
LAPSE_S = 90.0
"""An owner that has been silent for so long is dead."""
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
    """The lease on a sweep's folder, or None.

    Raises:
        StorageError: the store cannot be asked.
    """
    found = remote.read_text(_object(uri))
    if found is None:
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

    Raises:
        FolderError: another run is at work there.
        StorageError: the store cannot be written.
    """
    owner = f"{uuid.uuid4().hex} {socket.gethostname()} {os.getpid()}"
    _require_free(uri)
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
    finally:
        # In a store that is away it lapses by itself.
        with contextlib.suppress(StorageError):
            if _owner(uri) == owner:
                remote.delete(_object(uri))


def _require_free(uri: str) -> None:
    found = look(uri)
    if found and found.is_alive:
        _, host, pid = found.owner.split()
        raise FolderError(
            f"another run is at work in {uri} (process {pid} on {host}, last seen {found.age_s:.0f} s ago; one that is "
            f"silent for {LAPSE_S:.0f} s is given up): wait for it, or give this sweep another --name"
        )


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
