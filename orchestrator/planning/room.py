"""What room a cluster has: workers on each node, trials at a time, and the memory that each may take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from orchestrator.config.constraint import parse
from orchestrator.config.sweep_config import ResourcesConfig
from orchestrator.errors import InputError
from orchestrator.planning.hardware import GIB, Hardware
from orchestrator.planning.step_time import Placement

SPARE = 0.97
"""Share of a GPU's memory that a trial may be planned to take: the driver keeps some for itself."""
HOST_SHARE = 0.9
"""Share of a host's memory that trials on its CPUs may be planned to take: Ray and the system have the rest."""
MOST_SHARES = 10_000
"""Ray counts a GPU in ten-thousandths."""


@dataclass(frozen=True, slots=True)
class WorkerShape:
    """What one trial takes."""

    workers: int
    gpus_per_worker: float
    cpus_per_worker: float
    limit_bytes: int | None = None
    """The most memory that a worker may take, whatever is there."""
    bound_bytes: float = math.inf
    """The most that the constraints let be measured of it."""
    gpu_shared_by: int = 1
    """Trials at a time on a GPU."""


def worker_shape(resources: ResourcesConfig, hardware: Hardware) -> WorkerShape:
    """The shape that the sweep file asks for on this hardware; `auto` is a whole GPU, until the trials are known.

    Raises:
        InputError: it asks for no GPU where there are some.
    """
    gpus = resources.gpus_per_worker
    if gpus == 0 and hardware.device == "cuda":
        # A process to which Ray gives no GPU sees all of them, and would take the first.
        raise InputError(
            "resources.gpus_per_worker is 0 where there are GPUs, of which all trials would take the first: leave it "
            "out for a whole GPU each, or name a share or auto; to train on CPUs hide the GPUs, by "
            "CUDA_VISIBLE_DEVICES= before this command, or before `ray start` on every node"
        )
    if not isinstance(gpus, float | int):
        gpus = 1.0 if hardware.device == "cuda" else 0.0
    return WorkerShape(resources.workers_per_trial, float(gpus), resources.cpus_per_worker, resources.memory_per_worker)


def bound_bytes(constraints: Sequence[str]) -> float:
    """The least that is an upper bound of a trial's memory; infinite where there is none."""
    found = (parse(text) for text in constraints)
    return min((one.bound for one in found if one.metric == "peak_memory_bytes" and one.is_upper), default=math.inf)


def rooms_of(hardware: Hardware, shape: WorkerShape) -> list[int]:
    """Workers that each node has room for."""
    return [workers_on(cpus, gpus, shape.cpus_per_worker, shape.gpus_per_worker) for cpus, gpus in hardware.each_node]


def workers_on(cpus: float, gpus: float, cpus_per_worker: float, gpus_per_worker: float) -> int:
    """Workers that a node has room for."""
    by_cpu = int(cpus / cpus_per_worker + 1e-9)
    if not gpus_per_worker:
        return by_cpu
    # A share of a GPU lies on one GPU: 0.4 fits twice on each, not 2.5 times.
    per_gpu = int(1 / gpus_per_worker + 1e-9) if gpus_per_worker < 1 else 1 / gpus_per_worker
    return min(by_cpu, int(gpus * per_gpu + 1e-9))


def sharing(gpus_per_worker: float, at_once: int) -> int:
    """Trials at a time on one GPU, of so many at a time: Ray fills one before it takes another."""
    return max(1, min(int(1 / gpus_per_worker + 1e-9), at_once)) if 0 < gpus_per_worker < 1 else 1


@cache
def placement(hardware: Hardware, shape: WorkerShape) -> Placement:
    """Where a trial's workers run: on one node where one has room for them."""
    nodes = min(max(1, hardware.nodes), math.ceil(shape.workers / max(1, *rooms_of(hardware, shape))))
    return Placement(shape.workers, shape.cpus_per_worker, shape.gpu_shared_by, nodes)


def trials_that_fit(rooms: Sequence[int], workers: int, *, on_one_node: bool) -> int:
    """Trials at a time on nodes that have room for so many workers each, a trial's on one of them or spread."""
    return sum(room // workers for room in rooms) if on_one_node else sum(rooms) // workers


def more_room(hardware: Hardware, shape: WorkerShape, needed_bytes: int) -> str | None:
    """What of `resources` leaves a worker so much, and changes nothing of the trial; None: nothing does."""
    hints = []
    if shape.limit_bytes is not None and shape.limit_bytes < needed_bytes:
        hints.append(f"resources.memory_per_worker {math.ceil(needed_bytes / GIB * 10) / 10:g}GiB")
        shape = replace(shape, limit_bytes=None)
    if memory_for_a_worker(hardware, shape, 1) < needed_bytes:
        alone = replace(shape, gpus_per_worker=1.0)
        if not 0 < shape.gpus_per_worker < 1 or memory_for_a_worker(hardware, alone, 1) < needed_bytes:
            return None
        share = needed_bytes / memory_for_a_worker(hardware, alone, 1)
        hints.append(f"resources.gpus_per_worker {share_of_gpu(int(1 / share)):g}")
    if hardware.device != "cuda":
        most = 1
        while memory_for_a_worker(hardware, shape, most + 1) >= needed_bytes:
            most += 1
        if most < trials_that_fit(rooms_of(hardware, shape), shape.workers, on_one_node=False):
            hints.append(f"resources.max_concurrent {most}")
    return " and ".join(hints) or None


def memory_for_a_worker(hardware: Hardware, shape: WorkerShape, concurrent: int) -> int:
    """Bytes that one worker may take: its share of a GPU, or of the host's memory, and no more than the limit."""
    if hardware.device == "cuda":
        assert hardware.gpu_memory_bytes is not None
        share = shape.gpus_per_worker if 0 < shape.gpus_per_worker < 1 else 1.0
        there = hardware.gpu_memory_bytes * share * SPARE
    else:
        workers_a_node = math.ceil(concurrent * shape.workers / hardware.nodes)
        if max(rooms_of(hardware, shape)) >= shape.workers:
            workers_a_node = math.ceil(concurrent / hardware.nodes) * shape.workers
        there = hardware.host_memory_bytes * HOST_SHARE / workers_a_node
    return int(min(there, shape.limit_bytes or there))


def share_of_gpu(on_each: int) -> float:
    """Of a GPU for each of so many trials: rounded up, three thirds would not fit on it."""
    return math.floor(MOST_SHARES / on_each) / MOST_SHARES
