"""What a trial that does not fit in memory could change so that it does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from orchestrator.config.trial_config import Precision, TrialConfig
from orchestrator.planning.compatibility import Case, refusals
from orchestrator.planning.memory import MemoryEstimate, estimate_on, loading_bytes_on

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
    """Cheaper settings that go together."""

    settings: Mapping[str, Any]
    workers: int | None = None


def what_fits(case: Case, memory_bytes: int, most_workers: int) -> str | None:
    """Each single change by which a worker takes no more than this, or the fewest together; None: not even all do.

    Those that alter the result least stand in front: a smaller micro-batch, checkpointing, more workers to share among.
    Shorter sequences, which cut the data, are named where nothing else is enough: the longest that fit.
    What leaves the allocator room is named before what would run without.
    """
    return _first_that_fits(replace(case, config=for_memory(case.config)), memory_bytes, most_workers)


@lru_cache(maxsize=1024)
def _first_that_fits(case: Case, memory_bytes: int, most_workers: int) -> str | None:
    strongest = [change for change in _strongest(case) if not refusals(_changed(case, [change]))]
    single = [*_single(case, strongest, most_workers)]

    def mildest_alone(taken: Taken) -> dict[str, str]:
        """By setting."""
        first: dict[str, str] = {}
        for change in single:
            if _fits(case, [change], memory_bytes, taken):
                one, *rest = _told(case, [change])
                first.setdefault(one.split(" ")[0], " with ".join(filter(None, (one, " and ".join(rest)))))
        return first

    if roomy := mildest_alone(_with_room):
        tight = {name: told for name, told in mildest_alone(_without_room).items() if name not in roomy}
        return _any_of(roomy) + (f", or, with little to spare, {_any_of(tight)}" if tight else "")
    if changes := _fewest(case, strongest, (), memory_bytes, _with_room):
        return " and ".join(_told(case, changes))
    if tight := mildest_alone(_without_room):
        return _any_of(tight)
    if changes := _fewest(case, strongest, (), memory_bytes, _without_room):
        return " and ".join(_told(case, changes))
    return _shorter_that_fits(case, strongest, memory_bytes)


def _any_of(mildest: Mapping[str, str]) -> str:
    return ", or ".join(mildest.values())


def _with_room(memory: MemoryEstimate) -> int:
    return memory.device_bytes


def _without_room(memory: MemoryEstimate) -> int:
    return memory.needed_bytes


def _shorter_that_fits(case: Case, strongest: Sequence[_Change], memory_bytes: int) -> str | None:
    """The first half, or half of that, that fits, alone or else with the fewest of the other changes."""
    length = case.config.sequence_length
    if length <= LEAST_LENGTH or not _fewest(
        case, strongest, (_Change({"sequence_length": LEAST_LENGTH}),), memory_bytes, _without_room
    ):
        # Asked once, since of thousands that fit at no length each would be asked for all.
        return None
    while length > LEAST_LENGTH:
        length = max(length // 2, LEAST_LENGTH)
        shorter = _Change({"sequence_length": length})
        for taken in (_with_room, _without_room):
            if changes := _fewest(case, strongest, (shorter,), memory_bytes, taken):
                return " and ".join(_told(case, changes))
    return None


def _fewest(
    case: Case, changes: Sequence[_Change], always: Sequence[_Change], memory_bytes: int, taken: Taken
) -> list[_Change] | None:
    """The first changes that fit beside those that are always made, without any that the others do without."""
    for count in range(len(changes) + 1):
        kept = [*changes[:count], *always]
        if _fits(case, kept, memory_bytes, taken):
            break
    else:
        return None
    for change in reversed(changes[:count]):
        others = [other for other in kept if other is not change]
        if _fits(case, others, memory_bytes, taken):
            kept = others
    return kept


def _single(case: Case, strongest: Sequence[_Change], most_workers: int) -> Iterator[_Change]:
    """Of each setting the mildest first."""
    config, workers = case.config, case.workers * 2
    micro = config.micro_batch_size
    while isinstance(micro, int) and micro > 1:
        micro //= 2
        yield _Change({"micro_batch_size": micro})
    yield from (change for change in strongest if "micro_batch_size" not in change.settings)
    if config.trains_all_weights and config.optimizer == "adamw":
        # Not among the strongest: an offloaded optimizer, which it excludes, takes less.
        yield _Change({"optimizer": "adamw_8bit"})
    while workers <= most_workers:
        yield _Change({"engine": "deepspeed", "zero_stage": 3}, workers)
        workers *= 2


def _strongest(case: Case) -> Iterator[_Change]:
    """Of each setting the strongest change."""
    config = case.config
    if config.attention == "eager":
        yield _Change({"attention": "sdpa"})
    if isinstance(config.micro_batch_size, int) and config.micro_batch_size > 1:
        yield _Change({"micro_batch_size": 1})
    if not config.gradient_checkpointing:
        yield _Change({"gradient_checkpointing": True})
    if config.trains_all_weights and config.offload == "none" and case.hardware.device == "cuda":
        yield _offload(config)
    if config.zero_stage < 3 and case.workers > 1:
        yield _Change({"engine": "deepspeed", "zero_stage": 3})
    if precision := _leaner_precision(case):
        yield _Change({"precision": precision})
    if isinstance(config.rank, int) and config.rank > LOW_RANK:
        yield _Change({"rank": LOW_RANK})


def _offload(config: TrialConfig) -> _Change:
    """With what it needs: ZeRO of stage 2, and an optimizer whose states can be offloaded."""
    optimizer = "adamw" if config.optimizer == "adamw_8bit" else config.optimizer
    stage = max(config.zero_stage, 2)
    return _Change({"offload": "optimizer", "optimizer": optimizer, "engine": "deepspeed", "zero_stage": stage})


def _leaner_precision(case: Case) -> Precision | None:
    """4-bit weights, or half precision where those that are trained, or a mixture's, are not quantised, or where ZeRO-3
    needs room for the whole quantised model as it loads."""
    config, half = case.config, Precision.BF16 if case.hardware.has_bf16 else Precision.FP16
    if config.precision.is_quantized:
        return half if case.shape.experts or config.zero_stage == 3 else None
    if not config.trains_all_weights and not case.shape.experts:
        return Precision.NF4
    return None if config.precision in (Precision.BF16, Precision.FP16) else half


def _told(case: Case, changes: Sequence[_Change]) -> list[str]:
    """Each setting that becomes another, once."""
    changed = _changed(case, changes)
    told = [f"workers_per_trial {changed.workers}"] if changed.workers != case.workers else []
    for name in dict.fromkeys(name for change in changes for name in change.settings):
        value = getattr(changed.config, name)
        if value != getattr(case.config, name):
            told.append(name if value is True else f"{name} {value}")
    return told


def _changed(case: Case, changes: Sequence[_Change]) -> Case:
    config, workers = case.config, case.workers
    for change in changes:
        # Valid by themselves: to validate them again would take most of the time of a plan that refuses thousands.
        config, workers = config.model_copy(update=change.settings), change.workers or workers
    return Case(config, case.shape, case.hardware, workers)


def _fits(case: Case, changes: Sequence[_Change], memory_bytes: int, taken: Taken) -> bool:
    changed = _changed(case, changes)
    if refusals(changed) or loading_bytes_on(changed.config, case.shape, case.hardware) > memory_bytes:
        return False
    return taken(estimate_on(changed.config, case.shape, changed.workers, case.hardware)) <= memory_bytes
