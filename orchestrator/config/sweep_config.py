"""The whole sweep file, as it is written: one model class a key."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field, field_validator, model_validator

from orchestrator.config.search_space import Choice, Range, Settings, Space, Trial, domains, grid, make_trials, sample
from orchestrator.config.trial_config import TrialConfig

LOGGED_METRICS = ("eval_loss", "loss", "tokens_per_s", "step_time_s", "peak_memory_bytes", "grad_norm")
DEFAULT_SAMPLES = 10


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class DataConfig(_Part):
    """What the trials read."""

    train: Annotated[str, Field(min_length=1)]
    """Hub id, local file or folder (jsonl, parquet, csv, txt), or `builtin:python-docs`, `…-docstrings`."""
    eval: Annotated[float, Field(gt=0, lt=1)] | Annotated[str, Field(min_length=1)] = 0.05
    """A fraction of `train`, or a source of its own."""
    format: Literal["text", "prompt_completion", "messages"] = "text"
    """Columns: `text`; `prompt` and `completion`; or `messages` for the model's chat template."""


class SearchConfig(_Part):
    """How configurations are chosen."""

    algorithm: Literal["grid", "random"] = "grid"
    """`grid` tries every combination, `random` as many as `budget.trials` says."""
    repeats: Annotated[int, Field(ge=1, le=1000)] = 1
    """Trials of every configuration, each with another seed."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of the random choices."""


class AshaConfig(_Part):
    """Asynchronous successive halving (Li et al. 2020) on optimizer steps."""

    grace_steps: Annotated[int, Field(ge=1, le=10**8)]
    """Optimizer steps that every trial gets."""
    reduction_factor: Annotated[int, Field(ge=2, le=1000)] = 3
    """One of so many trials goes on from each rung to the next."""


class FifoConfig(_Part):
    """Every trial runs to its end."""


class SchedulerConfig(_Part):
    """Who is stopped early: exactly one scheduler."""

    asha: AshaConfig | None = None
    fifo: FifoConfig | None = None

    @model_validator(mode="after")
    def _one_scheduler(self) -> SchedulerConfig:
        if self.asha and self.fifo:
            raise ValueError("name one scheduler: asha or fifo")
        if "asha" in self.model_fields_set and self.asha is None:
            raise ValueError("asha needs its grace_steps, as `asha: {grace_steps: 40}`")
        return self


class ObjectiveConfig(_Part):
    """What makes one trial better than another."""

    metric: Literal["eval_loss", "loss", "tokens_per_s", "step_time_s", "peak_memory_bytes", "grad_norm"] = "eval_loss"
    """One of the logged metrics."""
    mode: Literal["min", "max"] = "min"
    """`max` for tokens_per_s, where nothing is said."""

    @model_validator(mode="before")
    @classmethod
    def _more_tokens_are_better(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and raw.get("metric") == "tokens_per_s":
            return {"mode": "max", **raw}
        return raw


class ResourcesConfig(_Part):
    """What one trial takes of the cluster."""

    workers_per_trial: Annotated[int, Field(ge=1, le=4096)] = 1
    gpus_per_worker: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] | None = None
    """1 where the cluster has GPUs and 0 elsewhere, where nothing is said. `auto` packs several trials on a GPU."""
    cpus_per_worker: Annotated[float, Field(ge=0.01, le=1024)] = 1
    memory_per_worker: Annotated[ByteSize, Field(ge=2**20)] | None = None
    """Most that a worker may take, of its GPU or, without one, of host memory, as 24GiB; none: what there is."""
    max_concurrent: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Trials at a time; `auto` is what the cluster has room for."""


class BudgetConfig(_Part):
    """What the sweep may take; where a limit is reached it ends cleanly."""

    trials: Annotated[int, Field(ge=1, le=10**6)] | None = None
    """How many configurations a random search tries; at most so many of a grid."""
    hours: Annotated[float, Field(gt=0)] | None = None
    trial_hours: Annotated[float, Field(gt=0)] | None = None
    """The longest that one trial may run; one that hangs would hold its GPUs for ever."""
    gpu_hours: Annotated[float, Field(gt=0)] | None = None
    price_per_gpu_hour: Annotated[float, Field(ge=0)] | None = None


class EvaluateConfig(_Part):
    """What trained models are asked once the trials have ended; without prompts and tasks nothing."""

    prompts: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Each is answered, and the report shows the answers; with `format: messages` as a user's turn."""
    max_new_tokens: Annotated[int, Field(ge=1, le=100_000)] = 64
    """The longest answer."""
    tasks: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Tasks of lm-eval, as hellaswag; it comes with `pip install 'orchestrator[eval]'`."""
    task_folder: str | None = None
    """Where tasks of your own lie, as lm-eval's YAML; all nodes must see it."""
    examples: Annotated[int, Field(ge=1)] | None = None
    """So many of each task's examples; none: all."""
    trials: Literal["best", "all"] = "best"
    """The best trial's adapter, or every completed trial's."""


class TrackingConfig(_Part):
    """Where MLflow's runs go."""

    uri: str | None = None
    """A tracking server; none: a database in the storage folder."""
    experiment: str | None = None
    """The sweep's name, where nothing is said."""
    registered_model: str | None = None
    """The best adapter becomes a version of this registered model."""


class SweepConfig(_Part):
    """One sweep file."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, title="Sweep file"
    )

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$")]
    """Names the sweep's folder: letters, digits, `-`, `_` and `.`."""
    question: str | None = None
    """What the sweep is to answer; the report opens with it."""
    model: Annotated[str, Field(min_length=1)]
    """Hub id, local folder, `builtin:smollm2-135m` or `builtin:tiny-llama`."""
    data: DataConfig
    trial: TrialConfig = TrialConfig()
    """Settings that all trials share."""
    space: Space = Space()
    """Settings that are searched: a list, `{choice: [...], when: {...}}`, or a range."""
    exclude: tuple[dict[str, Any], ...] = ()
    """Partial configurations that must not run."""
    search: SearchConfig = SearchConfig()
    scheduler: SchedulerConfig = SchedulerConfig(fifo=FifoConfig())
    objective: ObjectiveConfig = ObjectiveConfig()
    resources: ResourcesConfig = ResourcesConfig()
    budget: BudgetConfig = BudgetConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    tracking: TrackingConfig = TrackingConfig()
    storage: Annotated[str, Field(min_length=1)] = "sweeps"
    """A local folder or a mount that all nodes see."""

    @field_validator("trial", mode="before")
    @classmethod
    def _empty_means_defaults(cls, raw: Any) -> Any:
        return {} if raw is None else raw

    @property
    def domains(self) -> dict[str, Choice[Any] | Range]:
        """The searched settings."""
        return domains(self.space)

    @property
    def shared_settings(self) -> Settings:
        """What `trial:` sets, without the defaults."""
        return {name: getattr(self.trial, name) for name in self.trial.model_fields_set}

    def trials(self) -> tuple[Trial, ...]:
        """Every trial of a grid or random search.

        Raises:
            ValueError: a grid over a range, or conditions that wait for each other.
        """
        base = {name: value for name, value in self.shared_settings.items() if name not in self.domains}
        if self.search.algorithm == "grid":
            configurations = grid(base, self.domains, self.exclude)[: self.budget.trials]
        else:
            count = self.budget.trials or DEFAULT_SAMPLES
            configurations = sample(base, self.domains, self.exclude, count, self.search.seed)
        return make_trials(configurations, self.search.repeats)

    def on_hardware(self, *, has_gpus: bool) -> SweepConfig:
        """Fill in the defaults that depend on the cluster: `precision` and `resources.gpus_per_worker`."""
        trial, resources = self.trial, self.resources
        if not has_gpus and "precision" not in {*trial.model_fields_set, *self.domains}:
            trial = TrialConfig(**{**self.shared_settings, "precision": "fp32"})
        if resources.gpus_per_worker is None:
            resources = resources.model_copy(update={"gpus_per_worker": 1.0 if has_gpus else 0.0})
        return self.model_copy(update={"trial": trial, "resources": resources})

    @property
    def folder(self) -> Path:
        """STORAGE/NAME."""
        return Path(self.storage).expanduser() / self.name
