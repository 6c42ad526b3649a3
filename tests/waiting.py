"""Waiting in tests: always for something, never longer than a limit."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(look: Callable[[], T], good: Callable[[T], bool], limit_s: float) -> T:
    """Poll; past the limit, fail with the last state seen, which is what the log's reader needs."""
    deadline = time.monotonic() + limit_s
    while not good(seen := look()):
        assert time.monotonic() < deadline, f"still {seen!r} after {limit_s} s"
        time.sleep(0.05)
    return seen
