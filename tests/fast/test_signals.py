"""Signals that ask for the end of a sweep, and whom they reach."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
from collections.abc import Iterator
from unittest.mock import MagicMock

import pytest

pytest.importorskip("ray")

from orchestrator.config.sweep_config import BudgetConfig
from orchestrator.sweep import signals as signals_module
from orchestrator.sweep.own_sessions import children_in_own_sessions
from orchestrator.sweep.signals import STOPPING, Signals
from orchestrator.sweep.stopper import Stopper

ASKING = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(autouse=True)
def _handlers_stay() -> Iterator[None]:
    # Tests may be run by `nohup` as well.
    outside = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    before = {number: signal.getsignal(number) for number in ASKING}
    yield
    assert {number: signal.getsignal(number) for number in ASKING} == before
    signal.signal(signal.SIGHUP, outside)


def made_stopper() -> Stopper:
    return Stopper(MagicMock(), BudgetConfig(), lambda: 0.0, lambda: None)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", ASKING)
def test_before_the_first_trial_and_after_the_last_each_of_them_is_like_ctrl_c(number: int) -> None:
    signals = Signals()
    with signals.heard(), pytest.raises(KeyboardInterrupt):
        send(number)
    assert signals.came


@pytest.mark.parametrize("number", ASKING)
def test_each_of_them_ends_the_sweep_cleanly_and_is_acknowledged_before_the_sweep_has_ended(number: int) -> None:
    signals, stopper, told = Signals(), made_stopper(), queue.SimpleQueue[str]()
    with signals.heard(), signals.to(stopper, told.put):
        send(number)
        assert told.get(timeout=30) == STOPPING
    assert stopper.interrupted
    assert stopper.reason == f"interrupted ({signal.Signals(number).name}): run the same command again to go on"
    assert signals.came


def test_a_sweep_that_ends_by_itself_says_nothing_of_stopping() -> None:
    signals, told = Signals(), queue.SimpleQueue[str]()
    with signals.heard(), signals.to(made_stopper(), told.put):
        pass
    assert told.empty()
    assert not signals.came


def test_signals_that_come_together_are_one() -> None:
    """`timeout` signals its child and then the group of both: the second must not end the sweep at once."""
    signals, stopper = Signals(), made_stopper()
    with signals.heard(), signals.to(stopper, MagicMock()):
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        send(signal.SIGHUP)
    assert stopper.interrupted


def test_before_the_first_trial_the_second_of_two_does_not_cut_off_what_closes() -> None:
    closed: list[str] = []

    def open_something() -> None:
        try:
            send(signal.SIGTERM)
        finally:
            send(signal.SIGTERM)
            closed.append("lock")

    with Signals().heard(), pytest.raises(KeyboardInterrupt):
        open_something()
    assert closed == ["lock"]


def test_one_more_after_a_while_ends_the_run_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals_module, "TOGETHER_S", 0.0)
    ended: list[tuple[int, object]] = []
    signals = Signals()
    with signals.heard(), signals.to(made_stopper(), MagicMock()):
        send(signal.SIGINT)
        monkeypatch.setattr(
            signals_module.os, "kill", lambda _, number: ended.append((number, signal.getsignal(number)))
        )
        signal.raise_signal(signal.SIGINT)
    assert ended == [(signal.SIGINT, signal.SIG_DFL)]


def test_a_run_under_nohup_goes_on_when_its_terminal_closes() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        signals = Signals()
        with signals.heard():
            send(signal.SIGHUP)
        assert not signals.came
    finally:
        signal.signal(signal.SIGHUP, before)


def session_of_a_child() -> int:
    code = "import os; print(os.getsid(0))"
    # With something to do before it execs, as Ray's processes have.
    told = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True, preexec_fn=lambda: None)
    return int(told.stdout)


def test_what_a_cluster_of_our_own_starts_is_out_of_reach_of_signals_to_the_drivers_group() -> None:
    with children_in_own_sessions():
        assert session_of_a_child() != os.getsid(0)
    assert session_of_a_child() == os.getsid(0)
