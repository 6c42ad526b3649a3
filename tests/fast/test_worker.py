from __future__ import annotations

import signal

import pytest

pytest.importorskip("ray")

from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2.api.exceptions import WorkerGroupError

from orchestrator.errors import StorageError
from orchestrator.results.records import TrialStatus
from orchestrator.sweep.worker import TEMPLATE_DIED, GroupShape, environment, unexpected_end
from orchestrator.sweep.worker_group import why_lost

S = TrialStatus


@pytest.mark.parametrize(
    ("exit_code", "may_be_memory", "on_gpu", "status", "may_pass"),
    [
        (-signal.SIGKILL, True, False, S.OUT_OF_MEMORY, False),
        (-signal.SIGKILL, True, True, S.FAILED, True),
        (-signal.SIGKILL, False, False, S.FAILED, True),
        (-signal.SIGTERM, True, False, S.FAILED, True),
        (TEMPLATE_DIED, False, False, S.FAILED, True),
        (-signal.SIGSEGV, False, False, S.FAILED, False),
        (3, False, True, S.FAILED, False),
    ],
)
def test_only_the_out_of_memory_killers_kill_on_a_cpu_is_the_trials_lack_of_memory_and_other_kills_may_pass(
    exit_code: int, may_be_memory: bool, on_gpu: bool, status: TrialStatus, may_pass: bool
) -> None:
    end = unexpected_end(exit_code, may_be_memory, on_gpu)
    assert (end.status, end.may_pass) == (status, may_pass)
    assert end.reason


def test_host_memory_that_runs_out_beside_a_gpu_is_told_as_that() -> None:
    reason = unexpected_end(-signal.SIGKILL, may_be_memory=True, on_gpu=True).reason
    assert reason is not None
    assert "host memory ran out: lower offload" in reason
    assert "micro_batch_size" not in reason


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_large_pinned_memory_is_not_rounded_up_unless_the_user_set_up_the_allocator(name: str) -> None:
    shape = GroupShape(1, 1.0, 4.0)
    assert environment(shape, {})["PYTORCH_ALLOC_CONF"] == "pinned_max_round_threshold_mb:64"
    assert environment(shape, {name: "expandable_segments:True"}) == {"OMP_NUM_THREADS": "4"}


def test_a_worker_that_rays_memory_monitor_ended_is_told_as_that_and_no_other_is() -> None:
    def lost(death: Exception) -> str:
        return why_lost(WorkerGroupError("gone", {1: WorkerHealthCheckFailedError("no answer", failure=death)}))

    assert "resources.max_concurrent" in lost(OutOfMemoryError("the node was running low on memory"))
    assert (
        lost(ActorDiedError()) == "a worker or its node died (WorkerGroupError: Training failed due to worker errors:)"
    )
    assert "max_concurrent" not in why_lost(RuntimeError("the controller is gone"))


def test_a_group_that_was_not_started_since_the_sweeps_folder_is_gone_is_told_as_that() -> None:
    assert why_lost(StorageError("sweeps/demo is gone: bring it back")) == "sweeps/demo is gone: bring it back"
