"""What one way of computing the same costs and saves against another, in words: a precision, a stage, a kernel."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean

from orchestrator.config.sweep_config import COSTS
from orchestrator.reporting import quantities
from orchestrator.reporting.curves import Curve, losses_where_both_were
from orchestrator.reporting.effects import Effect, SettingValue, main_effects, measured_trials, over_seeds
from orchestrator.reporting.noise import ONE_RUN_SPEED, Verdict, least_memory, logarithms, memory_of, verdict
from orchestrator.reporting.statistics import Estimate, noise_of
from orchestrator.results.records import SweepResult, TrialResult
from orchestrator.results.ties import SAME_OBJECTIVE

WAYS = ("precision", "engine", "zero_stage", "offload", "attention", "gradient_checkpointing", "optimizer")
"""Settings that change how a step is computed, and hardly what: whoever searches them asks for the trade."""
MAX_VALUES = 6


def trades(sweep: SweepResult, effects: Sequence[Effect], curves: Mapping[str, Curve]) -> tuple[str, ...]:
    """`attention=sdpa against eager, all else alike: 14 % less memory, 1.1× faster; at sequence_length=1024: …`."""
    longest = _at_the_longest(sweep)
    return tuple(
        line
        for effect in effects
        if effect.setting in WAYS
        for value in effect.values[:MAX_VALUES]
        if value.value != effect.reference and (line := _line(sweep, effect, value, longest, curves))
    )


def _line(
    sweep: SweepResult,
    effect: Effect,
    value: SettingValue,
    longest: tuple[str, SweepResult, Sequence[Effect]],
    curves: Mapping[str, Curve],
) -> str:
    told = ", ".join(_words(sweep, effect, value, curves))
    if not told:
        return ""
    name, longest_sweep, there = longest
    far = [(e, v) for e in there if e.setting == effect.setting for v in e.values if v.value == value.value]
    at_the_end = ", ".join(_words(longest_sweep, *far[0], curves)) if far else ""
    more = f"; at {name}: {at_the_end}" if at_the_end else ""
    known = (value.difference, value.memory_ratio, value.speed_ratio)
    once = "" if any(one and one.half_width is not None for one in known) else ", one run each"
    return f"{effect.setting}={value.value} against {effect.reference}, all else alike{once}: {told}{more}."


def _words(sweep: SweepResult, effect: Effect, value: SettingValue, curves: Mapping[str, Curve]) -> Iterator[str]:
    """Of what was measured over pairs of trials; nothing where there is no pair."""
    size = abs(value.objective.mean) if value.objective else 0.0
    # The words on memory and speed tell those objectives already.
    if sweep.objective_metric not in COSTS and value.difference:
        yield _change_words(sweep.objective_metric, value.difference, size)
    elif pairs := losses_where_both_were(sweep, curves, effect.setting, value.value, effect.reference):
        # What saves memory or time is judged by what it does to the loss, of trials that were stopped too.
        change = over_seeds((repeat, one - other) for repeat, one, other in pairs)
        assert change
        told = _change_words("eval_loss", change, fmean(abs(one) for _, one, _ in pairs))
        yield f"{told} at the last evaluation that both reached"
    memory, speed = value.memory_ratio, value.speed_ratio
    of_memory = _verdict(sweep, memory, memory_of, least_memory(sweep))
    of_speed = _verdict(sweep, speed, lambda trial: trial.tokens_per_s, ONE_RUN_SPEED)
    if of_memory == of_speed == "unclear":
        yield "no clear difference in memory or speed"
        return
    if memory and of_memory:
        less = f"{quantities.share(abs(1 - memory.mean))} {'less' if memory.mean < 1 else 'more'} memory"
        yield {"same": "as much memory", "differs": less, "unclear": "no clear difference in memory"}[of_memory]
    if speed and of_speed:
        faster = f"{speed.mean:.2f}× faster" if speed.mean > 1 else f"{1 / speed.mean:.2f}× slower"
        yield {"same": "as fast", "differs": faster, "unclear": "no clear difference in speed"}[of_speed]


def _verdict(
    sweep: SweepResult, ratio: Estimate | None, reading: Callable[[TrialResult], float | None], least: float
) -> Verdict | None:
    if ratio is None or ratio.mean <= 0:
        return None
    # Pooled over configurations, as in the recommendation: two seeds alone tell next to nothing of their noise.
    noise = noise_of(logarithms(measured_trials(sweep), reading))
    half_width = noise.half_width(2, ratio.count) if noise else None
    return verdict(Estimate(math.log(ratio.mean), half_width, ratio.count), least)


def _change_words(metric: str, change: Estimate, size: float) -> str:
    """`eval_loss +0.20`, of a metric whose values are about `size`."""
    if max(abs(change.mean), change.half_width or 0.0) <= max(quantities.NOTHING, SAME_OBJECTIVE * size):
        return f"the same {metric}"
    sign = "+" if change.mean > 0 else ""
    return f"{metric} {sign}{quantities.plus_minus(change.mean, change.half_width)}"


def _at_the_longest(sweep: SweepResult) -> tuple[str, SweepResult, Sequence[Effect]]:
    """The trials of the longest sequences alone and their effects, where several lengths were searched."""
    lengths = {trial.config.sequence_length for trial in sweep.trials if trial.steps}
    if "sequence_length" not in sweep.searched or len(lengths) < 2:
        return "", sweep, ()
    longest = max(lengths)
    kept = tuple(trial for trial in sweep.trials if trial.config.sequence_length == longest)
    there = sweep.model_copy(update={"trials": kept})
    return f"sequence_length={longest}", there, main_effects(there)
