"""What a trial that does not fit in memory could change so that it does."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from operator import attrgetter
from typing import Any, Literal, NamedTuple

from orchestrator.config.trial_config import Precision, TrialConfig
from orchestrator.planning.compatibility import Case, refusals
from orchestrator.planning.memory import estimate_on, loading_bytes_on
from orchestrator.planning.notes import offload_exceeds_the_host

LOW_RANK = 8
"""The lowest that is named where a higher rank does not fit."""
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


class _Needed(NamedTuple):
    """Bytes of a worker's device, with room for what the allocator keeps and without."""

    with_room: int
    without_room: int


Taken = Callable[[_Needed], int]
_with_room: Taken = attrgetter("with_room")
_without_room: Taken = attrgetter("without_room")


@dataclass(frozen=True, slots=True, eq=False)
class _Change:
    """Cheaper settings that go together."""

    settings: Mapping[str, Any]
    workers: int | None = None
    milder: tuple[_Change, ...] = ()
    """Of the same setting, the mildest first."""


def what_fits(case: Case, memory_bytes: int, most_workers: int) -> str | None:
    """Each single change by which a worker takes no more than this, or the fewest together; None: not even all do.

    Those that alter the result least stand in front: a smaller micro-batch, checkpointing, more workers to share among.
    A lower rank, which alters it most, comes last.
    More workers beside other changes are named where those alone are not enough: the fewest that fit. Where nothing
    else is enough both last resorts are named: the offload of parameters, which is slow, and shorter sequences, which
    cut the data: the longest that fit.
    What leaves the allocator room is named before what would run without.
    """
    # What a GPU has decides here alone: trials on larger and smaller ones are estimated once.
    hardware = replace(case.hardware, gpu_memory_bytes=None)
    return _first_that_fits(
        replace(case, config=for_memory(case.config), hardware=hardware), memory_bytes, most_workers
    )


@lru_cache(maxsize=1024)
def _first_that_fits(case: Case, memory_bytes: int, most_workers: int) -> str | None:
    shares, offloaded = [*_more_workers(case, most_workers)], [*_offloaded_parameters(case)]
    shortest = _Change({"sequence_length": min(LEAST_LENGTH, case.config.sequence_length)})

    # Asked first, since of thousands that fit nowhere each would be asked for everything.
    besides = ([], *filter(None, (shares[-1:], offloaded)))
    beside = next((always for always in besides if _has_any(case, [*always, shortest], memory_bytes)), None)
    if beside is None:
        return None
    # Where not even all together are enough, none is by itself.
    is_enough = _has_any(case, [], memory_bytes)
    single = [
        change
        for change in [*(_strongest(case) if is_enough else []), *shares]
        if _fits(case, [change], memory_bytes, _without_room)
    ]
    if roomy := _mildest_alone(case, single, memory_bytes, _with_room):
        tight = _mildest_alone(case, single, memory_bytes, _without_room)
        more = {name: told for name, told in tight.items() if name not in roomy}
        return _any_of(roomy) + (f", or, with little to spare, {_any_of(more)}" if more else "")
    if is_enough and (changes := _fewest(case, [], memory_bytes, _with_room)):
        return " and ".join(_told(case, changes))
    if tight := _mildest_alone(case, single, memory_bytes, _without_room):
        return _any_of(tight)
    if is_enough and (changes := _fewest(case, [], memory_bytes, _without_room)):
        return " and ".join(_told(case, changes))
    if told := _first_beside(case, ([share] for share in shares), memory_bytes):
        return told
    slow = _first_beside(case, [offloaded] if offloaded else [], memory_bytes)
    if slow and beside is offloaded:
        return slow
    short = _first_beside(
        case, ([*beside, change] for change in _longest_sequence(case, beside, memory_bytes)), memory_bytes
    )
    return ", or ".join(filter(None, (slow, short))) or None


def _first_beside(case: Case, each: Iterable[Sequence[_Change]], memory_bytes: int) -> str | None:
    """Of changes that are always made the first that fit, with the fewest others, in words."""
    for always in each:
        for taken in (_with_room, _without_room):
            if changes := _fewest(case, always, memory_bytes, taken):
                return " and ".join(_told(case, changes))
    return None


def _mildest_alone(case: Case, changes: Sequence[_Change], memory_bytes: int, taken: Taken) -> dict[str, str]:
    """Of each setting the mildest change that is enough by itself, in words."""
    first: dict[str, str] = {}
    for change in changes:
        # Where the strongest is not enough no milder one is: one estimate in place of one for each.
        if _fits(case, [change], memory_bytes, taken):
            mildest = next((mild for mild in change.milder if _fits(case, [mild], memory_bytes, taken)), change)
            one, *rest = _told(case, [mildest])
            first.setdefault(one.split(" ")[0], " with ".join(filter(None, (one, " and ".join(rest)))))
    return first


def _any_of(mildest: Mapping[str, str]) -> str:
    return ", or ".join(mildest.values())


def _fewest(case: Case, always: Sequence[_Change], memory_bytes: int, taken: Taken) -> Sequence[_Change] | None:
    """Changes that fit, of those that go together, without any that the others do without, and none stronger than it
    must be."""
    kept = next(_together(case, always, memory_bytes, taken), None)
    if kept is None:
        return None
    spare = [change for change in reversed(kept) if change not in always]
    # A second time for those that another needed, which the others do without.
    for dropped in [*spare, *(change for change in spare if "precision" in change.settings)]:
        others = [change for change in kept if change is not dropped]
        if len(others) < len(kept) and _fits(case, others, memory_bytes, taken):
            kept = others
    for strong in reversed(kept):
        for mild in strong.milder:
            others = [mild if change is strong else change for change in kept]
            if _fits(case, others, memory_bytes, taken):
                kept = others
                break
    return kept


def _together(case: Case, always: Sequence[_Change], memory_bytes: int, taken: Taken) -> Iterator[list[_Change]]:
    """All changes that go together, beside those that are always made; of which fit."""
    for whole in _wholes(case):
        changes = [*whole, *always]
        if _fits(case, changes, memory_bytes, taken):
            yield changes


@lru_cache(maxsize=1)
def _wholes(case: Case) -> tuple[list[_Change], ...]:
    """All that never take more, with each choice of the others, which can, or are refused with one another: ZeRO-3 with
    int8, and not with the bf16 that is named instead. Kept, since one trial asks for them many times."""
    first = [change for change in _before(case.config) if not refusals(_changed(case, [change]))]
    last = [*_lower_rank(case)]
    each = product(*([*group, None] for group in _one_of(case)))
    return tuple([*first, *(change for change in some if change), *last] for some in each)


def _strongest(case: Case) -> list[_Change]:
    """Of each setting, for a worker alone."""
    return [*_before(case.config), *(change for group in _one_of(case) for change in group), *_lower_rank(case)]


def _has_any(case: Case, always: Sequence[_Change], memory_bytes: int) -> bool:
    return any(_together(case, always, memory_bytes, _without_room))


def _longest_sequence(case: Case, beside: Sequence[_Change], memory_bytes: int) -> list[_Change]:
    """The longest of ever shorter sequences that fits beside others, found by halves, since no shorter one takes more;
    of one that is as short as can be, none."""
    shorter = []
    length = case.config.sequence_length
    while length > LEAST_LENGTH:
        length = max(length // 2, LEAST_LENGTH)
        shorter.append(_Change({"sequence_length": length}))
    first = bisect_left(shorter, True, key=lambda change: _has_any(case, [*beside, change], memory_bytes))
    return shorter[first : first + 1]


def _more_workers(case: Case, most_workers: int) -> Iterator[_Change]:
    """The fewest first."""
    workers = case.workers * 2
    while workers <= most_workers:
        yield _Change({"engine": "deepspeed", "zero_stage": 3}, workers)
        workers *= 2


def _before(config: TrialConfig) -> Iterator[_Change]:
    """What never takes more, and alters the result least."""
    if config.attention == "eager":
        yield _Change({"attention": "sdpa"})
    if isinstance(config.micro_batch_size, int) and config.micro_batch_size > 1:
        yield _halved("micro_batch_size", config.micro_batch_size, 1)
    if not config.gradient_checkpointing:
        yield _Change({"gradient_checkpointing": True})


def _one_of(case: Case) -> tuple[list[_Change], ...]:
    """Groups of which no two changes go together. They can take more, as where quantised weights load on a CPU, or
    ZeRO-3 gathers a large vocabulary."""
    config = case.config
    states = []
    if config.offload == "none" and case.hardware.device == "cuda":
        states.append(_offload(config, "optimizer", max(config.zero_stage, 2)))
    if config.optimizer == "adamw":
        states.append(_Change({"optimizer": "adamw_8bit"}))
    shards = config.zero_stage < 3 and case.workers > 1
    sharded = [_Change({"engine": "deepspeed", "zero_stage": 3})] if shards else []
    return states, sharded, [_Change({"precision": precision}) for precision in _leaner_precisions(case)]


def _offloaded_parameters(case: Case) -> Iterator[_Change]:
    """Of which hardly anything stays on the device, and whose every step waits for the host's memory."""
    if case.config.offload != "optimizer_and_parameters" and case.hardware.device == "cuda":
        yield _offload(case.config, "optimizer_and_parameters", 3)


def _lower_rank(case: Case) -> Iterator[_Change]:
    rank = case.config.rank
    if isinstance(rank, int) and rank > LOW_RANK:
        yield _halved("rank", rank, LOW_RANK)


def _halved(name: str, value: int, least: int) -> _Change:
    milder = []
    while (value := value // 2) > least:
        milder.append(_Change({name: value}))
    return _Change({name: least}, milder=tuple(milder))


def _offload(config: TrialConfig, what: Literal["optimizer", "optimizer_and_parameters"], stage: int) -> _Change:
    """With what it needs: a stage of ZeRO, and an optimizer whose states can be offloaded."""
    optimizer = "adamw" if config.optimizer == "adamw_8bit" else config.optimizer
    return _Change({"offload": what, "optimizer": optimizer, "engine": "deepspeed", "zero_stage": stage})


def _leaner_precisions(case: Case) -> Iterator[Precision]:
    """4-bit weights, where those that are trained, or a mixture's, are not quantised; and half precision, also in place
    of quantised weights, of which ZeRO-3 needs room for the whole model as it loads."""
    config, half = case.config, Precision.BF16 if case.hardware.has_bf16 else Precision.FP16
    if config.precision is not Precision.NF4 and not config.trains_all_weights and not case.shape.experts:
        yield Precision.NF4
    if config.precision not in (Precision.BF16, Precision.FP16):
        yield half


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
    return Case(case.config.model_copy(update=settings), case.shape, case.hardware, workers, case.loop)


def _fits(case: Case, changes: Sequence[_Change], memory_bytes: int, taken: Taken) -> bool:
    changed = _changed(case, changes)
    # Asked first, since it takes a fiftieth of an estimate.
    if loading_bytes_on(changed.config, changed.shape, changed.workers, changed.hardware) > memory_bytes:
        return False
    needed = _needed(changed)
    return needed is not None and taken(needed) <= memory_bytes


@lru_cache(maxsize=16384)
def _needed(case: Case) -> _Needed | None:
    """None where it is refused, or larger in the host's memory than what is there.

    Kept, since trials that differ in what a change alters come to the same, and each is asked for twice: with room and
    without.
    """
    if refusals(case) or offload_exceeds_the_host(case):
        return None
    # Of what is not quantised the bare loop takes no less than another in anything: one estimate in place of two.
    loop = "bare" if case.loop == "any" and not case.config.precision.is_quantized else case.loop
    memory = estimate_on(case.config, case.shape, case.workers, case.hardware, loop)
    return _Needed(memory.device_bytes, memory.needed_bytes)
