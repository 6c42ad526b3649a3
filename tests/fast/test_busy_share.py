"""How busy a cloud was, by when its trials worked: filling it, handing over and emptying it are told apart."""

from __future__ import annotations

import pytest

from benchmarks.cloud import busy_share, full_span
from benchmarks.sweeps import Work, startups

LAUNCHED, SLOTS = 0.0, 2
# Slot A: 10 to 20, 22 to 32, 33 to 43. Slot B starts later: 14 to 24, 28 to 38, and then nothing is left for it.
WORKS = [
    Work(f"trial-{place}", started, started + 10.0) for place, started in enumerate((10.0, 14.0, 22.0, 28.0, 33.0))
]


def test_the_first_start_of_a_slot_is_no_hand_over() -> None:
    first, between = startups(WORKS, SLOTS, LAUNCHED)
    assert first == [10, 14]
    assert between == [2, 4, 1]


def test_the_whole_share_counts_filling_and_emptying_against_the_gpus() -> None:
    assert busy_share(WORKS, SLOTS, 10.0, 43.0) == pytest.approx(50 / 66)


def test_the_full_share_is_from_all_slots_at_work_until_nothing_waits_and_loses_hand_overs_alone() -> None:
    started, ended = full_span(WORKS, SLOTS)
    assert (started, ended) == (14.0, 33.0)
    lost_s = (2 + 4 + 1) / (SLOTS * (ended - started))
    assert busy_share(WORKS, SLOTS, started, ended) == pytest.approx(1 - lost_s)
