"""What a worker is told and what it tells: plain values, so that the sweep needs no torch to speak to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from orchestrator.config.trial_config import TrialConfig
from orchestrator.results.records import MetricPoint, TrialStatus

START_LIMIT_S = 3600.0
"""A trial without any sign of life before its first step hangs: the largest models take most of this to load."""


@dataclass(frozen=True, slots=True)
class TrialTask:
    """One trial, as every one of its workers gets it."""

    trial_id: str
    config: TrialConfig
    """`micro_batch_size` is a number."""
    model_folder: str
    """A local folder that `from_pretrained` reads, with its tokenizer."""
    data_folder: str
    """What `data.prepare` wrote."""
    trial_folder: str
    best_metric: str
    """By which its best evaluation is found, whose adapter is kept."""
    best_mode: Literal["min", "max"]
    gpu_memory_fraction: float | None = None
    """The share of its GPU that the worker may allocate, where trials share one; None: all of it."""
    memory_limit_bytes: int | None = None
    """More than this a worker may not take; None: what there is."""
    halves_micro_batch: bool = False
    """Whether it is started again with a smaller micro-batch when memory runs out (`micro_batch_size: auto`)."""
    time_limit_s: float | None = None
    """Its processes are killed after so long; None: never."""
    parent_folder: str | None = None
    """The folder of the trial whose checkpoint it begins with; None: it begins at the first step."""
    first_step: int = 0
    """Optimizer steps that the parent's checkpoint has done."""
    last_step: int | None = None
    """The step after which it leaves a checkpoint for others and ends, in the middle of its schedule; None: its last.
    """
    cost_per_s: float | None = None
    """Of all its workers' GPUs, in the unit of `budget.price_per_gpu_hour`; None: nothing is paid for."""

    @property
    def until_step(self) -> int:
        """Optimizer steps done at its end."""
        return self.config.max_steps if self.last_step is None else self.last_step


@dataclass(frozen=True, slots=True)
class WorkerPlace:
    """Which of the trial's workers a process is, and where they meet."""

    rank: int
    world_size: int
    local_rank: int
    store_host: str
    store_port: int
    """A `torch.distributed.TCPStore` that outlives the trial."""
    store_prefix: str
    """Sets the trial's attempt apart from all others in that store."""


@dataclass(frozen=True, slots=True)
class TrialProgress:
    """How far a trial is: told at every evaluation, so that a trial killed later has lost nothing.

    By the first worker of each node to the Ray worker beside it; that of rank 0 goes on to the sweep.
    """

    last: MetricPoint | None
    best: MetricPoint | None
    trainable_parameters: int
    startup_s: float
    data_s: float
    model_s: float
    training_s: float
    evaluation_s: float
    saving_s: float
    peak_memory_bytes: int
    reserved_bytes: int | None
    memory_kind: Literal["cuda_allocated", "resident"]
    device: str
    """As a person names it: `NVIDIA H100 80GB HBM3` or the CPU's model name."""
    host: str
    has_adapter: bool
    went_on_from: int | None = None
    """The step of the checkpoint that this attempt began with; None: it began at the first step."""


@dataclass(frozen=True, slots=True)
class WorkerNode:
    """The node that a worker lies on."""

    node_id: str
    """Ray's."""
    host: str


@dataclass(frozen=True, slots=True)
class TrialEnd:
    """How one worker's part of a trial ended."""

    status: TrialStatus
    reason: str | None
    progress: TrialProgress | None
    """None on every worker but rank 0, and where the trial ended before its first step."""
    may_pass: bool = False
    """Whether the same trial may well end otherwise when it is started again."""
    node: WorkerNode | None = None
    """Of the worker that ended it; None: not known."""


@dataclass(frozen=True, slots=True)
class Alive:
    """A sign of life from any worker's process, between its reports; it goes no further than the worker."""
