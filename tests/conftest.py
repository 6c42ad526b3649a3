"""Marks every test with its tier: the name of its folder."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parent
TIERS = ("fast", "training", "ray", "chaos", "clusters", "gpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        tier = item.path.relative_to(ROOT).parts[0]
        if tier in TIERS:
            item.add_marker(getattr(pytest.mark, tier))
