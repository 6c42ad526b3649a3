from __future__ import annotations

import signal

import pytest

pytest.importorskip("ray")

from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2.api.exceptions import WorkerGroupError

from orchestrator.results.records import TrialStatus
from orchestrator.sweep.worker import TEMPLATE_DIED, unexpected_end
from orchestrator.sweep.worker_group import why_lost

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


def test_a_worker_that_rays_memory_monitor_ended_is_told_as_that_and_no_other_is() -> None:
    def lost(death: Exception) -> str:
        return why_lost(WorkerGroupError("gone", {1: WorkerHealthCheckFailedError("no answer", failure=death)}))

    assert "resources.max_concurrent" in lost(OutOfMemoryError("the node was running low on memory"))
    assert (
        lost(ActorDiedError()) == "a worker or its node died (WorkerGroupError: Training failed due to worker errors:)"
    )
    assert "max_concurrent" not in why_lost(RuntimeError("the controller is gone"))
