"""What a trial that does not fit in memory could change so that it does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations
from typing import Any

from orchestrator.config.trial_config import Precision, TrialConfig
from orchestrator.planning.compatibility import Case, refusals
from orchestrator.planning.memory import MemoryEstimate, estimate_on, loading_bytes_on

Taken = Callable[[MemoryEstimate], int]
LOW_RANK = 8
"""Named where a higher rank does not fit."""
LEAST_LENGTH = 64
"""Tokens, fewer than which nobody trains on."""
_MAY_TAKE_MORE = frozenset({"precision", "zero_stage"})
"""Changes of these can take more, as where quantised weights load on a CPU, or ZeRO-3 gathers a large vocabulary."""
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


@dataclass(frozen=True, slots=True, eq=False)
class _Change:
    """Cheaper settings that go together."""

    settings: Mapping[str, Any]
    workers: int | None = None


def what_fits(case: Case, memory_bytes: int, most_workers: int) -> str | None:
    """Each single change by which a worker takes no more than this, or the fewest together; None: not even all do.

    Those that alter the result least stand in front: a smaller micro-batch, checkpointing, more workers to share among.
    More workers beside other changes are named where those alone are not enough: the fewest that fit. Shorter
    sequences, which cut the data, are named where nothing else is enough: the longest that fit.
    What leaves the allocator room is named before what would run without.
    """
    return _first_that_fits(replace(case, config=for_memory(case.config)), memory_bytes, most_workers)


@lru_cache(maxsize=1024)
def _first_that_fits(case: Case, memory_bytes: int, most_workers: int) -> str | None:
    strongest, shares = [*_strongest(case)], [*_more_workers(case, most_workers)]
    shortest = _Change({"sequence_length": min(LEAST_LENGTH, case.config.sequence_length)})

    def fits_at_last(always: Sequence[_Change]) -> bool:
        wholes = _together(case, strongest, always, memory_bytes)
        return any(_fits(case, whole, memory_bytes, _without_room) for whole in wholes)

    # Asked first, since of thousands that fit nowhere each would be asked for everything.
    beside = [always for always in ([], shares[-1:]) if fits_at_last([*always, shortest])]
    if not beside:
        return None
    wholes = [*_together(case, strongest, [], memory_bytes)]
    single = [*_milder_micro_batches(case.config), *strongest, *shares]
    roomy, tight = (_mildest_alone(case, single, memory_bytes, taken) for taken in (_with_room, _without_room))
    if roomy:
        more = {name: told for name, told in tight.items() if name not in roomy}
        return _any_of(roomy) + (f", or, with little to spare, {_any_of(more)}" if more else "")
    if changes := _fewest(case, wholes, [], memory_bytes, _with_room):
        return " and ".join(_told(case, changes))
    if tight:
        return _any_of(tight)
    if changes := _fewest(case, wholes, [], memory_bytes, _without_room):
        return " and ".join(_told(case, changes))
    shorter = [[*beside[0], change] for change in _shorter_sequences(case.config)]
    for always in [*([share] for share in shares), *shorter]:
        wholes = [*_together(case, strongest, always, memory_bytes)]
        for taken in (_with_room, _without_room):
            if changes := _fewest(case, wholes, always, memory_bytes, taken):
                return " and ".join(_told(case, changes))
    return None


def _mildest_alone(case: Case, changes: Sequence[_Change], memory_bytes: int, taken: Taken) -> dict[str, str]:
    """Of each setting the first change that is enough by itself, in words."""
    first: dict[str, str] = {}
    for change in changes:
        if _fits(case, [change], memory_bytes, taken):
            one, *rest = _told(case, [change])
            first.setdefault(one.split(" ")[0], " with ".join(filter(None, (one, " and ".join(rest)))))
    return first


def _any_of(mildest: Mapping[str, str]) -> str:
    return ", or ".join(mildest.values())


def _with_room(memory: MemoryEstimate) -> int:
    return memory.device_bytes


def _without_room(memory: MemoryEstimate) -> int:
    return memory.needed_bytes


def _fewest(
    case: Case, wholes: Sequence[Sequence[_Change]], always: Sequence[_Change], memory_bytes: int, taken: Taken
) -> Sequence[_Change] | None:
    """Changes that fit, of those that go together, without any that the others do without."""
    kept = next((whole for whole in wholes if _fits(case, whole, memory_bytes, taken)), None)
    if kept is None:
        return None
    spare = [change for change in reversed(kept) if change not in always]
    # A second time for those that another needed, which the others do without.
    for dropped in [*spare, *(change for change in spare if "precision" in change.settings)]:
        others = [change for change in kept if change is not dropped]
        if len(others) < len(kept) and _fits(case, others, memory_bytes, taken):
            kept = others
    return kept


def _together(
    case: Case, changes: Sequence[_Change], always: Sequence[_Change], memory_bytes: int
) -> Iterator[list[_Change]]:
    """The most that go together beside those that are always made, since one may exclude another, or need it: ZeRO-3
    is refused with int8, and allowed with the bf16 that is named instead.

    What is within such a set takes no less, and is passed over.
    """
    most: list[set[_Change]] = []
    for count in range(len(changes), -1, -1):
        for some in combinations(changes, count):
            beyond = (whole - set(some) for whole in most if whole.issuperset(some))
            if any(all(change.settings.keys().isdisjoint(_MAY_TAKE_MORE) for change in more) for more in beyond):
                continue
            whole = [*some, *always]
            if _starts(_changed(case, whole), memory_bytes):
                most.append(set(some))
                yield whole


def _milder_micro_batches(config: TrialConfig) -> Iterator[_Change]:
    """The largest first, to the one before the strongest change's."""
    micro = config.micro_batch_size
    while isinstance(micro, int) and micro > 2:
        micro //= 2
        yield _Change({"micro_batch_size": micro})


def _shorter_sequences(config: TrialConfig) -> Iterator[_Change]:
    """The longest first."""
    length = config.sequence_length
    while length > LEAST_LENGTH:
        length = max(length // 2, LEAST_LENGTH)
        yield _Change({"sequence_length": length})


def _more_workers(case: Case, most_workers: int) -> Iterator[_Change]:
    """The fewest first."""
    workers = case.workers * 2
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
    if config.trains_all_weights and config.optimizer == "adamw":
        yield _Change({"optimizer": "adamw_8bit"})
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
    settings = {name: value for change in changes for name, value in change.settings.items()}
    workers = max(change.workers or case.workers for change in changes) if changes else case.workers
    # Valid by themselves: to validate them again would take most of the time of a plan that refuses thousands.
    return replace(case, config=case.config.model_copy(update=settings), workers=workers)


def _fits(case: Case, changes: Sequence[_Change], memory_bytes: int, taken: Taken) -> bool:
    changed = _changed(case, changes)
    if not _starts(changed, memory_bytes):
        return False
    return taken(estimate_on(changed.config, case.shape, changed.workers, case.hardware)) <= memory_bytes


def _starts(case: Case, memory_bytes: int) -> bool:
    """Neither refused, nor larger while it loads than what is there."""
    return not refusals(case) and loading_bytes_on(case.config, case.shape, case.hardware) <= memory_bytes
