"""What a trial that does not fit in memory could change so that it does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from orchestrator.config.trial_config import Precision, TrialConfig
from orchestrator.planning.compatibility import Case, refusals
from orchestrator.planning.memory import MemoryEstimate, estimate_on

Taken = Callable[[MemoryEstimate], int]
LOW_RANK = 8
"""Named where a higher rank does not fit."""
LEAST_LENGTH = 64
"""Tokens, fewer than which nobody trains on."""
_OF_NO_MEMORY = {
    name: TrialConfig.model_fields[name].default
    for name in (
        "learning_rate",
        "lr_schedule",
        "warmup_steps",
        "weight_decay",
        "max_grad_norm",
        "max_steps",
        "eval_every",
        "seed",
    )
}
"""Settings that neither memory nor a refusal depends on: trials that differ in these alone are told the same."""


def for_memory(config: TrialConfig) -> TrialConfig:
    """The same for all that differ only in what memory does not depend on."""
    return config.model_copy(update=_OF_NO_MEMORY)


@dataclass(frozen=True, slots=True)
class _Change:
    """A cheaper setting, as a hint names it."""

    told: str
    settings: dict[str, Any] = field(default_factory=dict)
    workers: int | None = None


def what_fits(case: Case, memory_bytes: int, most_workers: int) -> str | None:
    """Each single change by which a worker takes no more than this, or the fewest together; None: not even all do.

    Those that alter the result least stand in front: a smaller micro-batch, checkpointing, more workers to share among.
    Shorter sequences, which cut the data, are named where nothing else is enough.
    What leaves the allocator room is named before what would run without.
    """
    return _first_that_fits(replace(case, config=for_memory(case.config)), memory_bytes, most_workers)


@lru_cache(maxsize=1024)
def _first_that_fits(case: Case, memory_bytes: int, most_workers: int) -> str | None:
    return (
        _what_fits(case, memory_bytes, most_workers, _with_room)
        or _what_fits(case, memory_bytes, most_workers, _without_room)
        or _shorter_that_fits(case, memory_bytes)
    )


def _with_room(memory: MemoryEstimate) -> int:
    return memory.device_bytes


def _without_room(memory: MemoryEstimate) -> int:
    return memory.needed_bytes


def _what_fits(case: Case, memory_bytes: int, most_workers: int, taken: Taken) -> str | None:
    single = [change for change in _single(case, most_workers) if _fits(case, (change,), memory_bytes, taken)]
    if single:
        told = {change.told.split(" ")[0]: change.told for change in reversed(single)}
        return ", or ".join(reversed(told.values()))
    changes = _strongest(case)
    for count in range(2, len(changes) + 1):
        if _fits(case, changes[:count], memory_bytes, taken):
            return " and ".join(change.told for change in changes[:count])
    return None


def _shorter_that_fits(case: Case, memory_bytes: int) -> str | None:
    """The longest sequences that fit, alone where that is enough, or else with all the rest that is cheaper."""
    length = case.config.sequence_length // 2
    while length >= LEAST_LENGTH:
        shorter = _Change(f"sequence_length {length}", {"sequence_length": length})
        for changes in ([shorter], [*_strongest(case), shorter]):
            if _fits(case, changes, memory_bytes, _with_room):
                return " and ".join(change.told for change in changes)
        length //= 2
    return None


def _single(case: Case, most_workers: int) -> Iterator[_Change]:
    """Of each setting the mildest first."""
    micro = case.config.micro_batch_size
    while isinstance(micro, int) and micro > 1:
        micro //= 2
        yield _Change(f"micro_batch_size {micro}", {"micro_batch_size": micro})
    yield from (change for change in _strongest(case) if not change.told.startswith("micro_batch_size"))
    workers = case.workers * 2
    while workers <= most_workers:
        told = f"workers_per_trial {workers} with zero_stage 3"
        yield _Change(told, {"zero_stage": 3, "engine": "deepspeed"}, workers)
        workers *= 2


def _strongest(case: Case) -> list[_Change]:
    config = case.config
    changes: list[_Change] = []
    sdpa = _Change("attention sdpa", {"attention": "sdpa"})
    if config.attention == "eager" and not refusals(replace(case, config=config.model_copy(update=sdpa.settings))):
        changes.append(sdpa)
    if isinstance(config.micro_batch_size, int) and config.micro_batch_size > 1:
        changes.append(_Change("micro_batch_size 1", {"micro_batch_size": 1}))
    if not config.gradient_checkpointing:
        changes.append(_Change("gradient_checkpointing", {"gradient_checkpointing": True}))
    if not config.precision.is_quantized and not config.trains_all_weights:
        changes.append(_Change("precision nf4", {"precision": Precision.NF4}))
    if config.zero_stage < 3 and case.workers > 1:
        changes.append(_Change("zero_stage 3", {"zero_stage": 3, "engine": "deepspeed"}))
    if isinstance(config.rank, int) and config.rank > LOW_RANK:
        changes.append(_Change(f"rank {LOW_RANK}", {"rank": LOW_RANK}))
    return changes


def _fits(case: Case, changes: Sequence[_Change], memory_bytes: int, taken: Taken) -> bool:
    config, workers = case.config, case.workers
    for change in changes:
        # Valid by themselves: to validate them again would take most of the time of a plan that refuses thousands.
        config, workers = config.model_copy(update=change.settings), change.workers or workers
    changed = Case(config, case.shape, case.hardware, workers)
    if refusals(changed):
        return False
    return taken(estimate_on(changed.config, case.shape, workers, case.hardware)) <= memory_bytes
