"""What stands before the first launch: cluster, plan, worker groups, base model and data, each made once."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import ray

from orchestrator.config.axes import axis_of
from orchestrator.config.search_space import Trial
from orchestrator.config.sweep_config import SweepConfig
from orchestrator.config.trial_config import TrialConfig
from orchestrator.errors import cut
from orchestrator.planning.memory import MemoryEstimate, estimate_on
from orchestrator.planning.model_shape import ModelShape
from orchestrator.planning.pace import READ_SWEEPS
from orchestrator.planning.plan import SweepPlan, gpu_memory_fraction
from orchestrator.planning.planned_trial import PlannedTrial, plan_trial
from orchestrator.planning.room import WorkerShape, bound_bytes, placement
from orchestrator.planning.step_time import Placement, Range, step_seconds
from orchestrator.reporting.caveats import few_rows_words
from orchestrator.results.folders import SweepFolder
from orchestrator.results.storage import newest_sweeps
from orchestrator.sweep import cluster, gpu_choice
from orchestrator.sweep.gpu_choice import Choice
from orchestrator.sweep.worker import GroupShape
from orchestrator.sweep.worker_group import HURRIED_CLOSE_LIMIT_S
from orchestrator.training import data, model_source
from orchestrator.training.inputs import FoundModel


@dataclass(frozen=True, slots=True)
class Prepared:
    """A sweep that is ready to be launched."""

    choice: Choice
    """What it runs on, and the plan for that."""
    model: ModelShape
    shape: GroupShape
    slots: int
    """Trials at a time."""
    data_hash: str
    train_rows: int
    eval_rows: int
    rows_left_out: int
    rows_too_long: tuple[str, ...]
    board: Any
    """The Ray actor `switchboard.Switchboard`."""
    groups: Any
    """The Ray actor `worker_group.WorkerGroups`, with the first groups on their way."""

    @property
    def sweep(self) -> SweepConfig:
        """With the defaults of this cluster's hardware."""
        return self.choice.sweep

    @property
    def plan(self) -> SweepPlan:
        """All trials that are known before the start."""
        return self.choice.plan

    @property
    def memory_kind(self) -> Literal["cuda_allocated", "resident"]:
        """What is measured of a trial's memory here."""
        return "cuda_allocated" if self.choice.hardware.device == "cuda" else "resident"

    @property
    def gpu_memory_fraction(self) -> float | None:
        """What of a GPU one of the trials that share it may take."""
        return gpu_memory_fraction(self.plan, self.choice.hardware)

    def estimate(self, config: TrialConfig) -> MemoryEstimate:
        """The plan's own, for a configuration that has changed since."""
        return estimate_on(config, self.model, self.shape.workers, self.choice.hardware)

    def predicted_bytes(self, config: TrialConfig) -> int:
        """What a record says was predicted: of the kind of memory that is measured here."""
        memory = self.estimate(config)
        predicted = memory.device_bytes if self.memory_kind == "resident" else memory.allocated_bytes
        assert predicted is not None
        return predicted

    def step_seconds(self, config: TrialConfig) -> Range:
        """What a step takes, before anything measured corrects it."""
        return step_seconds(config, self.model, self.choice.hardware, self._placement)

    def plan_trial(self, trial: Trial) -> PlannedTrial:
        """The plan's own decision, for a trial that an adaptive search proposes."""
        return plan_trial(
            trial,
            self.model,
            self.choice.hardware,
            self._worker_shape,
            self.plan.worker_memory_bytes,
            self.choice.pace,
        )

    @property
    def _placement(self) -> Placement:
        return placement(self.choice.hardware, self._worker_shape)

    @property
    def _worker_shape(self) -> WorkerShape:
        return WorkerShape(
            self.shape.workers,
            self.shape.gpus_per_worker,
            self.shape.cpus_per_worker,
            self.sweep.resources.memory_per_worker,
            bound_bytes(self.sweep.constraints),
            self.plan.gpu_shared_by,
        )


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
    say("starting Ray here" if address == cluster.LOCAL else f"joining the cluster at {cut(address)}")
    cluster.connect(address)
    cluster.require_shared(folder, say)
    cluster.await_room(sweep.resources, say)
    choice = gpu_choice.choose(sweep, model, newest_sweeps(folder.root.parent, READ_SWEEPS), say)
    sweep, plan = choice.sweep, choice.plan
    shape = cluster.placed(
        GroupShape(plan.workers_per_trial, plan.gpus_per_worker, sweep.resources.cpus_per_worker, choice.accelerator),
        cluster.nodes(),
    )
    slots = slots_for(sweep, plan, shape)
    # Tune's own state is a cache that we never restore: what had ended is known from our records.
    shutil.rmtree(folder.tune, ignore_errors=True)
    board = cluster.start_switchboard()
    waiting = sum(not trial.reasons and trial.trial_id not in ended for trial in plan.trials)
    # Their processes and imports take longer than all that follows here, and need none of it.
    groups = cluster.start_groups(board, shape, sweep.model, folder.tune / "worker_groups", min(slots, waiting))
    try:
        summary = _fetch(sweep, model, folder, say)
        lengths = sequence_lengths(sweep, plan)
        data.require_something_to_learn(summary, max(lengths))
        too_long = tuple(data.left_out_within(folder.data, lengths))
        for told in too_long:
            say(f"data: {told}")
    except BaseException:
        # On a cluster that is not ours they would go on for a while, and write into a folder that is to go.
        ray.get(groups.close_all.remote(HURRIED_CLOSE_LIMIT_S))
        raise
    return Prepared(
        choice,
        model.shape,
        shape,
        slots,
        summary.hash,
        summary.train_rows,
        summary.eval_rows,
        summary.skipped_count,
        too_long,
        board,
        groups,
    )


def sequence_lengths(sweep: SweepConfig, plan: SweepPlan) -> set[int]:
    """Of all trials; where a search is to propose them, those of the space, of a range its ends."""
    domain = sweep.domains.get("sequence_length")
    if domain is None or not plan.proposed_by:
        return {trial.config.sequence_length for trial in plan.trials}
    axis = axis_of("sequence_length", domain)
    elsewhere = {sweep.trial.sequence_length} if axis.when else set()
    return {int(length) for length in axis.values or (axis.low, axis.high)} | elsewhere


def _fetch(sweep: SweepConfig, model: FoundModel, folder: SweepFolder, say: Callable[[str], None]) -> data.DataSummary:
    say(f"model {sweep.model}")
    model_folder = model_source.materialize(model.source)
    say(f"data {sweep.data.train}: reading and tokenising once for all trials")
    summary = data.prepare(sweep.data, model_folder, folder.data)
    for told in rows_words(summary):
        say(f"data: {told}")
    return summary


def rows_words(summary: data.DataSummary) -> Iterator[str]:
    """How many rows there are for what, whether they are few, and what was left out."""
    yield f"{summary.train_rows} rows to train on, {summary.eval_rows} to evaluate on"
    if few := few_rows_words(summary.eval_rows):
        yield few
    if summary.skipped_count:
        told = "; ".join(f"{where}: {why}" for where, why in summary.skipped[:3])
        yield f"{summary.skipped_count} of the rows could not be read, left out ({told})"


def slots_for(sweep: SweepConfig, plan: SweepPlan, shape: GroupShape) -> int:
    """Trials at a time: as many as fit, and no more than the sweep file wants.

    Raises:
        InputError: not one fits.
    """
    room = cluster.room_for(shape, cluster.nodes())
    wanted = sweep.resources.max_concurrent
    if wanted == "auto":
        # Trials without a GPU share the host's memory, among as many as the plan has at a time.
        return room if shape.gpus_per_worker else min(room, plan.concurrent)
    # What does not fit yet waits in Ray's queue, and nodes are started for it.
    return wanted if sweep.resources.scale_up_minutes else min(room, wanted)
