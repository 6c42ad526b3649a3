"""What one way of computing the same costs and saves against another, in words: a precision, a stage, a kernel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from orchestrator.reporting import quantities
from orchestrator.reporting.effects import Effect, SettingValue, main_effects
from orchestrator.reporting.statistics import SAME_OBJECTIVE
from orchestrator.results.records import SweepResult

WAYS = ("precision", "engine", "zero_stage", "offload", "attention", "gradient_checkpointing", "optimizer")
"""Settings that change how a step is computed, and hardly what: whoever searches them asks for the trade."""
MAX_VALUES = 6
LITTLE = 0.01
COSTS = frozenset({"peak_memory_bytes", "tokens_per_s", "step_time_s"})
"""Objectives that the words on memory and speed tell already."""


def trades(sweep: SweepResult, effects: Sequence[Effect]) -> tuple[str, ...]:
    """`attention=sdpa against eager, all else alike: 14 % less memory, 1.1× faster; at sequence_length=1024: …`."""
    longest = _at_the_longest(sweep)
    return tuple(
        line
        for effect in effects
        if effect.setting in WAYS
        for value in effect.values[:MAX_VALUES]
        if (line := _line(sweep, effect, value, longest))
    )


def _line(sweep: SweepResult, effect: Effect, value: SettingValue, longest: tuple[str, Sequence[Effect]]) -> str:
    told = ", ".join(_words(sweep, value))
    if not told:
        return ""
    name, there = longest
    far = next((v for e in there if e.setting == effect.setting for v in e.values if v.value == value.value), None)
    at_the_end = ", ".join(_words(sweep, far)) if far else ""
    more = f"; at {name}: {at_the_end}" if at_the_end else ""
    return f"{effect.setting}={value.value} against {effect.reference}, all else alike: {told}{more}."


def _words(sweep: SweepResult, value: SettingValue) -> Iterator[str]:
    """Of what was measured over pairs of trials; nothing where there is no pair."""
    change = value.difference
    if change and sweep.objective_metric not in COSTS:
        size = abs(value.objective.mean) if value.objective else 0.0
        if max(abs(change.mean), change.half_width or 0.0) <= max(quantities.NOTHING, SAME_OBJECTIVE * size):
            yield f"the same {sweep.objective_metric}"
        else:
            sign = "+" if change.mean > 0 else ""
            yield f"{sweep.objective_metric} {sign}{quantities.plus_minus(change.mean, change.half_width)}"
    if memory := value.memory_ratio:
        apart = abs(1 - memory.mean)
        yield (
            f"{quantities.share(apart)} {'less' if memory.mean < 1 else 'more'} memory"
            if apart >= LITTLE
            else "as much memory"
        )
    if speed := value.speed_ratio:
        if abs(1 - speed.mean) < LITTLE or speed.mean <= 0:
            yield "as fast"
        else:
            yield f"{speed.mean:.2f}× faster" if speed.mean > 1 else f"{1 / speed.mean:.2f}× slower"


def _at_the_longest(sweep: SweepResult) -> tuple[str, Sequence[Effect]]:
    """The effects among the trials of the longest sequences alone, where several lengths were searched."""
    lengths = {trial.config.sequence_length for trial in sweep.trials if trial.steps}
    if "sequence_length" not in sweep.searched or len(lengths) < 2:
        return "", ()
    longest = max(lengths)
    kept = tuple(trial for trial in sweep.trials if trial.config.sequence_length == longest)
    return f"sequence_length={longest}", main_effects(sweep.model_copy(update={"trials": kept}))
