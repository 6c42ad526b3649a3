"""Marks every test with its tier, the name of its folder; lets all be interrupted; ends the sweeps that one leaves."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent
TIERS = ("fast", "training", "ray", "chaos", "clusters", "gpu")

# A shell that starts the tests in the background has them ignore Ctrl-C, and with them all that they send it to.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        tier = item.path.relative_to(ROOT).parts[0]
        if tier in TIERS:
            item.add_marker(getattr(pytest.mark, tier))


def pytest_runtest_teardown() -> None:
    if sweeps := sys.modules.get("tests.ray.sweeps"):
        sweeps.end_all()
