"""The whole sweep file, as it is written: one model class a key."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from orchestrator.config.axes import axes_of, complete
from orchestrator.config.constraint import parse
from orchestrator.config.known_good import KnownGood, known_good
from orchestrator.config.names import nearest
from orchestrator.config.search_space import (
    Choice,
    Range,
    Settings,
    Space,
    Trial,
    configuration_id,
    domains,
    grid,
    is_excluded,
    make_trials,
    sample,
)
from orchestrator.config.trial_config import TrialConfig
from orchestrator.errors import shown

LOGGED_METRICS = ("eval_loss", "loss", "tokens_per_s", "step_time_s", "peak_memory_bytes", "grad_norm", "cost")
COSTS = ("tokens_per_s", "step_time_s", "peak_memory_bytes", "cost")
"""Of these metrics, what a trial takes: they are those of the whole trial, and of no single evaluation."""
BETTER_MODES: dict[str, Literal["min", "max"]] = {
    "tokens_per_s": "max",
    **dict.fromkeys(("eval_loss", "loss", "step_time_s", "peak_memory_bytes", "cost"), "min"),
}
"""Of what nobody wants the other end; of the norm of gradients that is not known."""
DEFAULT_SAMPLES = 10
GraceUnit = Literal["steps", "tokens", "seconds", "cost"]
GRACE_UNITS: dict[str, GraceUnit] = {
    "grace_steps": "steps",
    "grace_tokens": "tokens",
    "grace_seconds": "seconds",
    "grace_cost": "cost",
}


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

    algorithm: Literal["grid", "random", "tpe", "gp", "cma_es", "pbt"] = "grid"
    """`grid` tries every combination, the others as many as `budget.trials` says: `random` by chance, and by what the
    trials so far have shown `tpe` (Parzen estimators), `gp` (a Gaussian process) and `cma_es` (evolution strategy).
    `pbt` (population-based training) follows from `scheduler.pbt`."""
    repeats: Annotated[int, Field(ge=1, le=1000)] = 1
    """Trials of every configuration, each with another seed."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of the random choices."""
    points: tuple[dict[str, Any] | KnownGood, ...] = ()
    """Configurations to try first; what one leaves out stands in the middle of its range. `[known_good]` is what the
    field begins with: alpha twice the rank, a learning rate by rank, for a middle, a low and a high rank."""
    warm_start: str | None = None
    """Folder of an earlier sweep: an adaptive search tries its best configurations first, and learns from all of them
    where data, objective and shared settings are the same; of another model's with less weight."""

    min_gain_per_hour: Annotated[float, Field(gt=0)] | None = None
    """An adaptive search ends by itself when another trial is expected to better the objective by less than this share
    of it (0.01: 1 %) for each hour that it takes; none: when `budget.trials` is used up."""
    min_gain_per_cost: Annotated[float, Field(gt=0)] | None = None
    """The same for each unit of money that it costs, by `budget.price_per_gpu_hour`."""

    @property
    def is_adaptive(self) -> bool:
        """Whether configurations are chosen one by one, by what the trials so far have shown."""
        return self.algorithm not in ("grid", "random")


class _Graceful(_Part):
    grace_steps: Annotated[int, Field(ge=1, le=10**8)] | None = None
    """Optimizer steps that every trial gets. It is counted in steps, tokens, seconds or money: name one of the four."""
    grace_tokens: Annotated[int, Field(ge=1, le=2**62)] | None = None
    """Tokens that every trial trains on."""
    grace_seconds: Annotated[float, Field(gt=0)] | None = None
    """Seconds of training that every trial gets."""
    grace_cost: Annotated[float, Field(gt=0)] | None = None
    """Money, in the unit of `budget.price_per_gpu_hour`, that every trial's training may cost."""

    @model_validator(mode="after")
    def _one_grace(self) -> Self:
        if sum(getattr(self, name) is not None for name in GRACE_UNITS) != 1:
            raise ValueError(f"needs one of {', '.join(GRACE_UNITS)}, as `grace_steps: 40`")
        return self

    @property
    def grace(self) -> tuple[float, GraceUnit]:
        """How much every trial gets, and in which unit."""
        name = next(name for name in GRACE_UNITS if getattr(self, name) is not None)
        return getattr(self, name), GRACE_UNITS[name]


class AshaConfig(_Graceful):
    """Asynchronous successive halving (Li et al. 2020)."""

    reduction_factor: Annotated[int, Field(ge=2, le=1000)] = 3
    """One of so many trials goes on from each rung to the next."""


class HyperbandConfig(AshaConfig):
    """Successive halving in brackets, of which each gives `reduction_factor` times as much grace as the one before."""

    brackets: Annotated[int, Field(ge=2, le=10)] = 3


class MedianConfig(_Graceful):
    """A trial that is worse than the median of the others so far is stopped (Golovin et al. 2017)."""

    min_trials: Annotated[int, Field(ge=1, le=1000)] = 3
    """Others that must have come as far."""


class ExtrapolationConfig(_Graceful):
    """A trial whose curve, carried on by a power law, will hardly win is stopped; stands beside a scheduler."""

    min_chance: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    """Chance to end better than the best that has ended, below which a trial is stopped."""


class PbtConfig(_Part):
    """Population-based training (Jaderberg et al. 2017): at the end of every interval the worst members are given up,
    and the best go on in their place too, from their checkpoints and with settings that are a little changed."""

    population: Annotated[int, Field(ge=2, le=10_000)]
    """Members that train, each to `max_steps`; the first ones are spread out over the space."""
    interval_steps: Annotated[int, Field(ge=1, le=10**8)]
    """Optimizer steps of a generation, a multiple of `eval_every`."""
    quantile: Annotated[float, Field(gt=0, le=0.5)] = 0.25
    """Share of the population that is given up after a generation, and share of the best that go on in its place."""

    def generations(self, max_steps: int) -> int:
        """How many until the last step; the last one may be shorter."""
        return -(-max_steps // self.interval_steps)


class FifoConfig(_Part):
    """Every trial runs to its end."""


class SchedulerConfig(_Part):
    """Who is stopped early: one scheduler, and extrapolation beside it."""

    asha: AshaConfig | None = None
    hyperband: HyperbandConfig | None = None
    median: MedianConfig | None = None
    pbt: PbtConfig | None = None
    fifo: FifoConfig | None = None
    extrapolation: ExtrapolationConfig | None = None

    @model_validator(mode="after")
    def _one_scheduler(self) -> SchedulerConfig:
        named = [name for name in ("asha", "hyperband", "median", "pbt", "fifo") if getattr(self, name)]
        if len(named) > 1:
            raise ValueError(f"name one scheduler, not {' and '.join(named)}")
        if empty := [name for name in self.model_fields_set if getattr(self, name) is None and name != "fifo"]:
            keys = "population: 8, interval_steps: 40" if empty[0] == "pbt" else "grace_steps: 40"
            raise ValueError(f"{empty[0]} needs its {keys.split(':')[0]}, as `{empty[0]}: {{{keys}}}`")
        if self.pbt and self.extrapolation:
            raise ValueError("pbt gives up the worst by itself: leave extrapolation out, or name asha in place of pbt")
        return self


def is_score(metric: str) -> bool:
    """Whether a metric is what lm-eval gives a trained model, as `TASK/METRIC`, and no logged one."""
    task, _, name = metric.partition("/")
    return bool(task and name) and not any(part.isspace() for part in metric)


def _metric(text: str) -> str:
    if text not in LOGGED_METRICS and not is_score(text):
        known = ", ".join(LOGGED_METRICS)
        near = nearest(text, LOGGED_METRICS)
        raise ValueError(f"takes {known}, or a score of evaluate.tasks as hellaswag/acc_norm{near}")
    return text


Metric = Annotated[
    str,
    AfterValidator(_metric),
    WithJsonSchema(
        {"anyOf": [{"enum": list(LOGGED_METRICS), "type": "string"}, {"pattern": r"^[^/\s]+/\S+$", "type": "string"}]}
    ),
]


class ObjectiveConfig(_Part):
    """What makes one trial better than another."""

    metric: Metric = "eval_loss"
    """A logged metric, or a score of `evaluate.tasks`, as hellaswag/acc_norm. `cost` is what a trial's training took of
    money, by `budget.price_per_gpu_hour`."""
    mode: Literal["min", "max"] = "min"
    """`max` for tokens_per_s, where nothing is said. A score needs it."""

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
    """1 where the cluster has GPUs and 0 elsewhere, where nothing is said. 0 is for clusters without GPUs, a share for
    one-worker trials. `auto` packs such trials on a GPU, which those that run on it at a time share evenly."""
    cpus_per_worker: Annotated[float, Field(ge=0.01, le=1024)] = 1
    memory_per_worker: Annotated[ByteSize, Field(ge=2**20)] | None = None
    """Most that a worker may take, of its GPU or, without one, of host memory, as 24GiB; none: what there is."""
    max_concurrent: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Trials at a time; `auto` is what the cluster has room for, on CPUs by the memory of the largest trial too."""
    accelerator: Annotated[str, Field(max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")] | None = None
    """The type of GPU that trials run on, as Ray names it (A100); none: of unlike nodes the smallest that most trials
    fit on."""
    scale_up_minutes: Annotated[float, Field(gt=0, le=1440)] | None = None
    """For clusters that start nodes when asked: so long the first is waited for; none: what is there must do."""

    @model_validator(mode="after")
    def _says_what_to_start(self) -> ResourcesConfig:
        if self.scale_up_minutes and (self.gpus_per_worker is None or self.max_concurrent == "auto"):
            raise ValueError(
                "scale_up_minutes needs gpus_per_worker and a number as max_concurrent: of nodes that are not there "
                "nothing is known"
            )
        return self

    @model_validator(mode="after")
    def _workers_of_a_trial_have_gpus_of_their_own(self) -> ResourcesConfig:
        # NCCL 2.x, init.cc: "Duplicate GPU detected", where two ranks of one group are on one device.
        share = self.gpus_per_worker
        if isinstance(share, float) and 0 < share < 1 and self.workers_per_trial > 1:
            raise ValueError("a trial's workers cannot share a GPU: set gpus_per_worker 1, or workers_per_trial 1")
        return self


class BudgetConfig(_Part):
    """What the sweep may take; where a limit is reached it ends cleanly."""

    trials: Annotated[int, Field(ge=1, le=10**6)] | None = None
    """How many configurations a search tries; at most so many of a grid; `random` tries 10 where nothing is said. An
    adaptive search needs it: what it proposes and is refused before launch costs nothing, up to as many again; from
    then on each refusal counts as a trial. pbt takes none: its population says how many."""
    hours: Annotated[float, Field(gt=0)] | None = None
    """Of each run of the command: what a sweep took before it was interrupted does not count. What `evaluate` asks for
    comes after it, and has as long again."""
    trial_hours: Annotated[float, Field(gt=0)] | None = None
    """The longest that one trial may run; one that hangs would hold its GPUs for ever."""
    gpu_hours: Annotated[float, Field(gt=0)] | None = None
    price_per_gpu_hour: Annotated[float, Field(ge=0, le=10**9)] | None = None
    cost: Annotated[float, Field(gt=0)] | None = None
    """Money, in the unit of `price_per_gpu_hour`, that the trials' GPU-hours may cost."""

    @model_validator(mode="after")
    def _cost_has_a_price(self) -> BudgetConfig:
        if self.cost is not None and not self.price_per_gpu_hour:
            raise ValueError("cost needs price_per_gpu_hour above 0: name it, or limit gpu_hours")
        return self


class EvaluateConfig(_Part):
    """What trained models are asked once the trials have ended; without prompts and tasks nothing."""

    prompts: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Each is answered, and the report shows the answers; with `format: messages` as a user's turn."""
    max_new_tokens: Annotated[int, Field(ge=1, le=100_000)] = 64
    """The longest answer."""
    tasks: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Tasks of lm-eval, as hellaswag; it comes with `pip install 'lm-eval>=0.4.13,<0.5'`."""
    task_folder: str | None = None
    """Where tasks of your own lie, as lm-eval's YAML; all nodes must see it."""
    examples: Annotated[int, Field(ge=1)] | None = None
    """So many of each task's examples; none: all."""
    trials: Literal["best", "all"] = "best"
    """The best trial's adapter, or every completed trial's, as always where a score is an objective."""


def _registered_model(name: str) -> str:
    # As mlflow 3.17 checks it (utils/validation.py), which is asked once the trials have run.
    if not name.strip() or name in (".", "..") or "/" in name or ":" in name:
        raise ValueError(f"MLflow takes no model named {shown(name)}: write a name without / and :")
    return name


class TrackingConfig(_Part):
    """Where MLflow's runs go."""

    uri: str | None = None
    """A tracking server; none: that of MLFLOW_TRACKING_URI, or a database in the storage folder."""
    experiment: str | None = None
    """The sweep's name, where nothing is said."""
    registered_model: Annotated[str, AfterValidator(_registered_model)] | None = None
    """The best adapter becomes a version of this registered model."""


def _constraint(text: str) -> str:
    parse(text)
    return " ".join(text.split())


class SweepConfig(_Part):
    """One sweep file."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, title="Sweep file"
    )

    name: Annotated[str, Field(max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
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
    objective: ObjectiveConfig | Annotated[tuple[ObjectiveConfig, ...], Field(min_length=1)] = ObjectiveConfig()
    """What makes one trial better than another; of a list, schedulers stop by the first. A trial's best adapter is kept
    by the first that is no cost (speed, memory, money), or else by `eval_loss`."""
    constraints: tuple[Annotated[str, AfterValidator(_constraint)], ...] = ()
    """What a configuration must keep to, as `peak_memory_bytes <= 24GiB` or `tokens_per_s >= 1000`."""
    resources: ResourcesConfig = ResourcesConfig()
    budget: BudgetConfig = BudgetConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    tracking: TrackingConfig = TrackingConfig()
    storage: Annotated[str, Field(min_length=1)] = "sweeps"
    """A local folder, a mount that all nodes see, or an object store, as s3://bucket/sweeps."""

    @model_validator(mode="before")
    @classmethod
    def _algorithm_of_pbt(cls, raw: Any) -> Any:
        """`scheduler: {pbt: ...}` alone says all."""
        if not isinstance(raw, dict) or not isinstance(raw.get("scheduler"), dict) or "pbt" not in raw["scheduler"]:
            return raw
        search = raw.get("search") or {}
        return raw if not isinstance(search, dict) else {**raw, "search": {"algorithm": "pbt", **search}}

    @field_validator("trial", mode="before")
    @classmethod
    def _empty_means_defaults(cls, raw: Any) -> Any:
        return {} if raw is None else raw

    @property
    def domains(self) -> dict[str, Choice[Any] | Range]:
        """The searched settings."""
        return domains(self.space)

    @property
    def objectives(self) -> tuple[ObjectiveConfig, ...]:
        """All of them, the first one first."""
        return self.objective if isinstance(self.objective, tuple) else (self.objective,)

    @property
    def training_objectives(self) -> tuple[ObjectiveConfig, ...]:
        """What is known while trials train: a score comes after all of them, and eval_loss stands for it till then."""
        known = (ObjectiveConfig() if is_score(one.metric) else one for one in self.objectives)
        return tuple(dict.fromkeys(known))

    @property
    def primary(self) -> ObjectiveConfig:
        """The objective that schedulers stop by."""
        return self.training_objectives[0]

    @property
    def best_by(self) -> ObjectiveConfig:
        """What a trial's best evaluation is found by, whose adapter is kept: the first objective that is no cost.

        Without such eval_loss. By a cost it would be any evaluation: peak memory never falls, so that it would be the
        first one.
        """
        return next((one for one in self.training_objectives if one.metric not in COSTS), ObjectiveConfig())

    @property
    def base(self) -> Settings:
        """What `trial:` sets of the settings that are not searched."""
        return {name: value for name, value in self.shared_settings.items() if name not in self.domains}

    @property
    def shared_settings(self) -> Settings:
        """What `trial:` sets, without the defaults."""
        return {name: getattr(self.trial, name) for name in self.trial.model_fields_set}

    def trials(self) -> tuple[Trial, ...]:
        """Every trial of a grid or random search; of an adaptive one random ones, which stand for those to come.

        Raises:
            ValueError: a grid over a range, or conditions that wait for each other.
        """
        if self.search.algorithm == "grid":
            configurations = grid(self.base, self.domains, self.exclude)[: self.budget.trials]
        else:
            drawn = sample(self.base, self.domains, self.exclude, self.first_count, self.search.seed)
            distinct = {configuration_id(one): one for one in (*self.possible_points, *drawn)}
            configurations = tuple(distinct.values())[: self.first_count]
        return make_trials(configurations, self.search.repeats)

    @property
    def first_count(self) -> int:
        """How many configurations a search tries, or a population begins with; those that are refused come on top."""
        pbt = self.scheduler.pbt
        return pbt.population if pbt else self.budget.trials or DEFAULT_SAMPLES

    @property
    def points(self) -> tuple[Settings, ...]:
        """`search.points`, each as the settings that it names."""
        axes = axes_of(self.domains)
        named = ((point,) if isinstance(point, dict) else known_good(axes, self.base) for point in self.search.points)
        return tuple(itertools.chain.from_iterable(named))

    @property
    def possible_points(self) -> tuple[TrialConfig, ...]:
        """The configurations of `points` that `exclude` does not name, each once."""
        found = (config for _, config in self._points() if not is_excluded(config, self.exclude))
        return tuple({configuration_id(config): config for config in found}.values())

    @property
    def excluded_points(self) -> tuple[Settings, ...]:
        """Those of `points` that are not tried, with what they leave open: what is a point may follow `known_good`, or
        the hardware."""
        return tuple(settings for settings, config in self._points() if is_excluded(config, self.exclude))

    def _points(self) -> Iterator[tuple[Settings, TrialConfig]]:
        axes = axes_of(self.domains)
        for point in self.points:
            settings = complete(axes, self.base, point)
            yield settings, TrialConfig(**{**self.base, **settings})

    @property
    def precision_follows_hardware(self) -> bool:
        """Whether the file neither names nor searches it."""
        return "precision" not in {*self.trial.model_fields_set, *self.domains}

    def on_hardware(self, *, has_gpus: bool) -> SweepConfig:
        """Fill in the defaults that depend on the cluster: `precision` and `resources.gpus_per_worker`."""
        trial, resources = self.trial, self.resources
        if not has_gpus and self.precision_follows_hardware:
            trial = TrialConfig(**{**self.shared_settings, "precision": "fp32"})
        if resources.gpus_per_worker is None:
            resources = resources.model_copy(update={"gpus_per_worker": 1.0 if has_gpus else 0.0})
        return self.model_copy(update={"trial": trial, "resources": resources})
