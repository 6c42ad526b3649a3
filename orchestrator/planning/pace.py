"""How fast trials ran here against what was predicted, and what follows for those to come."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Self

from orchestrator.config.trial_config import TrialConfig
from orchestrator.planning.hardware import Hardware, is_named
from orchestrator.planning.step_time import UNMEASURED, Range, certain
from orchestrator.results.records import SweepResult, TrialResult, TrialStatus

KIND = ("precision", "engine", "zero_stage", "offload", "attention", "gradient_checkpointing")
"""Within one value of all these, on shared or on whole GPUs, the prediction is wrong by about the same factor."""
SPREAD_ALIKE, SPREAD_OTHERS = 1.25, 1.6
"""At least so far from the median ratio, each way, lies a trial of a kind that was measured, or of another."""
READ_SWEEPS = 10
"""So many of a storage's sweeps are looked at, the newest: what is older may have run on other nodes."""
FEWEST_STEPS = 3
"""A trial of fewer steps tells of its warm-up."""
FARTHEST = 1e6
"""A trial so many times as fast or as slow as was predicted tells of a damaged record, and not of the device."""
ONCE_S = Range(0.3, 3.0, 13.0)
"""Seconds of a trial that are neither steps nor evaluations, until they were measured: medians of sweeps on 2 CPU
cores, of tiny-llama, of SmolLM2-135M, and of that beside much other work."""
RAN = frozenset({TrialStatus.COMPLETED, TrialStatus.STOPPED})
OPEN = frozenset({TrialStatus.PENDING, TrialStatus.RUNNING})


@dataclass(frozen=True, slots=True)
class _Measured:
    kind: tuple[object, ...]
    ratio: float
    """Seconds a step over those predicted."""
    attention: str
    rows: tuple[str, int] | None
    """The model and the sequence_length that they were read for, each row by itself; None where they were packed."""


@dataclass(frozen=True, slots=True)
class Pace:
    """What was measured; empty where nothing was."""

    steps: tuple[_Measured, ...] = ()
    once_s: Range = ONCE_S
    """Of a trial on a warm worker group, for data and model and its end."""
    evaluation_s: float = 0.0
    """Of one evaluation with what is saved after it; until one was measured nobody knows how much data it has."""

    @classmethod
    def of(cls, sweeps: Iterable[SweepResult], model: str, hardware: Hardware) -> Self:
        """Of all trials that ran on such a device; evaluations and saving count of the same model only."""
        steps: list[_Measured] = []
        ended: list[TrialResult] = []
        for sweep in sweeps:
            ran = [t for t in sweep.trials if t.status in RAN and t.devices and is_named(t.devices[0], hardware)]
            steps += [measured for trial in ran if (measured := _measured(trial, sweep.model))]
            if sweep.model == model:
                ended += [trial for trial in ran if trial.status is TrialStatus.COMPLETED]
        if not ended:
            return cls(tuple(steps))
        once_s, evaluation_s = (statistics.median(map(seconds, ended)) for seconds in (_once_s, _evaluation_s))
        return cls(tuple(steps), certain(once_s), evaluation_s)

    def evaluations_s(self, config: TrialConfig) -> float:
        """Of all that a trial makes."""
        return self.evaluation_s * _evaluations(config)

    def correction(self, config: TrialConfig, gpu_shared_by: int = 1) -> Range:
        """Measured over predicted, as it is expected of this configuration."""
        kind = _kind_of(config, gpu_shared_by)
        alike = [measured.ratio for measured in self.steps if measured.kind == kind]
        if alike:
            return _around(alike, SPREAD_ALIKE)
        every = [measured.ratio for measured in self.steps]
        return _around(every, SPREAD_OTHERS) if every else UNMEASURED


def _measured(trial: TrialResult, model: str) -> _Measured | None:
    last, predicted_s = trial.last, trial.predicted_step_time_s
    steps = trial.steps_trained
    if last is None or steps < FEWEST_STEPS or not predicted_s:
        return None
    ratio = last.seconds / steps / predicted_s
    if not 1 / FARTHEST < ratio < FARTHEST:
        return None
    config = trial.config
    rows = None if config.packing else (model, config.sequence_length)
    return _Measured(_kind_of(config, trial.gpu_shared_by), ratio, config.attention, rows)


def _once_s(trial: TrialResult) -> float:
    timing = trial.timing
    counted_s = timing.startup_s + timing.training_s + timing.evaluation_s + timing.saving_s
    return max(0.0, timing.total_s - counted_s)


def _evaluation_s(trial: TrialResult) -> float:
    parent = trial.started_from
    # Those before it were its parent's, which ended at one of them; a record that says otherwise is no reason to fail.
    own = _evaluations(trial.config) - (parent.step // trial.config.eval_every if parent else 0)
    return (trial.timing.evaluation_s + trial.timing.saving_s) / max(1, own)


def _evaluations(config: TrialConfig) -> int:
    """After every `eval_every` steps, and after the last."""
    return math.ceil(config.max_steps / config.eval_every)


def _kind_of(config: TrialConfig, gpu_shared_by: int) -> tuple[object, ...]:
    return (gpu_shared_by > 1, *(getattr(config, name) for name in KIND))


def _around(ratios: list[float], least: float) -> Range:
    """The median, and where 90 % lie if the ratios' logarithms are normal."""
    middle = statistics.median(ratios)
    spread = max(least, math.exp(1.645 * statistics.pstdev(map(math.log, ratios))))
    return Range(middle / spread, middle, middle * spread)


def to_come(trials: Iterable[TrialResult], launches: int | None) -> int:
    """How many trials a search that may launch so many in all has not proposed yet; None: all are known."""
    proposed = sum(trial.suggestion is not None and trial.status is not TrialStatus.INFEASIBLE for trial in trials)
    return max(0, (launches or 0) - proposed)


def left_s(
    trials: Collection[TrialResult],
    planned_s: Mapping[str, float],
    gone_s: Mapping[str, float],
    slots: int,
    launches: int | None = None,
) -> float | None:
    """Seconds until the last trial ends; None where none is open or to come.

    `planned_s` is what the plan gives each trial (the mean where it knows of none), `gone_s` how long each at work has
    run. What ended trials of its kind took of their plan, the scheduler's stops among it, an open one is taken to take;
    where none of the kind has ended, as all that ended.

    An adaptive search may launch `launches` in all (None: all are known). Those that it has not proposed yet are taken
    to take what all that ended took; until one has, None: plans have examples, and of a population whole members.
    """
    known = [seconds for seconds in planned_s.values() if seconds]
    mean_s = statistics.mean(known) if known else 1.0
    took: dict[object, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
    open_: list[tuple[TrialResult, float]] = []
    for trial in trials:
        planned = planned_s.get(trial.trial_id) or mean_s
        if trial.status in OPEN:
            open_.append((trial, planned))
        elif trial.timing.total_s > 0:
            for key in (_kind_of(trial.config, trial.gpu_shared_by), "all"):
                took[key] = took[key][0] + trial.timing.total_s, took[key][1] + planned

    if launches is not None and not took:
        return None

    def pace(kind: object) -> float:
        seconds, planned = took[kind if kind in took else "all"]
        return seconds / planned if planned else 1.0

    each = [mean_s * pace("all")] * to_come(trials, launches)
    for trial, planned in open_:
        whole_s = planned * pace(_kind_of(trial.config, trial.gpu_shared_by))
        each.append(max(0.0, whole_s - gone_s.get(trial.trial_id, 0.0)))
    # Of a population no more run at a time than it has members.
    at_once = min(slots, len(planned_s)) or slots
    return max(sum(each) / at_once, *each) if each else None
