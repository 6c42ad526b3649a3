"""Ray ends a driver by itself once its head is silent for a minute: this says why before, and with a code of ours."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray
from rich.console import Console

from orchestrator.errors import ClusterUnreachableError, SweepInterruptedError
from orchestrator.results.heartbeat import beside

RAYS_LIMIT = "RAY_gcs_rpc_server_reconnect_timeout_s"
RAYS_LIMIT_S = 60
"""After so long without the head's GCS Ray's C++ ends the process with code 1 (ray 2.60.0, gcs_rpc_client)."""
OF_RAYS_LIMIT = 5 / 6
INTERRUPTED_LIMIT_S = 5.0
"""Where systemd or SLURM end a sweep, the head was sent the same signal: it will not be back."""
LOOK_S = 1.0


@contextmanager
def told_of_a_lost_head(say: Callable[[str], None], interrupted: Callable[[], bool]) -> Iterator[None]:
    """Within this a head that does not come back ends the process with the contract's code for it, and in words.

    One that is back in time, as where a cluster keeps its state in Redis, changes nothing. At once, since whatever asks
    Ray for anything waits for the head, and would until Ray ends it; records are on disk by then.
    """
    address, rays_limit = ray.get_runtime_context().gcs_address, os.environ.get(RAYS_LIMIT)

    def limit_s() -> float:
        return patience_s(rays_limit, interrupted=interrupted())

    def look_on(ended: threading.Event) -> None:
        if is_lost(lambda: _answers(address), limit_s, ended):
            # The live panel hides it.
            Console(stderr=True).show_cursor()
            exit_code, why = last_words(address, limit_s(), interrupted=interrupted())
            say(why)
            os._exit(exit_code)

    with beside(look_on):
        yield


def last_words(address: str, silent_s: float, *, interrupted: bool) -> tuple[int, str]:
    """The exit code of a run whose head was silent for so long, and what it says."""
    if interrupted:
        return SweepInterruptedError.exit_code, (
            f"interrupted, and the cluster's head (its GCS at {address}) is gone, as where every process is sent the "
            "signal. What had ended before is safe, and running trials go on from their last checkpoints: run the same "
            "command again"
        )
    return ClusterUnreachableError.exit_code, (
        f"error: the sweep was stopped: the cluster's head (its GCS at {address}) has not answered for "
        f"{silent_s:.0f} s. What had ended before is safe: once the cluster is back, the same command goes on"
    )


def patience_s(rays_limit: str | None, *, interrupted: bool) -> float:
    """How long a head may be silent, by what stands in `RAYS_LIMIT`: a little less than Ray waits."""
    # What is no whole number Ray does not take either.
    limit_s = OF_RAYS_LIMIT * (int(rays_limit) if rays_limit and rays_limit.isdecimal() else RAYS_LIMIT_S)
    return min(limit_s, INTERRUPTED_LIMIT_S) if interrupted else limit_s


def is_lost(answers: Callable[[], bool], limit_s: Callable[[], float], ended: threading.Event) -> bool:
    """Look until there was no answer for so long, or until `ended`; one that cannot be asked from here is not lost."""
    if not answers():
        return False
    silent_since_s: float | None = None
    while not ended.wait(LOOK_S):
        now_s = time.monotonic()
        if answers():
            silent_since_s = None
        elif silent_since_s is None:
            silent_since_s = now_s
        elif now_s - silent_since_s >= limit_s():
            return True
    return False


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), LOOK_S).close()
    except OSError:
        return False
    return True
