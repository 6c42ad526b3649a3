"""Which of a cluster's GPUs the trials run on, where nodes differ: one type for the whole sweep.

Memory and time are planned for the GPU that trials get, and times of trials on unlike GPUs could not be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import ray

from orchestrator.config.sweep_config import SweepConfig
from orchestrator.errors import InputError
from orchestrator.planning import hardware as hardware_module
from orchestrator.planning.hardware import Hardware
from orchestrator.planning.pace import Pace
from orchestrator.planning.plan import SweepPlan, plan_sweep
from orchestrator.results.records import SweepResult
from orchestrator.sweep import cluster
from orchestrator.sweep.worker import ACCELERATOR
from orchestrator.training.inputs import FoundModel

Resources = Mapping[str, float]


def type_of(node: Resources) -> str | None:
    """The node's GPU as Ray names it; of A100 and A100-80G the one that says more. None without a GPU."""
    names = [name.removeprefix(ACCELERATOR) for name in node if name.startswith(ACCELERATOR)]
    return max(names, key=len, default=None) if node.get("GPU") else None


def has_type(node: Resources, accelerator: str | None) -> bool:
    """Whether trials that ask for this type can run on the node."""
    return accelerator is None or f"{ACCELERATOR}{accelerator}" in node


@dataclass(frozen=True, slots=True)
class Choice:
    """What a sweep runs on."""

    sweep: SweepConfig
    """With this hardware's defaults."""
    plan: SweepPlan
    hardware: Hardware
    pace: Pace
    """Measured times of earlier sweeps on it, which have corrected the plan's."""
    accelerator: str | None
    """The type of GPU, where nodes differ."""


def choose(sweep: SweepConfig, model: FoundModel, earlier: Iterable[SweepResult], say: Callable[[str], None]) -> Choice:
    """The hardware, and the plan for it; `earlier` sweeps correct the plan's times.

    Raises:
        InputError: the cluster has no node that can work.
    """
    measured = tuple(earlier)
    choices = {}
    for kind, hardware in candidates(cluster.nodes(), sweep.resources.accelerator).items():
        completed = sweep.on_hardware(has_gpus=hardware.device == "cuda")
        pace = Pace.of(measured, sweep.model, hardware)
        plan = plan_sweep(completed, model.shape, hardware, pace)
        choices[kind] = Choice(completed, plan, hardware, pace, kind)
    plans = {kind: choice.plan for kind, choice in choices.items()}
    kind = chosen(plans)
    if len(plans) > 1:
        told = ", ".join(f"{plan.runs} on {one}" for one, plan in plans.items())
        say(f"the nodes' GPUs differ, and of {len(plans[kind].trials)} trials {told} can run: all run on {kind}")
    return choices[kind]


def candidates(nodes: Sequence[Resources], asked: str | None) -> dict[str | None, Hardware]:
    """By type, what trials could run on; one entry where the sweep file says, or all nodes are alike.

    Raises:
        InputError: no node can work, or none has the type that is asked for.
    """
    types = {kind for node in nodes if (kind := type_of(node))}
    if asked:
        if not any(has_type(node, asked) for node in nodes):
            there = f"has {', '.join(sorted(types))}" if types else "has no GPU"
            raise InputError(f"resources.accelerator is {asked}, and the cluster {there}: name one of its own")
        return {asked: _hardware(nodes, asked)}
    if len(types) < 2:
        return {None: _hardware(nodes, None)}
    return {kind: _hardware([n for n in nodes if type_of(n) == kind], kind) for kind in sorted(types)}


def chosen(plans: Mapping[str | None, SweepPlan]) -> str | None:
    """The type that lets most trials run; of equal ones that with the least memory, which costs least."""
    return min(plans, key=lambda kind: (-plans[kind].runs, plans[kind].worker_memory_bytes, kind or ""))


def _hardware(nodes: Sequence[Resources], accelerator: str | None) -> Hardware:
    """One machine's facts for all: a GPU node's where there is one, with the sums of those that have the type."""
    able = [node for node in nodes if has_type(node, accelerator)]
    gpus = int(sum(node.get("GPU", 0) for node in able))
    cpus = int(sum(node.get("CPU", 0) for node in able))
    if not cpus:
        raise InputError("the cluster has no CPUs to run a trial on: add a worker node")
    if not gpus and len(cluster.nodes()) == 1:
        return replace(hardware_module.this_machine(), cpus=cpus, nodes=1)
    # Asked where trials run: the driver's node may have no GPU, or no CPU to give and another limit of memory.
    probe = ray.remote(num_cpus=0.0 if gpus else 0.01, num_gpus=0.01 if gpus else 0.0)(hardware_module.this_machine)
    if accelerator:
        probe = probe.options(resources={f"{ACCELERATOR}{accelerator}": 0.001})
    found: Hardware = ray.get(probe.remote())
    if gpus and found.device == "cpu" and accelerator:
        # Ray was told of a GPU that no driver shows: its data sheet must do.
        found = hardware_module.named_gpu(accelerator, gpus)
    return replace(found, gpus=gpus, cpus=cpus, nodes=len(able), full_node_gpus=None)
