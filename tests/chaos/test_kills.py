"""A fixed few of the kills that benchmarks/chaos.py draws, over one sweep."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.chaos import KINDS, Kill, drawn_kills, endure, sweep_keys

pytestmark = pytest.mark.timeout(600)


def test_a_sweep_whose_worker_and_then_driver_are_killed_loses_nothing_and_repeats_nothing(tmp_path: Path) -> None:
    kills = [Kill("worker", 60), Kill("driver SIGKILL", 270)]
    ordeal = endure(sweep_keys(tmp_path / "0", trials=2, steps=200), kills, seed=0)
    assert ordeal.wrong == []
    assert ordeal.kills == kills
    assert ordeal.runs == 2
    # The first trial when its worker was lost, the second when the driver was.
    assert ordeal.went_on == 2


def test_the_seed_alone_says_what_is_killed_and_when() -> None:
    drawn = [drawn_kills(seed, 24, 900) for seed in range(40)]
    assert drawn == [drawn_kills(seed, 24, 900) for seed in range(40)]
    assert {kill.what for kills in drawn for kill in kills} == set(KINDS)
    assert all(0 < kill.at_step < 900 for kills in drawn for kill in kills)
