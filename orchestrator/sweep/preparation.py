"""What stands before the first launch: the cluster, the plan, the base model and the data, each made once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from orchestrator.config.sweep_config import SweepConfig
from orchestrator.config.trial_config import TrialConfig
from orchestrator.planning.hardware import Hardware
from orchestrator.planning.memory import MemoryEstimate, estimate_on
from orchestrator.planning.plan import SweepPlan, plan_sweep
from orchestrator.results.storage import SweepFolder
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


def prepare(
    sweep: SweepConfig, model: FoundModel, folder: SweepFolder, address: str | None, say: Callable[[str], None]
) -> Prepared:
    """Check what needs the cluster, then fetch what the trials share.

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
    sweep, plan, hardware, accelerator = choose_gpus(sweep, model, say)
    shape = GroupShape(plan.workers_per_trial, plan.gpus_per_worker, sweep.resources.cpus_per_worker, accelerator)
    shape = cluster.placed(shape, cluster.nodes())
    slots = slots_for(sweep, shape)
    say(f"model {sweep.model}")
    model_folder = model_source.materialize(model.source)
    say(f"data {sweep.data.train}: reading and tokenising once for all trials")
    summary = data.prepare(sweep.data, model_folder, folder.data)
    say(f"data: {summary.train_rows} rows to train on, {summary.eval_rows} to evaluate on")
    if summary.skipped_count:
        told = "; ".join(f"{where}: {why}" for where, why in summary.skipped[:3])
        say(f"data: {summary.skipped_count} rows could not be read and are left out ({told})")
    share = shape.gpus_per_worker
    return Prepared(
        sweep,
        plan,
        shape,
        slots,
        summary.hash,
        "cuda_allocated" if hardware.device == "cuda" else "resident",
        share if 0 < share < 1 else None,
        functools.partial(estimate_on, shape=model.shape, workers=shape.workers, hardware=hardware),
    )


def choose_gpus(
    sweep: SweepConfig, model: FoundModel, say: Callable[[str], None]
) -> tuple[SweepConfig, SweepPlan, Hardware, str | None]:
    """The sweep with its hardware's defaults, its plan on the GPUs that it gets, and their type where nodes differ.

    Raises:
        InputError: the cluster has no node that can work.
    """
    found = gpu_choice.candidates(cluster.nodes(), sweep.resources.accelerator)
    sweeps = {kind: sweep.on_hardware(has_gpus=hardware.device == "cuda") for kind, hardware in found.items()}
    plans = {kind: plan_sweep(sweeps[kind], model.shape, hardware) for kind, hardware in found.items()}
    kind = gpu_choice.chosen(plans)
    if len(plans) > 1:
        told = ", ".join(f"{plan.runs} on {one}" for one, plan in plans.items())
        say(f"the nodes' GPUs differ, and of {len(plans[kind].trials)} trials {told} can run: all run on {kind}")
    return sweeps[kind], plans[kind], found[kind], kind


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
