"""A cluster's head that goes away: one that comes back in time is none of our business."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import pytest

pytest.importorskip("ray")

from orchestrator.sweep import head_watch
from orchestrator.sweep.head_watch import is_lost, last_words, patience_s
from tests.tracking_servers import free_port


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_watch, "LOOK_S", 0.01)


def looked(answers: Iterable[bool], limit_s: float) -> tuple[bool, bool]:
    """Whether it was taken for lost, and whether before the last of the answers, with which the sweep ends."""
    ended, left = threading.Event(), list(answers)

    def answer() -> bool:
        if len(left) == 1:
            ended.set()
        return left.pop(0)

    return is_lost(answer, lambda: limit_s, ended), bool(left)


def test_a_head_that_stays_away_is_lost_after_the_limit_and_not_before() -> None:
    assert looked([True] * 2 + [False] * 200, limit_s=0.2) == (True, True)
    assert looked([True] * 2 + [False] * 10, limit_s=10) == (False, False)


def test_a_head_that_comes_back_in_time_is_not_lost_and_its_silences_do_not_add_up() -> None:
    assert looked(([True] + [False] * 60) * 5, limit_s=2) == (False, False)


def test_a_head_that_cannot_be_asked_from_here_is_never_taken_for_lost() -> None:
    assert looked([False] * 50, limit_s=0.1) == (False, True)


@pytest.mark.parametrize(
    ("rays_limit", "seconds"), [(None, 50), ("600", 500), ("12", 10), ("soon", 50)], ids=["unset", "more", "less", "no"]
)
def test_the_sweep_waits_a_little_less_than_ray_does(rays_limit: str | None, seconds: float) -> None:
    assert patience_s(rays_limit, interrupted=False) == pytest.approx(seconds)


@pytest.mark.parametrize(("rays_limit", "seconds"), [(None, 5), ("600", 5), ("3", 2.5)])
def test_a_sweep_that_was_asked_to_end_does_not_wait_for_a_head_that_was_asked_too(
    rays_limit: str | None, seconds: float
) -> None:
    assert patience_s(rays_limit, interrupted=True) == pytest.approx(seconds)


def test_a_signal_that_comes_while_the_head_is_silent_shortens_the_wait() -> None:
    limits_s = iter([10.0] * 5 + [0.0])
    ended = threading.Event()
    answers = iter([True] * 2 + [False] * 20)
    assert is_lost(lambda: next(answers), lambda: next(limits_s), ended)


def test_a_head_that_was_ended_with_its_driver_leaves_an_interrupted_sweep_and_not_a_lost_cluster() -> None:
    exit_code, why = last_words("127.0.0.1:6379", 5, interrupted=True)
    assert exit_code == 130
    assert "What had ended before is safe, and running trials go on from their last checkpoints" in why
    assert why.endswith("run the same command again")


def test_the_process_of_a_sweep_whose_head_is_lost_ends_with_3_and_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    port, codes, said, ended = free_port(), list[int](), list[str](), threading.Event()

    def end(code: int) -> None:
        codes.append(code)
        ended.set()

    context: Any = type("Context", (), {"gcs_address": f"127.0.0.1:{port}"})
    monkeypatch.setattr(head_watch.ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(head_watch.os, "_exit", end)
    monkeypatch.setattr(head_watch, "RAYS_LIMIT_S", 0.1)
    monkeypatch.delenv(head_watch.RAYS_LIMIT, raising=False)
    head = head_watch.socket.create_server(("127.0.0.1", port))
    with head_watch.told_of_a_lost_head(said.append, lambda: False):
        assert not ended.wait(0.3)
        head.close()
        assert ended.wait(10)
    assert codes == [3]
    assert "has not answered for 0 s. What had ended before is safe" in said[0]
    assert said[0].endswith("the same command goes on")
