"""What a trial and a sweep leave behind: the JSON that scripts may read, with its format version."""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from orchestrator.config.constraint import parse
from orchestrator.config.sweep_config import COSTS, LOGGED_METRICS, is_score
from orchestrator.config.trial_config import TrialConfig
from orchestrator.errors import cut

SCHEMA_VERSION = 1


class TrialStatus(StrEnum):
    """Where a trial stands."""

    PENDING = "pending"
    RUNNING = "running"
    COMPLETED = "completed"
    STOPPED = "stopped"
    """Ended early by the scheduler."""
    INFEASIBLE = "infeasible"
    """Refused before launch."""
    OUT_OF_MEMORY = "out_of_memory"
    DIVERGED = "diverged"
    PREEMPTED = "preempted"
    """Its worker, node or driver went away; it goes on when the sweep is resumed."""
    FAILED = "failed"
    CANCELLED = "cancelled"
    """Ended by the user or the budget; it goes on when the sweep is resumed."""

    @property
    def needs_reason(self) -> bool:
        """Whether a record of this status must say why."""
        return self not in (TrialStatus.PENDING, TrialStatus.RUNNING, TrialStatus.COMPLETED)

    @property
    def is_final(self) -> bool:
        """Whether a resumed sweep leaves the trial as it is."""
        return not MOVES[self]


_ENDS = frozenset(TrialStatus) - {TrialStatus.PENDING, TrialStatus.RUNNING}
MOVES: Mapping[TrialStatus, frozenset[TrialStatus]] = {
    TrialStatus.PENDING: frozenset(
        {TrialStatus.RUNNING, TrialStatus.INFEASIBLE, TrialStatus.FAILED, TrialStatus.CANCELLED}
    ),
    TrialStatus.RUNNING: _ENDS - {TrialStatus.INFEASIBLE},
    TrialStatus.PREEMPTED: frozenset({TrialStatus.PENDING}),
    TrialStatus.CANCELLED: frozenset({TrialStatus.PENDING}),
} | {status: frozenset() for status in _ENDS - {TrialStatus.PREEMPTED, TrialStatus.CANCELLED}}
"""The statuses that may follow each status; what has none is final."""


class _Record(BaseModel):
    # Ours to write, so strict when made; a newer release may have added fields, so lenient when read.
    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="strings", use_attribute_docstrings=True)


LARGEST_FLOAT32 = 3.4028235e38


def _as_float32(value: float) -> float:
    """What no training can have measured is infinite: sums of such numbers would overflow."""
    return math.copysign(math.inf, value) if abs(value) > LARGEST_FLOAT32 else value


Measured = Annotated[float, AfterValidator(_as_float32)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Bytes = Count
Steps = Annotated[int, Field(ge=0, le=10**8)]
"""No more than `max_steps` may be."""
Moment = Annotated[int, Field(ge=0, lt=253_402_300_800_000)]
"""Wall clock, milliseconds since 1970, before the year 10000, which no calendar here has."""
# A wall clock that was set back between two looks at it measured nothing.
Seconds = Annotated[float, Field(allow_inf_nan=False, lt=1e12), AfterValidator(lambda seconds: max(0.0, seconds))]


SweepId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$")]
"""Stands in the conditions that MLflow is asked with, and so holds no quote."""


class MetricPoint(_Record):
    """One line of metrics.jsonl: the state after an optimizer step."""

    step: Annotated[Steps, Field(ge=1)]
    tokens: Count
    """Tokens trained on so far, over all workers, padding left out."""
    seconds: Seconds
    """Seconds of training so far: evaluation and saving left out."""
    loss: Measured | None = None
    """Mean over the label tokens of the step's global batch."""
    eval_loss: Measured | None = None
    """Mean over the label tokens of the evaluation data; only at the steps that evaluate."""
    learning_rate: Measured
    grad_norm: Measured | None = None
    tokens_per_s: Measured | None = None
    """Over the steps so far, without the warm-up steps."""
    step_time_s: Measured | None = None
    """Median seconds of the steps so far, without the warm-up steps."""
    peak_memory_bytes: Bytes | None = None
    """The largest of all workers."""
    cost: Measured | None = None
    """Of `seconds`, in the unit of `budget.price_per_gpu_hour`; None where no GPU is paid for."""
    time_ms: Moment
    """Wall clock, milliseconds since 1970: what MLflow is given, so that a replay adds no second point."""

    def improves(self, best: MetricPoint | None, metric: str, mode: Literal["min", "max"]) -> bool:
        """Whether it beats the best evaluation so far, None where there is none: then its adapter is kept."""
        value = getattr(self, metric, None)
        if self.eval_loss is None or value is None or not math.isfinite(value):
            return False
        before = getattr(best, metric, None)
        return before is None or (value < before if mode == "min" else value > before)


class PeakMemory(_Record):
    """One worker's peak memory: the largest of all workers."""

    predicted_bytes: Bytes | None = None
    measured_bytes: Bytes | None = None
    reserved_bytes: Bytes | None = None
    """torch's `max_memory_reserved`; None on a CPU."""
    available_bytes: Bytes | None = None
    """What a worker could take of its device."""
    kind: Literal["cuda_allocated", "resident"]


class Timing(_Record):
    """Where a trial's wall-clock time went, in seconds."""

    queued_s: Seconds = 0.0
    """From the sweep's start to the launch."""
    startup_s: Seconds = 0.0
    """From the launch to a process that holds its imports and its process group."""
    data_s: Seconds = 0.0
    model_s: Seconds = 0.0
    """Base model, adapter and engine."""
    training_s: Seconds = 0.0
    evaluation_s: Seconds = 0.0
    saving_s: Seconds = 0.0
    total_s: Seconds = 0.0
    """From the launch to the end."""
    earlier_s: Seconds = 0.0
    """Held by attempts in earlier runs of the sweep, of which the other figures know nothing: only the budget does."""

    @property
    def phases_s(self) -> float:
        """All that has a name, from the start-up to saving."""
        prepared_s = self.startup_s + self.data_s + self.model_s
        return prepared_s + self.training_s + self.evaluation_s + self.saving_s


class GitState(_Record):
    """The repository that the command was called in: the user's own, and not this package's."""

    commit: str
    dirty: bool


class StartedFrom(_Record):
    """The checkpoint of another trial that a trial began with."""

    trial_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$")]
    step: Annotated[Steps, Field(ge=1)]
    """Optimizer steps done by then: the trial's own first step is the next one."""


class Suggestion(_Record):
    """What an adaptive search proposed; all that it has to know to go on from the records."""

    number: Annotated[int, Field(ge=0, le=10**8)]
    """In the order of proposals, from 0; the repeats of a configuration share it."""
    settings: dict[str, Any]
    """The searched settings, as they were proposed; one whose `when` does not hold is left out.

    What is searched only since a later run has the value that it ran with.
    """
    generation: Steps | None = None
    """Of a population (pbt), from 0."""
    member: Annotated[int, Field(ge=0, le=10**8)] | None = None
    """Its place in that population; None where it was refused before it had one."""


class TrialResult(_Record):
    """Everything about one trial; written whole at every change of its status."""

    schema_version: Literal[1] = 1
    trial_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$")]
    """The name of its folder, and so never a path."""
    configuration_id: str
    """The same for all repeats of a configuration."""
    status: TrialStatus
    reason: str | None = None
    config: TrialConfig
    repeat: Count
    seed: Count
    suggestion: Suggestion | None = None
    """None in a grid or random search, which chooses before it starts."""
    started_from: StartedFrom | None = None
    """None: it began at the first step."""
    asked_for: bool = True
    """False of one that was cut off and that the sweep file no longer asks for: no run goes on with it till it does."""
    notes: tuple[str, ...] = ()
    """What planning had to say about a trial that runs all the same."""
    best: MetricPoint | None = None
    """The evaluation with the best of the first objective that is no cost, or else of eval_loss."""
    last: MetricPoint | None = None
    steps: Steps = 0
    tokens: Count = 0
    tokens_per_s: Measured | None = None
    step_time_s: Measured | None = None
    predicted_step_time_s: Measured | None = None
    """Before anything measured corrects it: by what both are apart, later plans are."""
    gpu_shared_by: Annotated[Count, Field(ge=1)] = 1
    """Trials at a time on its GPU, as planned."""
    trainable_parameters: Count | None = None
    peak_memory: PeakMemory | None = None
    timing: Timing = Timing()
    hosts: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    mlflow_run_id: str | None = None
    adapter: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$")] | None = None
    """Folder of the best adapter, relative to the trial's own."""
    scores: dict[str, Measured] = {}
    """What `evaluate.tasks` gave its best adapter, by `TASK/METRIC`."""
    versions: dict[str, str] = {}
    git: GitState | None = None

    @property
    def steps_trained(self) -> int:
        """The trial's own optimizer steps: `steps` counts those before its start too."""
        return max(0, self.steps - (self.started_from.step if self.started_from else 0))

    def measured(self, metric: str) -> float | None:
        """A logged metric or a score, as the trial is judged by it; None where it is unknown, or no number.

        What it took is that of the whole trial, all else that of its best evaluation.
        """
        costs = {
            "tokens_per_s": self.tokens_per_s,
            "step_time_s": self.step_time_s,
            "peak_memory_bytes": self.peak_memory.measured_bytes if self.peak_memory else None,
            "cost": self.last.cost if self.last else None,
        }
        value = costs[metric] if metric in COSTS else self.scores.get(metric, getattr(self.best, metric, None))
        return float(value) if value is not None and math.isfinite(value) else None

    @property
    def leaves_checkpoint(self) -> bool:
        """Whether others may begin with the checkpoint that it ended with: a generation that ended well."""
        in_population = self.suggestion is not None and self.suggestion.member is not None
        return in_population and self.status is TrialStatus.STOPPED

    @property
    def needs_checkpoint(self) -> bool:
        """Whether anybody may go on from its checkpoint: the trial itself, or others."""
        return not self.status.is_final or self.leaves_checkpoint

    @model_validator(mode="after")
    def _has_its_reason(self) -> Self:
        if self.status.needs_reason and not self.reason:
            raise ValueError(f"a trial that is {self.status} must say why in `reason`")
        return self

    @model_validator(mode="after")
    def _ran_as_proposed(self) -> Self:
        if self.suggestion:
            try:
                # A search goes on from these: they must be settings that a trial can have.
                TrialConfig(**{**self.config.model_dump(), **self.suggestion.settings})
            except ValidationError as error:
                wrong = error.errors()[0]
                raise ValueError(
                    f"suggestion.settings.{wrong['loc'][0] if wrong['loc'] else ''}: {wrong['msg']}"
                ) from error
        return self


class SweepResult(_Record):
    """All trials of a sweep, refused ones too, and what the sweep was asked."""

    schema_version: Literal[1] = 1
    name: str
    question: str | None = None
    sweep_id: SweepId
    model: str
    objective_metric: str
    objective_mode: Literal["min", "max"]
    objectives: tuple[tuple[str, Literal["min", "max"]], ...] = ()
    """All of them with their modes, where there are several; the first is `objective_metric`."""
    constraints: tuple[str, ...] = ()
    """As the sweep file has them."""
    searched: tuple[str, ...]
    """Names of the settings in `space:`, in the file's order."""
    started_ms: Moment | None = None
    run_started_ms: Moment | None = None
    """Of the last run; None where there was one alone, which `started_ms` tells of."""
    earlier_runs_s: Seconds = 0.0
    """That the runs before it were at work: the pauses between them left out."""
    ended_ms: Moment | None = None
    """None while the sweep runs."""
    interrupted: bool = False
    search_ended: str | None = None
    """Why an adaptive search ended by itself, and what it left."""
    cut_short: str | None = None
    """The limit of the budget that ended the sweep before its last trials, how it goes on, and what it left."""
    data_hash: str | None = None
    train_rows: Count | None = None
    eval_rows: Count | None = None
    """Those that every trial is evaluated on; like `train_rows` not known of what an earlier release began."""
    rows_left_out: Count = 0
    """Of the data, those that could not be used; data/summary.json names the first of them."""
    rows_too_long: tuple[str, ...] = ()
    """Of the data, what trials of a sequence_length leave out, since it begins to count only beyond, in words."""
    mlflow_run_id: str | None = None
    trials: tuple[TrialResult, ...]

    @property
    def is_whole(self) -> bool:
        """Whether it came to the end that it was asked for, and not to that of its user's or its budget's patience."""
        return self.ended_ms is not None and not self.interrupted and self.cut_short is None

    @property
    def last_sign_ms(self) -> int | None:
        """When it ended; of a run that was killed, and could not tell, what its trials reported last."""
        seen = (trial.last.time_ms for trial in self.trials if trial.last)
        return self.ended_ms or max(seen, default=None)

    @field_validator("objective_metric")
    @classmethod
    def _is_logged(cls, metric: str) -> str:
        if metric not in LOGGED_METRICS and not is_score(metric):
            raise ValueError(f"{metric}: no such metric")
        return metric

    @field_validator("objectives")
    @classmethod
    def _are_logged(cls, objectives: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
        for metric, _ in objectives:
            cls._is_logged(metric)
        return objectives

    @field_validator("constraints")
    @classmethod
    def _can_be_judged(cls, constraints: tuple[str, ...]) -> tuple[str, ...]:
        for text in constraints:
            try:
                parse(text)
            except ValueError as error:
                raise ValueError(
                    f"this release cannot judge {cut(text)}: read it with the one that wrote it"
                ) from error
        return constraints

    @field_validator("searched")
    @classmethod
    def _are_settings(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := [name for name in names if name not in TrialConfig.model_fields]:
            raise ValueError(f"{', '.join(unknown)}: no such setting")
        return names


def upgrade(raw: Any) -> dict[str, Any]:
    """Bring a record of any earlier format to this one.

    Raises:
        ValueError: it is no record, or was written by a newer release.
    """
    if not isinstance(raw, dict):
        raise ValueError("not a JSON object")
    version = raw.get("schema_version")
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise ValueError(f"schema_version {version!r} is not known to this release, which reads 1 to {SCHEMA_VERSION}")
    return raw
