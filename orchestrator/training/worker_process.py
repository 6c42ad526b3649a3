"""One worker's process of one trial: its log, its process group, its trial, and how that ended."""

from __future__ import annotations

import contextlib
import math
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import deepspeed.ops
import psutil
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore
from torch.distributed import distributed_c10d

from orchestrator.errors import (
    OrchestratorError,
    StorageError,
    TemplateError,
    TrialDivergedError,
    TrialOutOfMemoryError,
    first_line,
)
from orchestrator.results.files import is_storage_failure, write_atomically
from orchestrator.results.folders import TrialFolder
from orchestrator.results.records import TrialStatus
from orchestrator.results.secrets import without_secret
from orchestrator.training import device as devices
from orchestrator.training import training_loop, trial_log
from orchestrator.training.deepspeed_config import compute_dtype, deepspeed_config, to_json
from orchestrator.training.ledger import Ledger, process_age_s
from orchestrator.training.task import START_LIMIT_S, Alive, TrialEnd, TrialProgress, TrialTask, WorkerPlace

Send = Callable[[TrialProgress | TrialEnd | Alive], None]
HEARTBEAT_S = 5.0


def run(task: TrialTask, place: WorkerPlace, send: Send) -> None:
    """Train this worker's part, and send how it ended; never raises.

    The first worker of each node sends a TrialProgress at every evaluation; every worker sends one TrialEnd.
    """
    ledger = None
    log = TrialFolder(Path(task.trial_folder)).worker_log(place.rank)
    try:
        trial_log.redirect_output(log)
        device = devices.choose(place.local_rank, task.gpu_memory_fraction, task.memory_limit_bytes)
        _join(place, device)
        ledger = Ledger(device, startup_s=process_age_s())
        ledger.alive = _heartbeat(send)
        if place.rank == 0:
            _write_settings(task, place, device)
        # One on each node, since what a node has made is stored at every evaluation.
        report = send if place.local_rank == 0 else _say_nothing
        progress = training_loop.train(task, place, ledger, report)
        # Only after a good end: with a worker that failed, the others' collectives would be waited for.
        dist.destroy_process_group()
        end = TrialEnd(TrialStatus.COMPLETED, None, progress)
        if task.last_step is not None:
            why = f"its generation ended at step {task.last_step}: trials that go on from there name it in started_from"
            end = TrialEnd(TrialStatus.STOPPED, why, progress)
    except BaseException as error:
        # Whatever it is, the sweep must hear of it: this process has nobody else to tell, and a log on a full disk has
        # no room for it.
        with contextlib.suppress(OSError):
            traceback.print_exc()
        end = ended_by(error, task, ledger)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    trial_log.hide_secrets(log)
    send(end if place.rank == 0 else TrialEnd(end.status, end.reason, None))


def ended_by(error: BaseException, task: TrialTask, ledger: Ledger | None) -> TrialEnd:
    """What an exception means for the trial."""
    progress = ledger.progress() if ledger and ledger.last else None
    if isinstance(error, TrialDivergedError):
        return TrialEnd(TrialStatus.DIVERGED, str(error), progress)
    if "loss scale already at minimum" in str(error):
        # deepspeed 0.19.8, fp16/loss_scaler.py: no scale is low enough, so the gradients themselves are infinite.
        # Its own scaler says so before MAX_OVERFLOWS is reached; torch's never does.
        diverged = TrialDivergedError(ledger.step if ledger else 0, math.inf, "gradient norm")
        return TrialEnd(TrialStatus.DIVERGED, str(diverged), progress)
    if devices.is_out_of_memory(error):
        micro_batch_size = task.config.micro_batch_size
        assert micro_batch_size != "auto"
        held = devices.held_bytes(ledger.device) if ledger else 0
        full = TrialOutOfMemoryError(ledger.step if ledger else 0, held, devices.asked_bytes(error), micro_batch_size)
        return TrialEnd(TrialStatus.OUT_OF_MEMORY, str(full), progress)
    why, of_network = first_line(error, "no message")[:500], _of_network(error)
    is_of_storage = is_storage_failure(error) and not of_network
    if is_of_storage and not isinstance(error, StorageError):
        told = f"the storage failed ({why}): free some space, or mend the mount"
    elif isinstance(error, OrchestratorError):
        told = str(error)
    else:
        told = f"{type(error).__name__}: {of_network or why}; the whole story is in the trial's log.txt"
    may_pass = is_of_storage or isinstance(error, TemplateError)
    # Here, where the secrets are: the sweep's own process may have others in its environment.
    return TrialEnd(TrialStatus.PREEMPTED if may_pass else TrialStatus.FAILED, without_secret(told), progress)


def _of_network(error: BaseException) -> str | None:
    """What a failure of the network says; it reads as a storage's: "Host is down", or NCCL's "No space left on device",
    in shared memory."""
    if not isinstance(error, dist.DistError) and "gloo/transport" not in str(error):
        return None
    if "/dev/shm" in str(error):
        return f"{str(error).splitlines()[-1]}: enlarge /dev/shm, as docker run --shm-size does"
    return first_line(error, "no message")[:500]


def _heartbeat(send: Send) -> Callable[[], None]:
    """At most every few seconds, whatever a step takes."""
    told_s = -math.inf

    def alive() -> None:
        nonlocal told_s
        if time.monotonic() - told_s > HEARTBEAT_S:
            told_s = time.monotonic()
            send(Alive())

    return alive


def _say_nothing(_: TrialProgress | TrialEnd) -> None:
    """The other workers of a node have nothing to add."""


def compile_no_ops() -> None:
    """Keep DeepSpeed from compiling: to be called before its first engine, by a template or a worker."""
    # On a CPU it would build a shared-memory collective with g++ in the middle of the first trial (0.19.8,
    # comm/torch.py, build_shm_op: 45 s); gloo does the same work. An op missing here counts as incompatible, and
    # the settings in deepspeed_config use none but the one of `cpu_adam`, where it was built ahead.
    deepspeed.ops.__compatible_ops__ = {}


def _join(place: WorkerPlace, device: torch.device) -> None:
    """The process group, over the store of the sweep."""
    compile_no_ops()
    # DeepSpeed reads these, and without them looks for MPI.
    os.environ |= {
        "RANK": str(place.rank),
        "LOCAL_RANK": str(place.local_rank),
        "WORLD_SIZE": str(place.world_size),
        "MASTER_ADDR": place.store_host,
        "MASTER_PORT": str(place.store_port),
    }
    if place.world_size > 1 and (interface := _interface_towards(place.store_host)):
        # gloo would take the address of this node's own name, which is 127.0.1.1 where Debian set it up: other nodes'
        # workers then look for it on their own (torch 2.13.0, ProcessGroupGloo.cpp). A user's own choice wins.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    # Otherwise one worker's NCCL error ends the NCCL trials that follow too: they look for its signal to dump, which
    # has no prefix in the store that outlives them all (torch 2.13.0, ProcessGroupNCCL.cpp, globalStore_).
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
    if place.world_size == 1:
        # A communicator has its tables for every channel, of which one without peers has 64: 388 MiB for each of
        # DeepSpeed's two groups (NCCL 2.29.7, channel.cc, `initChannel`; measured in sglang's pull request 35538).
        os.environ.setdefault("NCCL_MAX_NCHANNELS", "1")
    # One worker reads the model under ZeRO-3, and one saves, while the others wait in a collective operation: for 10
    # minutes, as torch has it. Its own defaults, which DeepSpeed's groups take (0.19.8, comm/torch.py, new_group).
    distributed_c10d.default_pg_timeout = timedelta(seconds=START_LIMIT_S)
    distributed_c10d.default_pg_nccl_timeout = distributed_c10d.default_pg_timeout  # type: ignore[attr-defined]
    # The store waits by its own clock for who comes late, as a first worker whose node still fetches the model does.
    store: Store = (
        HashStore()
        if place.world_size == 1 and place.store_port == 0
        else TCPStore(place.store_host, place.store_port, is_master=False, timeout=timedelta(seconds=START_LIMIT_S))
    )
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=PrefixStore(place.store_prefix, store),
        rank=place.rank,
        world_size=place.world_size,
        device_id=device if device.type == "cuda" else None,
    )


def _interface_towards(host: str) -> str | None:
    """The network interface of this node by which the host is reached."""
    family, kind, _, _, address = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        # Only chooses a route: nothing is sent.
        probe.connect(address)
        own = probe.getsockname()[0]
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, addresses in interfaces if own in {one.address for one in addresses}), None)


def _write_settings(task: TrialTask, place: WorkerPlace, device: torch.device) -> None:
    """deepspeed.json; a DDP trial has none."""
    if task.config.engine != "deepspeed":
        return
    dtype = compute_dtype(task.config.precision, devices.half_precision(device))
    on_gpu, has_cpu_adam = device.type == "cuda", devices.has_cpu_adam(device)
    settings = deepspeed_config(task.config, place.world_size, dtype, on_gpu, has_cpu_adam)
    write_atomically(TrialFolder(Path(task.trial_folder)).deepspeed, to_json(settings))
