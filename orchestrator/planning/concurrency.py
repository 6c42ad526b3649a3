"""How many trials run at a time, and how many share a GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

from orchestrator.config.search_space import Trial
from orchestrator.config.sweep_config import (
    ResourcesConfig,
    SweepConfig,
)
from orchestrator.config.trial_config import TrialConfig
from orchestrator.planning.cheaper import for_memory
from orchestrator.planning.compatibility import Case, refusals
from orchestrator.planning.hardware import Hardware
from orchestrator.planning.memory import estimate_on, loading_bytes_on
from orchestrator.planning.model_shape import ModelShape
from orchestrator.planning.planned_trial import plan_trial
from orchestrator.planning.room import (
    HOST_SHARE,
    MOST_SHARES,
    WorkerShape,
    memory_for_a_worker,
    rooms_of,
    share_of_gpu,
    trials_that_fit,
)


def packed_share(
    trials: Sequence[Trial], sweep: SweepConfig, model: ModelShape, hardware: Hardware, whole: WorkerShape
) -> float:
    """What `auto` is of a GPU: 1 divided by the trials at a time on it, by which they are charged too.

    As many as the largest trial's memory allows, and no more than there are for each GPU, nor than make as many rounds:
    12 trials of which 8 fit run as 6 and 6. A smaller share would leave a part of the GPU to nobody, and charge nobody
    for it. `micro_batch_size: auto` takes what a whole GPU holds, so that
    only trials with a number are packed.
    """
    memory_bytes = memory_for_a_worker(hardware, replace(whole, limit_bytes=None), 1)
    planned = [plan_trial(trial, model, hardware, whole, memory_bytes) for trial in trials]
    needed = [
        max(trial.memory.device_bytes, loading_bytes_on(trial.config, model, 1, hardware))
        for trial in planned
        if trial.memory and not trial.reasons
    ]
    by_memory = memory_bytes // max(needed, default=memory_bytes)
    by_cpus = sum(rooms_of(hardware, replace(whole, gpus_per_worker=1 / MOST_SHARES)))
    to_run = len(trials) if sweep.search.is_adaptive else len(needed)
    at_once = min(by_cpus, _wanted_at_once(sweep.resources, to_run))
    gpus = max(1, hardware.gpus)
    most = max(1, min(by_memory, math.ceil(at_once / gpus)))
    rounds = max(1, math.ceil(to_run / min(max(1, at_once), most * gpus)))
    return share_of_gpu(max(1, math.ceil(to_run / rounds / gpus)))


def max_concurrent(
    trials: Sequence[Trial], resources: ResourcesConfig, model: ModelShape, hardware: Hardware, shape: WorkerShape
) -> int:
    """Of all trials so many at a time; at least one, since what cannot fit at all is told when the cluster is joined.

    On CPUs, whose trials share the host's memory, `auto` leaves each enough for the largest that fits on a node alone.
    """
    rooms = rooms_of(hardware, shape)
    on_one_node = max(rooms) >= shape.workers
    room = trials_that_fit(rooms, shape.workers, on_one_node=on_one_node)
    at_once = max(1, min(room, _wanted_at_once(resources, len(trials))))
    if resources.max_concurrent != "auto" or hardware.device == "cuda":
        return at_once
    alone_bytes = memory_for_a_worker(hardware, shape, 1)
    needed = _needed_bytes(trials, model, hardware, shape.workers, alone_bytes)
    if not needed:
        return at_once
    by_memory = int(hardware.host_memory_bytes * HOST_SHARE) // max(needed)
    rooms = [min(has, by_memory) for has in rooms]
    return max(1, min(len(needed), trials_that_fit(rooms, shape.workers, on_one_node=on_one_node)))


def _wanted_at_once(resources: ResourcesConfig, trials: int) -> int:
    """Of so many trials, wherever there is room."""
    return trials if resources.max_concurrent == "auto" else min(resources.max_concurrent, trials)


def _needed_bytes(
    trials: Sequence[Trial], model: ModelShape, hardware: Hardware, workers: int, memory_bytes: int
) -> list[int]:
    """What a worker takes of each trial that runs in so much memory, with the smallest micro-batch of `auto`.

    Estimated once for all that differ only in what memory does not depend on.
    """

    @cache
    def needed(config: TrialConfig) -> int | None:
        if config.micro_batch_size == "auto":
            config = config.model_copy(update={"micro_batch_size": 1})
        if refusals(Case(config, model, hardware, workers)):
            return None
        taken = estimate_on(config, model, workers, hardware).device_bytes
        return taken if taken <= memory_bytes else None

    return [taken for trial in trials if (taken := needed(for_memory(trial.config))) is not None]
