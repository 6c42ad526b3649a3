"""What runs in every worker of a group: wait for a trial, fork its process, pass on what it says.

The worker itself imports no torch: its template does, in a process of its own, and that is what a trial waits for.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import platform
import re
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.backend import Backend, BackendConfig
from ray.util import get_current_placement_group

from orchestrator.errors import StorageError
from orchestrator.results.folders import TrialFolder
from orchestrator.results.records import TrialStatus
from orchestrator.sweep.switchboard import STOPPED, Assignment
from orchestrator.sweep.trial_files import Keep, leave_nothing, on_this_node
from orchestrator.sweep.trial_messages import SilentError, messages
from orchestrator.training import trial_log
from orchestrator.training.child import run_child
from orchestrator.training.task import TrialEnd, TrialProgress, WorkerNode

log = logging.getLogger(__name__)
ACCELERATOR = "accelerator_type:"
"""Of the resource by which Ray names a node's GPUs (ray.util.accelerators)."""
TEMPLATE = "orchestrator.training.template"
TEMPLATE_DIED = 255
"""So a forkserver's children end when it is gone (Python 3.11, multiprocessing/popen_forkserver.py)."""
STORE_LIMIT_S = 300.0
"""So long the store may be away at the end of a trial, whose results are lost otherwise."""
JEMALLOC = Path(ray.__file__).parent / "core" / "libjemalloc.so"
"""Of this node's Ray, which runs its own GCS and raylets with it (ray 2.60.0, services.py, JEMALLOC_SO)."""


@dataclass(frozen=True, slots=True)
class GroupShape:
    """What a worker group takes of the cluster."""

    workers: int
    gpus_per_worker: float
    cpus_per_worker: float
    accelerator: str | None = None
    """The type of GPU, where the cluster has several."""
    on_one_node: bool = False
    """Its workers must not lie on several nodes, whose network is slower than what joins a node's GPUs."""

    @property
    def gpus(self) -> float:
        """What a trial holds of the cluster's GPUs."""
        return self.workers * self.gpus_per_worker

    @property
    def bundle(self) -> dict[str, float]:
        """What one worker takes, as Ray counts it."""
        taken = {"CPU": self.cpus_per_worker}
        if self.gpus_per_worker:
            taken["GPU"] = self.gpus_per_worker
        if self.accelerator:
            taken[f"{ACCELERATOR}{self.accelerator}"] = 0.001
        return taken


class _NoProcessGroup(Backend):
    """The trials' processes make their own process groups; the workers that fork them must hold no GPU memory."""

    share_cuda_visible_devices = True


@dataclass
class WorkerConfig(BackendConfig):
    """A TorchTrainer's `torch_config` that leaves torch.distributed and CUDA alone."""

    backend: str = "none"
    """TorchTrainer asks for it (ray 2.60.0)."""

    @property
    def backend_cls(self) -> type[Backend]:
        """No set-up in the workers."""
        return _NoProcessGroup


def serve(config: dict[str, Any]) -> None:
    """The loop of every worker: wait for a trial, run its process, tell how it ended, wait again."""
    board, group_id, shape = config["board"], config["group_id"], config["shape"]
    context = ray.train.get_context()
    rank, local_rank = context.get_world_rank(), context.get_local_rank()
    node = WorkerNode(ray.get_runtime_context().get_node_id(), socket.gethostname())
    ray.get(board.come_up.remote(group_id, rank, node, get_current_placement_group()))
    os.environ |= environment(shape, os.environ) | allocator(shape, os.environ, JEMALLOC)
    template = multiprocessing.get_context("forkserver")
    template.set_forkserver_preload([TEMPLATE])
    _start_template()
    model_folder = _local_model(config["model"])
    turn = 0
    while assignment := ray.get(board.next_assignment.remote(group_id, rank, local_rank, turn)):
        turn = assignment.turn
        task = replace(assignment.task, model_folder=model_folder)
        try:
            here, keep = on_this_node(task, assignment.place, group_id)
            _run_trial(board, group_id, replace(assignment, task=here), keep, on_gpu=shape.gpus_per_worker > 0)
        except StorageError as error:
            board.send.remote(group_id, turn, rank, TrialEnd(TrialStatus.PREEMPTED, str(error), None))
    if turn:
        leave_nothing(task, group_id)


def environment(shape: GroupShape, given: Mapping[str, str]) -> dict[str, str]:
    """What the template is to find in its environment besides, before torch reads it."""
    more = {"OMP_NUM_THREADS": str(max(1, int(shape.cpus_per_worker)))}
    if not any(name in given for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")):
        # Pinned host memory would be rounded up to a power of two, which takes of what ZeRO offloads up to twice as
        # much as there is (torch 2.13, ATen/core/CachingHostAllocator.h, `roundSize`).
        more["PYTORCH_ALLOC_CONF"] = "pinned_max_round_threshold_mb:64"
    return more


def allocator(shape: GroupShape, given: Mapping[str, str], jemalloc: Path) -> dict[str, str]:
    """What makes the template, and trials on CPUs with it, allocate by jemalloc; nothing where that is not there.

    torch asks for aligned blocks, of which glibc's heap keeps holes that take no block of the same size again: peaks
    are 8 to 37 % lower with jemalloc (docs/reference.md, Memory). The worker itself runs already and stays as it is.
    """
    is_known = sys.platform == "linux" and platform.machine() == "x86_64"
    if shape.gpus_per_worker or "LD_PRELOAD" in given or not is_known or not jemalloc.is_file():
        return {}
    # RLIMIT_DATA, by which memory_per_worker is held, counts what is mapped: by default jemalloc unmaps nothing.
    return {"LD_PRELOAD": str(jemalloc), "MALLOC_CONF": given.get("MALLOC_CONF", "retain:false")}


def _start_template() -> None:
    from multiprocessing import forkserver

    with _without_main_module():
        forkserver.ensure_running()


def _local_model(model: str) -> str:
    """A folder of this node with the base model: fetched or built once a node, whoever comes first."""
    from orchestrator.training import model_source

    return str(model_source.materialize(model_source.resolve(model)))


@contextlib.contextmanager
def _without_main_module() -> Iterator[None]:
    # multiprocessing would run Ray's worker script once more in every child, 0.2 s and an import of ray for nothing.
    main = sys.modules["__main__"]
    file = main.__dict__.pop("__file__", None)
    try:
        yield
    finally:
        if file is not None:
            main.__file__ = file


def _run_trial(board: Any, group_id: str, assignment: Assignment, keep: Keep, on_gpu: bool) -> None:
    reports, child_end = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("forkserver").Process(
        target=run_child, args=(assignment.task, assignment.place, child_end), daemon=True
    )
    with _without_main_module():
        process.start()
    child_end.close()
    stopped = threading.Event()
    # A thread, since Ray's wait cannot be joined with that on a pipe; it ends with the turn.
    stopper = threading.Thread(
        target=_kill_when_told, args=(board, group_id, assignment.turn, process, stopped), daemon=True
    )
    stopper.start()
    rank = assignment.place.rank
    ended, late, oom_kills = False, None, _oom_kills()
    try:
        for message in messages(reports, process, assignment.task.time_limit_s):
            ended = ended or isinstance(message, TrialEnd)
            _keep_before(message, keep)
            if rank == 0 or isinstance(message, TrialEnd):
                board.send.remote(group_id, assignment.turn, rank, message)
    except TimeoutError as error:
        process.kill()
        late = TrialEnd(TrialStatus.FAILED, str(error), None, may_pass=isinstance(error, SilentError))
    process.join()
    if not ended:
        may_be_memory = oom_kills is None or oom_kills != _oom_kills()
        end = STOPPED if stopped.is_set() else late or unexpected_end(process.exitcode, may_be_memory, on_gpu)
        # It was killed before it could do so itself.
        trial_log.hide_secrets(TrialFolder(Path(assignment.task.trial_folder)).worker_log(rank))
        _keep_before(end, keep)
        board.send.remote(group_id, assignment.turn, rank, end)
    process.close()
    reports.close()
    stopper.join()


def _keep_before(message: TrialProgress | TrialEnd, keep: Keep) -> None:
    """Who hears of it finds the files that belong to it. What an evaluation cannot store the next one does."""
    if isinstance(message, TrialEnd):
        keep(STORE_LIMIT_S)
        return
    try:
        keep(0.0)
    except StorageError as error:
        log.warning("%s; it is tried again at the next evaluation", error)


def _kill_when_told(board: Any, group_id: str, turn: int, process: ForkServerProcess, stopped: threading.Event) -> None:
    with contextlib.suppress(ray.exceptions.RayActorError):
        ray.get(board.wait_for_stop.remote(group_id, turn))
    # The turn's own end wakes this wait too: then there is nothing left to kill.
    with contextlib.suppress(ValueError):
        if process.is_alive():
            stopped.set()
            process.kill()


def unexpected_end(exit_code: int | None, may_be_memory: bool, on_gpu: bool) -> TrialEnd:
    """What it means that a trial's process is gone without a word.

    may_be_memory: the kernel's out-of-memory killer struck meanwhile, or cannot be asked.
    """
    if exit_code == -signal.SIGKILL and may_be_memory:
        reason = "its process was killed (SIGKILL), most likely because host memory ran out: lower "
        if not on_gpu:
            return TrialEnd(TrialStatus.OUT_OF_MEMORY, f"{reason}micro_batch_size", None)
        # It says nothing of the GPU: a smaller micro-batch would not help, and no other trial is too large by it. What
        # else was on the node decides whether it passes.
        reason += "offload or resources.max_concurrent, so that a node holds less at once"
        return TrialEnd(TrialStatus.FAILED, reason, None, may_pass=True)
    if exit_code in (-signal.SIGKILL, -signal.SIGTERM, TEMPLATE_DIED):
        by = "with the template that it was forked from" if exit_code == TEMPLATE_DIED else "from outside"
        return TrialEnd(TrialStatus.FAILED, f"its process was killed {by}", None, may_pass=True)
    what = f"signal {-exit_code}" if exit_code is not None and exit_code < 0 else f"exit code {exit_code}"
    return TrialEnd(TrialStatus.FAILED, f"its process ended with {what} before the trial did: see its log.txt", None)


def _oom_kills() -> int | None:
    """How often the out-of-memory killer has struck since this machine started (/proc/vmstat, Linux 4.13 on)."""
    try:
        found = re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) if found else None
