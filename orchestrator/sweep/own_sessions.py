"""Processes that no signal to the driver's group reaches: Ctrl-C in a terminal, `timeout`, a terminal that closes.

A sweep whose cluster dies of them cannot save what its trials have come to.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

_wanted = False


@contextmanager
def children_in_own_sessions() -> Iterator[None]:
    """What Ray starts within this, each process of a head, leads a session of its own.

    Ray's `init` has no setting for it (2.60.0). That they die with the driver is none of the session's business: Ray
    asks the kernel for it (PR_SET_PDEATHSIG).
    """
    global _wanted
    _wanted = True
    try:
        yield
    finally:
        _wanted = False


def _leave() -> None:
    if _wanted:
        os.setsid()


# Python calls it in children of `subprocess`, too, where they have a preexec_fn, as all of Ray's have (2.60.0,
# services.py, start_ray_process).
os.register_at_fork(after_in_child=_leave)
