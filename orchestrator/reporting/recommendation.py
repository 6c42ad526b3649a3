"""Which configuration to take, by a stated rule, and the words that say how sure that is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from orchestrator.planning.pace import OPEN
from orchestrator.reporting import objectives, quantities
from orchestrator.reporting.caveats import caveats
from orchestrator.reporting.noise import ONE_RUN_SPEED, least_memory, logarithms, memory_of, verdict
from orchestrator.reporting.statistics import (
    ConfigurationSummary,
    Estimate,
    Noise,
    competing,
    noise_of,
    paired_difference,
    repeats_to_tell,
    sign_of,
    spell,
    summaries,
)
from orchestrator.results.records import SweepResult, TrialResult, TrialStatus
from orchestrator.results.ties import SAME_OBJECTIVE

RULE = (
    "Of the configurations whose objective is within the noise of the best (the 95 % interval of their difference, "
    "seed by seed, contains 0, by Tukey's studentised range, since the best of them is chosen by the same data; or it "
    "differs by less than 0.01 %), take the one with the least peak memory; of those within 2 % of it, the fastest, by "
    "tokens a second. "
    "Only completed trials compete; where several objectives are named, those on the Pareto front do, and the next "
    "objective takes the place of memory."
)
SAME_MEMORY = 1.02
CLOSE = 0.01
FIRST_REPEATS = 3
UNCLEAR = "no clear difference in memory or speed"

NOT_ENDED = OPEN | {TrialStatus.CANCELLED}

Basis = Literal["within_noise", "best", "single_runs", "only_one", "too_early", "provisional", "nothing"]
NO_ANSWER_YET: Mapping[Basis, str] = {"too_early": "completed so far", "provisional": "best so far"}
"""Where a configuration is shown that nothing speaks for yet, what it is called."""
Preference = Callable[[Sequence[ConfigurationSummary]], ConfigurationSummary]
"""Which of several that are as good to take."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One configuration against the best."""

    configuration_id: str
    label: str
    difference: Estimate | None
    """Of the objective to the best, positive where worse; None where they share no seed."""
    memory_saved: float | None
    """Share of the best's peak memory that it does not need."""
    speedup: float | None
    """Over the best, by tokens a second."""
    memory_differs: bool
    """By more than its noise; of one run each, by more than repeats usually do."""
    speed_differs: bool
    """Likewise."""
    is_within_noise: bool


@dataclass(frozen=True, slots=True)
class Recommendation:
    """The answer."""

    basis: Basis
    configuration_id: str | None
    trial_id: str | None
    """Whose adapter to take: its best repeat."""
    label: str | None
    answer: str
    evidence: tuple[str, ...]
    comparisons: tuple[Comparison, ...]
    """Against the best, which is left out."""
    noise_sd: float | None
    repeats_needed: int | None
    """Repeats that would decide what these cannot."""
    is_decided: bool

    @property
    def called(self) -> str:
        """What the configuration is: `recommended` only where the answer is to take it."""
        return NO_ANSWER_YET.get(self.basis, "recommended")

    @property
    def is_recommended(self) -> bool:
        """Whether the answer is to take the configuration."""
        return self.configuration_id is not None and self.basis not in NO_ANSWER_YET


def recommend(sweep: SweepResult) -> Recommendation:
    """Apply RULE; where it cannot be applied, say why and take the best that there is."""
    found = summaries(sweep)
    completed = [summary for summary in found if summary.objective]
    sound, wild = competing(found)
    contenders = objectives.on_front(sweep, sound)
    told = (*caveats(sweep, found, completed, contenders, wild), *objectives.evidence(sweep, found, sound))
    if completed and not sound:
        answer = (
            "No configuration that has completed keeps the constraints: loosen them, or search more settings."
            f"{objectives.nearest_words(sweep, completed)}"
        )
        return _make("nothing", None, answer, told)
    if not contenders:
        return _without_completed(sweep, found, told)
    best = contenders[0]
    if len(contenders) == 1 < len(sound):
        names = " and ".join(metric for metric, _ in sweep.objectives)
        return _make("best", best, f"{_take(sweep, best)}: no other configuration is better by any of {names}.", told)
    if len(contenders) == 1:
        open_ = sum(_is_to_come(trial) for trial in sweep.trials)
        if open_ or sweep.cut_short:
            of_all = f"{open_} of {len(sweep.trials)} trials have not ended"
            if not open_:
                of_all = "the budget ended the sweep before others were tried"
            return _make("too_early", best, f"Too early to tell: {best.label} alone has completed, and {of_all}.", told)
        answer = (
            f"{_take(sweep, best)}: no other configuration has completed soundly{_and_keeps(sweep)}, so there is "
            "nothing to compare it with."
        )
        return _make("only_one", best, answer, told)
    noise = noise_of({summary.configuration_id: summary.objective_by_repeat for summary in contenders})
    if noise is None:
        return _by_single_runs(sweep, contenders, told)
    return _by_rule(sweep, contenders, noise, told)


def _take(sweep: SweepResult, chosen: ConfigurationSummary, doubt: Sequence[str] = ()) -> str:
    """What is left to run, or to find out, may change the answer."""
    return f"Take {chosen.label}{'' if sweep.is_whole and not doubt else ' for now'}"


def _and_keeps(sweep: SweepResult) -> str:
    return " and keeps the constraints" if sweep.constraints else ""


def trial_to_take(sweep: SweepResult) -> TrialResult | None:
    """Whose adapter to take: the best repeat of the configuration that the answer names; None where it names none."""
    trial_id = recommend(sweep).trial_id
    return next((trial for trial in sweep.trials if trial.trial_id == trial_id), None)


def _make(
    basis: Basis,
    chosen: ConfigurationSummary | None,
    answer: str,
    evidence: Sequence[str],
    comparisons: tuple[Comparison, ...] = (),
    noise: Noise | None = None,
    repeats_needed: int | None = None,
    *,
    is_decided: bool = False,
) -> Recommendation:
    return Recommendation(
        basis=basis,
        configuration_id=chosen.configuration_id if chosen else None,
        trial_id=chosen.best_trial_id if chosen else None,
        label=chosen.label if chosen else None,
        answer=answer,
        evidence=tuple(evidence),
        comparisons=comparisons,
        noise_sd=noise.sd if noise else None,
        repeats_needed=repeats_needed,
        is_decided=is_decided,
    )


def _by_rule(
    sweep: SweepResult, contenders: Sequence[ConfigurationSummary], noise: Noise, caveats: Sequence[str]
) -> Recommendation:
    best = contenders[0]
    comparisons = _compare(sweep, contenders, noise)
    within = {comparison.configuration_id for comparison in comparisons if comparison.is_within_noise}
    preferred = _preference(sweep, contenders)
    chosen = preferred([best, *(c for c in contenders[1:] if c.configuration_id in within)])
    metric = sweep.objective_metric
    if chosen is best:
        value = _value(best)
        asked = f"better by {sweep.objectives[1][0]}" if len(sweep.objectives) > 1 else "cheaper"
        answer = f"{_take(sweep, best)}: it has the best {metric} ({value}), and nothing {asked} is within its noise."
        rejected = _cheaper_but_worse(sweep, preferred, contenders, comparisons)
        return _make("best", best, answer, [*rejected, *caveats], comparisons, noise, is_decided=sweep.is_whole)
    against = next(c for c in comparisons if c.configuration_id == chosen.configuration_id)
    needed, doubt = _doubt(against, best, noise, len(contenders), metric)
    answer = f"{_take(sweep, chosen, doubt)}: it {_within_words(against, _apart_from(chosen, best))}."
    if len(sweep.objectives) > 1:
        answer = f"{answer[:-1]}, and of those within the noise it has the best {sweep.objectives[1][0]}."
    evidence = [f"Its {metric} is {_value(chosen)}; the best mean is {_value(best)} ({best.label}).", *doubt, *caveats]
    return _make(
        "within_noise", chosen, answer, evidence, comparisons, noise, needed, is_decided=sweep.is_whole and not doubt
    )


def _compare(
    sweep: SweepResult, contenders: Sequence[ConfigurationSummary], noise: Noise | None
) -> tuple[Comparison, ...]:
    best, sign = contenders[0], sign_of(sweep)
    resolution = SAME_OBJECTIVE * abs(best.objective.mean) if best.objective else 0.0
    values = {summary.configuration_id: summary.objective_by_repeat for summary in contenders}
    measured = [t for t in sweep.trials if t.status is TrialStatus.COMPLETED and t.configuration_id in values]
    memory = logarithms(measured, memory_of)
    speed = logarithms(measured, lambda trial: trial.tokens_per_s)
    memory_noise, speed_noise, least = noise_of(memory), noise_of(speed), least_memory(sweep)
    comparisons = []
    for other in contenders[1:]:
        pair = (other.configuration_id, best.configuration_id, len(contenders))
        difference = _difference(values, *pair, noise)
        if difference and sign < 0:
            difference = Estimate(-difference.mean, difference.half_width, difference.count)
        lighter, faster = _difference(memory, *pair, memory_noise), _difference(speed, *pair, speed_noise)
        comparisons.append(
            Comparison(
                other.configuration_id,
                other.label,
                difference,
                _saved(other.peak_memory_bytes, best.peak_memory_bytes),
                _ratio(other.tokens_per_s, best.tokens_per_s),
                verdict(lighter, least) == "differs",
                verdict(faster, ONE_RUN_SPEED) == "differs",
                difference is not None and difference.mean <= max(difference.half_width or 0.0, resolution),
            )
        )
    return tuple(comparisons)


def _difference(
    values: Mapping[str, Mapping[int, float]], other: str, best: str, configurations: int, noise: Noise | None
) -> Estimate | None:
    one, reference = values.get(other), values.get(best)
    if not one or not reference:
        return None
    if noise:
        return paired_difference(one, reference, noise, configurations)
    return Estimate(fmean(one.values()) - fmean(reference.values()), None, 1)


def _saved(memory_bytes: int | None, best_bytes: int | None) -> float | None:
    return 1 - memory_bytes / best_bytes if memory_bytes is not None and best_bytes else None


def _preference(sweep: SweepResult, contenders: Sequence[ConfigurationSummary]) -> Preference:
    """Of those as good by the first objective the best by the others, in their order; without others the cheapest."""
    if len(sweep.objectives) < 2:
        return _cheapest
    # Looked up once: thousands on a front are each compared with the best.
    costs = objectives.costs_of(sweep, contenders)
    return lambda candidates: min(candidates, key=lambda c: costs.get(c.configuration_id, (math.inf,) * 2)[1:])


def _cheapest(candidates: Sequence[ConfigurationSummary]) -> ConfigurationSummary:
    """The least memory; within 2 % of it the fastest; the first, which has the best objective, where they tie."""
    memory = [c.peak_memory_bytes if c.peak_memory_bytes is not None else math.inf for c in candidates]
    light = [c for c, size in zip(candidates, memory, strict=True) if size <= min(memory) * SAME_MEMORY]
    return max(light, key=lambda c: c.tokens_per_s or 0.0)


def _ratio(over: float | None, under: float | None) -> float | None:
    return over / under if over and under else None


def _value(summary: ConfigurationSummary) -> str:
    assert summary.objective
    return quantities.plus_minus(summary.objective.mean, summary.objective.half_width)


def _within_words(comparison: Comparison, best: str) -> str:
    assert comparison.difference
    difference = comparison.difference
    apart = f"is within {quantities.plus_minus(difference.mean, difference.half_width)} of {best}"
    if max(abs(difference.mean), difference.half_width or 0.0) < quantities.NOTHING:
        apart = f"is as good as {best}"
    return ", ".join([apart, *(_cost_words(comparison) or [f"with {UNCLEAR}"])])


def _apart_from(chosen: ConfigurationSummary, best: ConfigurationSummary) -> str:
    """The best's label, without the settings that both share; with its micro-batch where that is another."""
    differing = [f"{n}={spell(v)}" for n, v in best.settings if v != dict(chosen.settings)[n]]
    alike = "" if len(differing) == len(best.settings) else " (all else alike)"
    if best.micro_batch_sizes != chosen.micro_batch_sizes and "micro_batch_size" not in dict(best.settings):
        differing += [f"micro_batch_size={size}" for size in best.micro_batch_sizes]
    return f"{' '.join(differing)}{alike}" if differing else best.label


def _cost_words(comparison: Comparison) -> list[str]:
    """`takes 31 % less memory and is 1.4× faster`; left out is what differs by less than 1 %, or may be noise."""
    words = []
    saved, speedup = comparison.memory_saved, comparison.speedup
    if saved is not None and abs(saved) >= 0.01 and comparison.memory_differs:
        words.append(f"takes {quantities.share(abs(saved))} {'less' if saved > 0 else 'more'} memory")
    if speedup is not None and not 0.99 < speedup < 1.01 and comparison.speed_differs:
        times = max(speedup, 1 / speedup)
        shown = f"{times:.2f}" if times < 1.095 else f"{times:.2g}"
        words.append(f"is {shown}× {'faster' if speedup > 1 else 'slower'}")
    return [" and ".join(words)] if words else []


def _is_cheaper(
    sweep: SweepResult,
    preferred: Preference,
    best: ConfigurationSummary,
    other: ConfigurationSummary,
    comparison: Comparison,
) -> bool:
    """Whether the rule would take it were it as good, and not for what may be noise."""
    if preferred([best, other]) is best:
        return False
    lighter = comparison.memory_differs and (comparison.memory_saved or 0.0) > 0
    faster = comparison.speed_differs and (comparison.speedup or 0.0) > 1
    return lighter or faster or len(sweep.objectives) > 1


def _cheaper_but_worse(
    sweep: SweepResult,
    preferred: Preference,
    contenders: Sequence[ConfigurationSummary],
    comparisons: Sequence[Comparison],
) -> list[str]:
    best, words = contenders[0], []
    for other, comparison in zip(contenders[1:], comparisons, strict=True):
        saves = _cost_words(comparison)
        if not _is_cheaper(sweep, preferred, best, other, comparison) or comparison.difference is None or not saves:
            continue
        apart = quantities.plus_minus(comparison.difference.mean, comparison.difference.half_width)
        near = comparison.difference.mean <= CLOSE * abs(best.objective.mean) if best.objective else False
        close = ", which is less than 1 % and may be little enough" if near else ""
        words.append(f"{other.label} {' '.join(saves)}, but is worse by {apart}{close}.")
    return words[:5]


def _doubt(
    against: Comparison, best: ConfigurationSummary, noise: Noise, configurations: int, metric: str
) -> tuple[int | None, list[str]]:
    """What the data leave open: a difference past 1 % of the objective that they cannot rule out."""
    assert against.difference
    assert against.difference.half_width is not None
    assert best.objective
    matters = CLOSE * abs(best.objective.mean)
    worst = against.difference.mean + against.difference.half_width
    if worst <= matters:
        return None, []
    tell = max(against.difference.mean, matters)
    needed = repeats_to_tell(tell, noise, configurations)
    times = f"about {needed} repeats" if needed else "more than 1,000 repeats"
    return needed, [
        f"The data cannot decide: {against.difference.count} repeats do not rule out that its {metric} is worse by "
        f"up to {worst:.2g}. It would take {times} (search.repeats) to tell a difference of "
        f"{tell:.2g} from the noise."
    ]


def _by_single_runs(
    sweep: SweepResult, contenders: Sequence[ConfigurationSummary], caveats: Sequence[str]
) -> Recommendation:
    level = _compare(sweep, contenders, None)
    same = [other for other, c in zip(contenders[1:], level, strict=True) if c.is_within_noise]
    preferred = _preference(sweep, contenders)
    best = preferred([contenders[0], *same])
    contenders = [best, *(other for other in contenders if other is not best)]
    comparisons = _compare(sweep, contenders, None)
    metric = sweep.objective_metric
    if len(same) == len(contenders) - 1:
        return _by_cost(sweep, contenders, comparisons, caveats)
    # A member has no repeats: its settings and checkpoints come from the others of its population.
    is_member = any(trial.suggestion and trial.suggestion.generation is not None for trial in sweep.trials)
    asked = _repeats_to_come(sweep, contenders)
    needed = None if is_member else asked or FIRST_REPEATS
    how = f"{needed} repeats (search.repeats: {needed}) would begin to"
    if is_member:
        how = "populations of another search.seed, each under a --name of its own, would begin to"
    elif asked:
        how = f"the repeats that are still to come (of {asked}) begin to"
    answer = (
        f"{_take(sweep, best)}: it has the best {metric} ({_value(best)}), but one run each cannot tell a difference "
        f"from noise; {how}."
    )
    close = []
    for other, comparison in zip(contenders[1:], comparisons, strict=True):
        difference = comparison.difference
        cheaper = _is_cheaper(sweep, preferred, best, other, comparison)
        if difference and cheaper and best.objective and difference.mean <= CLOSE * abs(best.objective.mean):
            words = " and ".join(_cost_words(comparison)) or f"shows {UNCLEAR}"
            close.append(f"{other.label} is within {difference.mean:.2g} of it, less than 1 %, and {words}.")
    return _make("single_runs", best, answer, [*close[:5], *caveats], comparisons, None, needed)


def _repeats_to_come(sweep: SweepResult, contenders: Sequence[ConfigurationSummary]) -> int | None:
    """How many repeats are asked for, where some of configurations that have completed once are to come."""
    completed = {summary.configuration_id for summary in contenders}
    waiting = [t.repeat for t in sweep.trials if _is_to_come(t) and t.configuration_id in completed]
    return 1 + max(waiting) if waiting else None


def _is_to_come(trial: TrialResult) -> bool:
    return trial.status in NOT_ENDED and trial.asked_for


def _by_cost(
    sweep: SweepResult,
    contenders: Sequence[ConfigurationSummary],
    comparisons: tuple[Comparison, ...],
    caveats: Sequence[str],
) -> Recommendation:
    """Ways to compute the same, as ZeRO stages are: their costs decide, and no repeat is needed to see that."""
    best = contenders[0]
    is_least = all(comparison.memory_saved is None or comparison.memory_saved <= 0 for comparison in comparisons)
    why = "takes the least memory" if is_least else f"is within 2 % of the least memory, {_speed_words(comparisons)}"
    if len(sweep.objectives) > 1:
        why = f"is the best of them by {sweep.objectives[1][0]}"
    counted_all = "both" if len(contenders) == 2 else f"all {len(contenders)}"
    answer = (
        f"{_take(sweep, best)}: {counted_all} configurations come to the same {sweep.objective_metric} "
        f"({_value(best)}), and it {why}."
    )
    others = [f"{comparison.label} {words[0]}." for comparison in comparisons if (words := _cost_words(comparison))]
    return _make("single_runs", best, answer, [*others[:8], *caveats], comparisons, is_decided=sweep.is_whole)


def _speed_words(comparisons: Sequence[Comparison]) -> str:
    """How the speed of the one that was taken stands to that of the others which take as little memory."""
    least_share = min(1.0, *(1 - comparison.memory_saved for comparison in comparisons if comparison.memory_saved))
    light = [c for c in comparisons if c.memory_saved is not None and 1 - c.memory_saved <= least_share * SAME_MEMORY]
    if all(comparison.speed_differs for comparison in light):
        return "where it is the fastest, by one run each"
    return "where no other is clearly faster"


def _without_completed(
    sweep: SweepResult, found: Sequence[ConfigurationSummary], caveats: Sequence[str]
) -> Recommendation:
    ran = [summary for summary in found if summary.provisional_objective is not None and not summary.is_broken]
    kept = [summary for summary in ran if not summary.breaks]
    if not kept:
        evaluated = any(trial.best for trial in sweep.trials)
        why = (
            "no configuration so far keeps the constraints"
            if ran
            else f"no trial that went well has its {sweep.objective_metric}"
            if evaluated
            else "no trial has completed an evaluation"
        )
        is_over = sweep.is_whole and not any(_is_to_come(trial) for trial in sweep.trials)
        answer = f"No answer: {why}, and the sweep has ended." if is_over else f"No answer yet: {why}."
        return _make("nothing", None, answer, caveats)
    best = kept[0]
    value = quantities.number(best.provisional_objective)
    answer = (
        f"No trial has completed. {best.label} has the best {sweep.objective_metric} so far ({value}), "
        "at a step that others may not have reached."
    )
    return _make("provisional", best, answer, caveats)
