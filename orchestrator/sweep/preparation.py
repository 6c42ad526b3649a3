"""What stands before the first launch: the cluster, the plan, the base model and the data, each made once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import ray

from orchestrator.config.search_space import Trial
from orchestrator.config.sweep_config import SweepConfig
from orchestrator.config.trial_config import TrialConfig
from orchestrator.errors import InputError
from orchestrator.planning import hardware as hardware_module
from orchestrator.planning.hardware import Hardware
from orchestrator.planning.memory import MemoryEstimate, estimate_on
from orchestrator.planning.plan import PlannedTrial, SweepPlan, WorkerShape, plan_sweep, plan_trial
from orchestrator.results.storage import SweepFolder
from orchestrator.sweep import cluster
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
    plan_trial: Callable[[Trial], PlannedTrial]
    """The plan's own, for a trial that an adaptive search proposes."""


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
    cluster.require_shared(folder.root)
    hardware = cluster_hardware()
    sweep = sweep.on_hardware(has_gpus=hardware.device == "cuda")
    plan = plan_sweep(sweep, model.shape, hardware)
    shape = GroupShape(plan.workers_per_trial, plan.gpus_per_worker, sweep.resources.cpus_per_worker)
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
        lambda trial: plan_trial(
            trial,
            model.shape,
            hardware,
            WorkerShape(shape.workers, shape.gpus_per_worker, shape.cpus_per_worker),
            plan.worker_memory_bytes,
        ),
    )


def slots_for(sweep: SweepConfig, shape: GroupShape) -> int:
    """Trials at a time: as many as fit, and no more than the sweep file wants.

    Raises:
        InputError: not one fits.
    """
    room = cluster.room_for(shape, cluster.nodes())
    wanted = sweep.resources.max_concurrent
    return room if wanted == "auto" else min(room, wanted)


def cluster_hardware() -> Hardware:
    """One machine's facts for the whole cluster: a GPU node's where there is one, with the sums of all nodes.

    Raises:
        InputError: the cluster has no node that can work.
    """
    nodes = cluster.nodes()
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    cpus = int(sum(node.get("CPU", 0) for node in nodes))
    if not cpus:
        raise InputError("the cluster has no CPUs to run a trial on: add a worker node")
    if not gpus and len(nodes) == 1:
        return replace(hardware_module.this_machine(), cpus=cpus, nodes=1)
    # Asked where trials run: the driver's node may have no GPU, or no CPU to give and another limit of memory.
    probe = ray.remote(num_cpus=0.0 if gpus else 0.01, num_gpus=0.01 if gpus else 0.0)(hardware_module.this_machine)
    found: Hardware = ray.get(probe.remote())
    return replace(found, gpus=gpus, cpus=cpus, nodes=len(nodes))
