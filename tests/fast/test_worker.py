from __future__ import annotations

import platform
import signal
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray")

from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2.api.exceptions import WorkerGroupError

from orchestrator.errors import StorageError
from orchestrator.results.records import TrialStatus
from orchestrator.sweep.worker import TEMPLATE_DIED, GroupShape, allocator, environment, unexpected_end
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


@pytest.mark.skipif((sys.platform, platform.machine()) != ("linux", "x86_64"), reason="known on Linux on x86-64 alone")
def test_trials_on_cpus_allocate_by_rays_jemalloc_where_it_is_and_the_user_preloads_nothing(tmp_path: Path) -> None:
    on_cpus, library = GroupShape(1, 0.0, 1.0), tmp_path / "libjemalloc.so"
    assert allocator(on_cpus, {}, library) == {}, "ld.so would complain of a file that is missing in every process"
    library.touch()
    assert allocator(on_cpus, {}, library) == {"LD_PRELOAD": str(library), "MALLOC_CONF": "retain:false"}
    assert allocator(on_cpus, {"MALLOC_CONF": "narenas:1"}, library)["MALLOC_CONF"] == "narenas:1"
    assert allocator(on_cpus, {"LD_PRELOAD": "libtcmalloc.so.4"}, library) == {}
    assert allocator(GroupShape(1, 0.5, 1.0), {}, library) == {}, "nor does it change what trials on GPUs do"


@pytest.mark.parametrize(("system", "machine"), [("darwin", "x86_64"), ("linux", "aarch64")])
def test_where_jemalloc_was_not_tried_the_c_librarys_heap_stays(
    system: str, machine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    (tmp_path / "libjemalloc.so").touch()
    assert allocator(GroupShape(1, 0.0, 1.0), {}, tmp_path / "libjemalloc.so") == {}


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
