"""One trial before it starts: does it run, what memory, what time."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import replace
from functools import lru_cache

from pydantic import BaseModel, ConfigDict

from orchestrator.config.search_space import Trial
from orchestrator.config.sweep_config import (
    AshaConfig,
    ExtrapolationConfig,
    MedianConfig,
)
from orchestrator.config.trial_config import TrialConfig
from orchestrator.errors import apart
from orchestrator.planning.activations import Loop
from orchestrator.planning.cheaper import for_memory, what_fits
from orchestrator.planning.compatibility import Case, refusals
from orchestrator.planning.hardware import GIB, Hardware
from orchestrator.planning.memory import MemoryEstimate, estimate_on, loading_bytes_on
from orchestrator.planning.model_shape import ModelShape
from orchestrator.planning.notes import experts_stay_unquantised, notes
from orchestrator.planning.pace import Pace
from orchestrator.planning.room import (
    WorkerShape,
    more_room,
    placement,
    rooms_of,
)
from orchestrator.planning.step_time import certain, step_seconds

NO_PACE = Pace()
TIGHT = (
    "fits with little to spare: torch's allocator has to give memory back again and again, which takes time; "
    "any cheaper setting gives it room"
)


class Frozen(BaseModel):
    """A part of plan.json."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class PlannedTrial(Frozen):
    """One trial: it runs, or `reasons` says why it does not."""

    trial_id: str
    configuration_id: str
    config: TrialConfig
    """`micro_batch_size` is a number, unless the trial is refused."""
    repeat: int
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    memory: MemoryEstimate | None = None
    seconds: float | None = None
    """Expected, on a warm worker group, to its last step."""
    seconds_range: tuple[float, float] | None = None
    gpu_hours: float | None = None
    """Expected, likewise."""
    cost: float | None = None
    """Expected; None where `budget.price_per_gpu_hour` is not named."""


def plan_trial(
    trial: Trial, model: ModelShape, hardware: Hardware, shape: WorkerShape, memory_bytes: int, pace: Pace = NO_PACE
) -> PlannedTrial:
    """Decide about one trial, which may take `memory_bytes` a worker."""
    case = Case(trial.config, model, hardware, shape.workers)
    reasons = refusals(case)
    if reasons:
        return refused(trial, reasons)
    config = with_micro_batch(trial.config, model, hardware, shape.workers, memory_bytes, shape.bound_bytes)
    memory = estimate_on(config, model, shape.workers, hardware)
    if max(memory.needed_bytes, loading_bytes_on(config, model, shape.workers, hardware)) > memory_bytes:
        told = _does_not_fit(replace(case, config=config), shape, memory, memory_bytes)
        return _planned(trial, config, reasons=(told,), memory=memory)
    step = step_seconds(
        config, model, hardware, placement(hardware, shape), pace.correction(config, shape.gpu_shared_by)
    )
    whole = step.times(config.max_steps).plus(pace.once_s).plus(certain(pace.evaluations_s(config)))
    return _planned(
        trial,
        config,
        notes=notes(case) + ((TIGHT,) if memory.device_bytes > memory_bytes else ()),
        memory=memory.within(memory_bytes),
        seconds=whole.expected,
        seconds_range=(whole.low, whole.high),
        gpu_hours=whole.expected * gpus_of_a_trial(hardware, shape) / 3600,
    )


def refused(trial: Trial, reasons: tuple[str, ...]) -> PlannedTrial:
    """Before anybody asks what it would need."""
    return _planned(trial, trial.config, reasons=reasons)


def gpus_of_a_trial(hardware: Hardware, shape: WorkerShape) -> float:
    """0 where the plan's times are a CPU's, which say nothing of a GPU's."""
    return shape.workers * shape.gpus_per_worker if hardware.device == "cuda" else 0.0


def _planned(trial: Trial, config: TrialConfig, **more: object) -> PlannedTrial:
    # The config is validated already: model_construct keeps a thousand trials within a fraction of a second.
    fields = {"trial_id": trial.trial_id, "configuration_id": trial.configuration_id, "repeat": trial.repeat}
    return PlannedTrial.model_construct(**fields, config=config, **more)  # type: ignore[arg-type]


def with_micro_batch(
    config: TrialConfig,
    model: ModelShape,
    hardware: Hardware,
    workers: int,
    memory_bytes: int,
    bound_bytes: float = math.inf,
    loop: Loop = "trainer",
) -> TrialConfig:
    """`auto` becomes the largest divisor of a worker's share of the global batch that fits, and of which no more than
    the bound is measured; 1 where none does.

    With room for all that the allocator is expected to keep: what is ours to choose is not chosen tightly.
    """
    if config.micro_batch_size != "auto":
        return config
    micro = _largest_micro_batch(for_memory(config), model, hardware, workers, memory_bytes, bound_bytes, loop)
    return config.model_copy(update={"micro_batch_size": micro})


@lru_cache(maxsize=4096)
def _largest_micro_batch(
    config: TrialConfig,
    model: ModelShape,
    hardware: Hardware,
    workers: int,
    memory_bytes: int,
    bound_bytes: float,
    loop: Loop,
) -> int:
    def fits(micro: int) -> bool:
        tried = config.model_copy(update={"micro_batch_size": micro})
        memory = estimate_on(tried, model, workers, hardware, loop)
        return memory.device_bytes <= memory_bytes and memory.measured_bytes <= bound_bytes

    divisors = _divisors(max(1, config.global_batch_size // workers))
    # The largest by itself, since it alone accumulates nothing; of the others none takes less than a smaller one.
    if fits(divisors[-1]):
        return divisors[-1]
    fitting = bisect_left(divisors[:-1], True, key=lambda micro: not fits(micro))
    return divisors[max(0, fitting - 1)]


@lru_cache(maxsize=1024)
def _divisors(number: int) -> tuple[int, ...]:
    """From 1 to itself."""
    low = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return tuple(sorted({*low, *(number // n for n in low)}))


def _does_not_fit(case: Case, shape: WorkerShape, memory: MemoryEstimate, memory_bytes: int) -> str:
    """Why, and what would: fewer at a time first, which changes nothing of the trial."""
    needed_bytes = memory.needed_bytes
    of_which = f", of which {getattr(memory.parts, memory.parts.biggest) / GIB:.1f} GiB for {memory.parts.biggest}"
    if needed_bytes <= memory_bytes:
        needed_bytes = loading_bytes_on(case.config, case.shape, case.workers, case.hardware)
        of_which = (
            f" while it loads, since under ZeRO-3 each loads the whole model where precision is {case.config.precision}"
        )
    needed = f"{apart(needed_bytes, [memory_bytes], GIB, 1)} GiB"
    there = f"{apart(memory_bytes, [needed_bytes], GIB, 1)} GiB"
    is_limited = shape.limit_bytes is not None and shape.limit_bytes <= memory_bytes
    allowed = f"resources.memory_per_worker allows {there}" if is_limited else f"{there} are there"
    reason = f"needs about {needed} of memory a worker{of_which}, and {allowed}"
    if unquantised := experts_stay_unquantised(case):
        reason += f" ({unquantised})"
    # Workers cannot share a GPU.
    most_workers = sum(rooms_of(case.hardware, shape)) if shape.gpus_per_worker == 1 else case.workers
    fits = [more_room(case.hardware, shape, needed_bytes), what_fits(case, memory_bytes, most_workers)]
    told = ", or ".join(hint for hint in fits if hint)
    return f"{reason}; fits with {told}" if told else f"{reason}; use a smaller model"


def grace_steps(scheduler: AshaConfig | MedianConfig | ExtrapolationConfig, trial: PlannedTrial) -> float:
    """The grace that a trial gets, as optimizer steps: tokens at full sequences, seconds as the plan expects them."""
    grace, unit = scheduler.grace
    config = trial.config
    if unit == "tokens":
        return grace / (config.global_batch_size * config.sequence_length)
    if unit == "cost":
        return grace / (trial.cost or grace) * config.max_steps
    return grace / (trial.seconds or grace) * config.max_steps if unit == "seconds" else grace
