"""What stands before the first launch: cluster, plan, worker groups, base model and data, each made once."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any, Literal

import ray

from orchestrator.config.search_space import Trial
from orchestrator.config.sweep_config import SweepConfig
from orchestrator.config.trial_config import TrialConfig
from orchestrator.planning.memory import MemoryEstimate, estimate_on
from orchestrator.planning.pace import READ_SWEEPS, Pace
from orchestrator.planning.plan import PlannedTrial, SweepPlan, WorkerShape, gpu_memory_fraction, plan_trial
from orchestrator.planning.step_time import Range, step_seconds
from orchestrator.results.storage import SweepFolder, newest_sweeps
from orchestrator.sweep import cluster, gpu_choice
from orchestrator.sweep.worker import GroupShape
from orchestrator.training import data, model_source
from orchestrator.training.inputs import FoundModel


@dataclass(frozen=True, slots=True)
class Prepared:
    """A sweep that is ready to be launched."""

    sweep: SweepConfig
    """With the defaults of this cluster's hardware."""
    plan: SweepPlan
    shape: GroupShape
    slots: int
    """Trials at a time."""
    data_hash: str
    memory_kind: Literal["cuda_allocated", "resident"]
    gpu_memory_fraction: float | None
    estimate: Callable[[TrialConfig], MemoryEstimate]
    """The plan's own, for a configuration that has changed since."""
    step_seconds: Callable[[TrialConfig], Range]
    """The same, before anything measured corrects it."""
    plan_trial: Callable[[Trial], PlannedTrial]
    """The plan's own, for a trial that an adaptive search proposes."""
    board: Any
    """The Ray actor `switchboard.Switchboard`."""
    groups: Any
    """The Ray actor `worker_group.WorkerGroups`, with the first groups on their way."""


def prepare(
    sweep: SweepConfig,
    model: FoundModel,
    folder: SweepFolder,
    address: str | None,
    ended: Container[str],
    say: Callable[[str], None],
) -> Prepared:
    """Check what needs the cluster, then fetch what the trials share; `ended` has the ids of trials that are done.

    Raises:
        InputError: weights, data or resources cannot be used so.
        ClusterUnreachableError: the cluster does not answer.
        StorageError: not all of its nodes see the folder.
    """
    address = cluster.address_of(address)
    say("starting Ray here" if address == cluster.LOCAL else f"joining the cluster at {address}")
    cluster.connect(address)
    cluster.require_shared(folder)
    cluster.await_room(sweep.resources, say)
    earlier = tuple(newest_sweeps(folder.root.parent, READ_SWEEPS))
    sweep, plan, hardware, accelerator = gpu_choice.choose(sweep, model, earlier, say)
    shape = GroupShape(plan.workers_per_trial, plan.gpus_per_worker, sweep.resources.cpus_per_worker, accelerator)
    shape = cluster.placed(shape, cluster.nodes())
    slots = slots_for(sweep, shape)
    # Tune's own state is a cache that we never restore: what had ended is known from our records.
    shutil.rmtree(folder.tune, ignore_errors=True)
    board = cluster.start_switchboard()
    groups = cluster.start_groups(board, shape, sweep.model, folder.tune / "worker_groups")
    # Their processes and imports take longer than all that follows here, and need none of it.
    waiting = sum(not trial.reasons and trial.trial_id not in ended for trial in plan.trials)
    groups.start_ahead.remote(min(slots, waiting))
    try:
        summary = _fetch(sweep, model, folder, say)
    except BaseException:
        # On a cluster that is not ours they would go on for a while, and write into a folder that is to go.
        ray.get(groups.close_all.remote())
        raise
    return Prepared(
        sweep,
        plan,
        shape,
        slots,
        summary.hash,
        "cuda_allocated" if hardware.device == "cuda" else "resident",
        gpu_memory_fraction(plan, hardware),
        functools.partial(estimate_on, shape=model.shape, workers=shape.workers, hardware=hardware),
        functools.partial(
            step_seconds, shape=model.shape, hardware=hardware, workers=shape.workers, cpus=shape.cpus_per_worker
        ),
        functools.partial(
            plan_trial,
            model=model.shape,
            hardware=hardware,
            shape=WorkerShape(shape.workers, shape.gpus_per_worker, shape.cpus_per_worker),
            memory_bytes=plan.worker_memory_bytes,
            pace=Pace.of(earlier, sweep.model, hardware),
        ),
        board,
        groups,
    )


def _fetch(sweep: SweepConfig, model: FoundModel, folder: SweepFolder, say: Callable[[str], None]) -> data.DataSummary:
    say(f"model {sweep.model}")
    model_folder = model_source.materialize(model.source)
    say(f"data {sweep.data.train}: reading and tokenising once for all trials")
    summary = data.prepare(sweep.data, model_folder, folder.data)
    say(f"data: {summary.train_rows} rows to train on, {summary.eval_rows} to evaluate on")
    if summary.skipped_count:
        told = "; ".join(f"{where}: {why}" for where, why in summary.skipped[:3])
        say(f"data: {summary.skipped_count} rows could not be read and are left out ({told})")
    return summary


def slots_for(sweep: SweepConfig, shape: GroupShape) -> int:
    """Trials at a time: as many as fit, and no more than the sweep file wants.

    Raises:
        InputError: not one fits.
    """
    room = cluster.room_for(shape, cluster.nodes())
    wanted = sweep.resources.max_concurrent
    if wanted == "auto":
        return room
    # What does not fit yet waits in Ray's queue, and nodes are started for it.
    return wanted if sweep.resources.scale_up_minutes else min(room, wanted)
