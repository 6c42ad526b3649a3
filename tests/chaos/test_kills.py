"""A fixed dozen of the kills that benchmarks/chaos.py draws, over one sweep."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.chaos import KINDS, SERVER, Kill, drawn_kills, endure, sweep_keys

pytestmark = pytest.mark.timeout(600)


# After how many of the 720 steps; the last while a trial is at work for certain.
DOZEN = [
    Kill("worker", 40),
    Kill("trial", 90),
    Kill("template", 140),
    Kill(SERVER, 190),
    Kill("slot", 240),
    Kill("driver SIGKILL", 290),
    Kill("controller", 340),
    Kill("trial", 390),
    Kill("worker", 440),
    Kill("template", 490),
    Kill("driver SIGTERM", 540),
    Kill("slot", 590),
]


def test_a_sweep_in_which_a_dozen_processes_are_killed_loses_nothing_and_repeats_nothing(tmp_path: Path) -> None:
    ordeal = endure(sweep_keys(tmp_path / "0", trials=12, steps=60, concurrent=2), DOZEN, seed=0)
    assert ordeal.wrong == []
    assert ordeal.kills == DOZEN
    # The first, and one more after each kill that ended the driver.
    assert ordeal.runs == 3
    assert ordeal.went_on >= 2


def test_the_seed_alone_says_what_is_killed_and_when() -> None:
    drawn = [drawn_kills(seed, 24, 900) for seed in range(40)]
    assert drawn == [drawn_kills(seed, 24, 900) for seed in range(40)]
    assert {kill.what for kills in drawn for kill in kills} == set(KINDS)
    assert all(0 < kill.at_step < 900 for kills in drawn for kill in kills)
