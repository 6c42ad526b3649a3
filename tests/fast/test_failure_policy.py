from __future__ import annotations

import pytest

from orchestrator.results.records import TrialStatus
from orchestrator.sweep.failure_policy import (
    LONGEST_PAUSE_S,
    SILENCE_LIMIT_S,
    START_LIMIT_S,
    after_end,
    avoided_nodes,
    pause_s,
    silence_limit_s,
    tracking_failure,
    upload_limit_s,
)

S = TrialStatus


@pytest.mark.parametrize(
    ("status", "may_pass", "attempts"),
    [
        (S.PREEMPTED, False, 3),
        (S.FAILED, True, 2),
        (S.FAILED, False, 1),
        (S.OUT_OF_MEMORY, False, 1),
        (S.DIVERGED, False, 1),
        (S.COMPLETED, False, 1),
        (S.STOPPED, False, 1),
    ],
)
def test_only_what_came_from_outside_is_tried_again_and_not_for_ever(
    status: TrialStatus, may_pass: bool, attempts: int
) -> None:
    attempt = 1
    while retry := after_end(status, "why", may_pass, attempt):
        assert "why" in retry.why
        attempt += 1
    assert attempt == attempts


def test_a_trial_that_failed_twice_on_a_node_keeps_away_from_it() -> None:
    assert avoided_nodes([]) == avoided_nodes(["a"]) == avoided_nodes(["a", "b"]) == frozenset()
    assert avoided_nodes(["a", "b", "a"]) == {"a"}


def test_a_large_file_gets_longer_to_arrive_and_longer_still_where_it_did_not() -> None:
    assert upload_limit_s(10, 0, 0) == 10
    assert upload_limit_s(10, 5 * 10**9, 0) == 510
    assert upload_limit_s(10, 5 * 10**9, 1) == 1020
    assert upload_limit_s(10, 0, 10_000) < 600


def test_the_pauses_grow_and_stay_bounded() -> None:
    assert [pause_s(n) for n in (1, 2, 3)] == [2, 4, 8]
    assert pause_s(10_000) == LONGEST_PAUSE_S


def test_a_trial_hangs_after_many_times_its_longest_silence() -> None:
    assert silence_limit_s(None) == START_LIMIT_S
    assert silence_limit_s(1) == SILENCE_LIMIT_S
    assert silence_limit_s(500) == 5000


@pytest.mark.parametrize(
    ("code", "meaning"),
    [
        (None, "away"),
        ("INTERNAL_ERROR", "away"),
        ("TEMPORARILY_UNAVAILABLE", "away"),
        ("RESOURCE_DOES_NOT_EXIST", "gone"),
        ("INVALID_PARAMETER_VALUE", "refused"),
        # Of one trial's run, which this account may not delete: the other trials' figures need it not.
        ("PERMISSION_DENIED", "refused"),
    ],
)
def test_a_server_that_is_away_is_asked_again_and_one_that_refuses_is_not(code: str | None, meaning: str) -> None:
    assert tracking_failure(code) == meaning
