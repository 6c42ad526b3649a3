from __future__ import annotations

import signal

import pytest

pytest.importorskip("ray")

from orchestrator.results.records import TrialStatus
from orchestrator.sweep.worker import TEMPLATE_DIED, unexpected_end

S = TrialStatus


@pytest.mark.parametrize(
    ("exit_code", "may_be_memory", "status", "may_pass"),
    [
        (-signal.SIGKILL, True, S.OUT_OF_MEMORY, False),
        (-signal.SIGKILL, False, S.FAILED, True),
        (-signal.SIGTERM, True, S.FAILED, True),
        (TEMPLATE_DIED, False, S.FAILED, True),
        (-signal.SIGSEGV, False, S.FAILED, False),
        (3, False, S.FAILED, False),
    ],
)
def test_only_the_out_of_memory_killers_kill_is_a_lack_of_memory_and_other_kills_may_pass(
    exit_code: int, may_be_memory: bool, status: TrialStatus, may_pass: bool
) -> None:
    end = unexpected_end(exit_code, may_be_memory)
    assert (end.status, end.may_pass) == (status, may_pass)
    assert end.reason
