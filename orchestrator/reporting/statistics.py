"""What the trials of a sweep say, with how sure they are of it: means, intervals, fronts, effects. Reads no file.

Repeat n has the same seed in every configuration, so two configurations are compared seed by seed.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from statistics import fmean, median, stdev
from typing import Any, TypeVar

from orchestrator.config.constraint import parse
from orchestrator.results.constraints import is_broken
from orchestrator.results.records import SweepResult, TrialResult, TrialStatus
from orchestrator.results.ties import SAME_OBJECTIVE, as_good_as

Key = TypeVar("Key", bound=Hashable)
Costs = tuple[float, ...]
"""What a configuration takes of each thing that counts: lower is better."""
LOSSES = frozenset({"eval_loss", "loss"})
"""Means over the tokens of rows that were cut to `sequence_length`: of another length they are of other tokens."""

CONFIDENCE = 0.95
POWER = 0.8
MAX_REPEATS = 1000
SCATTER = 10.0
# Without a completed trial these may be looked at; the other ends say that their configuration does not work.
PROVISIONAL = frozenset({TrialStatus.RUNNING, TrialStatus.STOPPED, TrialStatus.PREEMPTED, TrialStatus.CANCELLED})
BROKEN = frozenset({TrialStatus.DIVERGED, TrialStatus.OUT_OF_MEMORY})


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its 95 % interval."""

    mean: float
    half_width: float | None
    """None where one value alone cannot tell its noise."""
    count: int


@dataclass(frozen=True, slots=True)
class ConfigurationSummary:
    """All repeats of one configuration."""

    configuration_id: str
    label: str
    settings: tuple[tuple[str, Any], ...]
    """The searched ones."""
    micro_batch_sizes: tuple[int, ...]
    """Of the trials that count; several where a repeat ran out of memory and went on with half. None is known of a
    trial that was not planned."""
    trial_ids: tuple[str, ...]
    best_trial_id: str | None
    """The completed repeat with the best objective; of those that may be looked at where none has completed."""
    counts: Mapping[TrialStatus, int]
    objective_by_repeat: Mapping[int, float]
    """Completed repeats only."""
    objective: Estimate | None
    """Over the completed repeats."""
    provisional_objective: float | None
    """The best of the repeats that ran without completing."""
    predicted_memory_bytes: int | None
    peak_memory_bytes: int | None
    """The largest of the repeats: what must fit."""
    step_time_s: float | None
    tokens_per_s: float | None
    breaks: tuple[str, ...]
    """The constraints that a completed repeat breaks, or any one before one has; what was not measured breaks none."""

    @property
    def is_broken(self) -> bool:
        """Whether a repeat diverged or ran out of memory: the configuration cannot be relied on."""
        return any(self.counts.get(status) for status in BROKEN)


@dataclass(frozen=True, slots=True)
class Noise:
    """What is left of the objective's spread once configuration and seed are taken out."""

    sd: float
    degrees_of_freedom: int

    def half_width(self, configurations: int, seeds: int) -> float:
        """Of a difference over so many shared seeds, such that all between so many configurations hold at once."""
        return difference_quantile(configurations, self.degrees_of_freedom) * self.sd * math.sqrt(2 / seeds)


def label(trial: TrialResult, searched: Sequence[str]) -> str:
    """`rank=8 precision=nf4`: the searched settings alone, and where it began in the middle of another trial."""
    parts = [f"{name}={spell(getattr(trial.config, name))}" for name in searched]
    parts += [f"from step {trial.started_from.step}"] if trial.started_from else []
    return " ".join(parts) or "the only configuration"


def spell(value: Any) -> str:
    """A setting's value as a person writes it."""
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return "+".join(str(part) for part in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def objective_of(sweep: SweepResult, trial: TrialResult) -> float | None:
    """The objective of the trial; None where it has none, or one that is no number."""
    return trial.measured(sweep.objective_metric)


def sign_of(sweep: SweepResult) -> int:
    """Times this, a lower objective is a better one."""
    return 1 if sweep.objective_mode == "min" else -1


def _best(sweep: SweepResult, trials: Iterable[TrialResult]) -> TrialResult | None:
    """Of those that differ by less than SAME_OBJECTIVE the one with the least memory."""
    known = [(sign_of(sweep) * value, trial) for trial in trials if (value := objective_of(sweep, trial)) is not None]
    if not known:
        return None
    least = min(value for value, _ in known)
    level = [trial for value, trial in known if value <= as_good_as(least)]
    return min(level, key=lambda trial: (_memory(trial), trial.trial_id))


def best_so_far(sweep: SweepResult, trials: Iterable[TrialResult]) -> TrialResult | None:
    """Of the trials that went well until now and keep the constraints, whether they have ended or not."""
    constraints, sign = [parse(text) for text in sweep.constraints], sign_of(sweep)
    ranked = [
        (sign * value, trial)
        for trial in trials
        if trial.status in PROVISIONAL | {TrialStatus.COMPLETED}
        and (value := objective_of(sweep, trial)) is not None
        and not any(is_broken(constraint, [trial]) for constraint in constraints)
    ]
    return min(ranked, key=lambda entry: entry[0])[1] if ranked else None


def _memory(trial: TrialResult) -> float:
    measured = trial.peak_memory.measured_bytes if trial.peak_memory else None
    return math.inf if measured is None else measured


def summaries(sweep: SweepResult) -> tuple[ConfigurationSummary, ...]:
    """Every configuration, the best objective first (by its levelled mean), those without one last."""
    groups: dict[str, list[TrialResult]] = defaultdict(list)
    for trial in sweep.trials:
        groups[trial.configuration_id].append(trial)
    found = [_summary(sweep, trials) for trials in groups.values()]
    levelled = levelled_means({s.configuration_id: s.objective_by_repeat for s in found if s.objective})
    return tuple(sorted(found, key=lambda summary: _place(summary, levelled, sign_of(sweep))))


def _place(summary: ConfigurationSummary, levelled: Mapping[str, float], sign: int) -> tuple[int, float]:
    if summary.configuration_id in levelled:
        return 0, sign * levelled[summary.configuration_id]
    return (1, sign * summary.provisional_objective) if summary.provisional_objective is not None else (2, 0.0)


def _summary(sweep: SweepResult, trials: Sequence[TrialResult]) -> ConfigurationSummary:
    completed = [trial for trial in trials if trial.status is TrialStatus.COMPLETED]
    open_ = [trial for trial in trials if trial.status in PROVISIONAL]
    values = {trial.repeat: objective_of(sweep, trial) for trial in completed}
    known = {repeat: value for repeat, value in values.items() if value is not None}
    best = _best(sweep, completed) or _best(sweep, open_)
    provisional = _best(sweep, open_)
    measured = completed or list(trials)
    memories = [trial.peak_memory for trial in measured if trial.peak_memory]
    return ConfigurationSummary(
        configuration_id=trials[0].configuration_id,
        label=label(trials[0], sweep.searched),
        settings=tuple((name, getattr(trials[0].config, name)) for name in sweep.searched),
        micro_batch_sizes=micro_batch_sizes(measured),
        trial_ids=tuple(trial.trial_id for trial in trials),
        best_trial_id=best.trial_id if best else None,
        counts=dict(Counter(trial.status for trial in trials)),
        objective_by_repeat=known,
        objective=estimate(list(known.values())) if known else None,
        provisional_objective=objective_of(sweep, provisional) if provisional else None,
        predicted_memory_bytes=max((m.predicted_bytes for m in memories if m.predicted_bytes), default=None),
        peak_memory_bytes=max((m.measured_bytes for m in memories if m.measured_bytes), default=None),
        step_time_s=_mean(trial.step_time_s for trial in measured),
        tokens_per_s=_mean(trial.tokens_per_s for trial in measured),
        breaks=broken_by(sweep, completed or trials),
    )


def broken_by(sweep: SweepResult, repeats: Sequence[TrialResult]) -> tuple[str, ...]:
    """The constraints that one of the repeats breaks."""
    return tuple(text for text in sweep.constraints if is_broken(parse(text), repeats))


def micro_batch_sizes(trials: Iterable[TrialResult]) -> tuple[int, ...]:
    """Those that trials ran with, or would have; `auto` is none yet."""
    sizes = {trial.config.micro_batch_size for trial in trials}
    return tuple(sorted(size for size in sizes if size != "auto"))


def differing_micro_batches(sweep: SweepResult, trials: Iterable[TrialResult]) -> tuple[int, ...]:
    """Where nobody searched them and they differ all the same, since each was chosen to fit."""
    sizes = micro_batch_sizes(trials)
    return sizes if len(sizes) > 1 and "micro_batch_size" not in sweep.searched else ()


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return fmean(known) if known else None


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and Student's t-interval."""
    if len(values) < 2:
        return Estimate(fmean(values), None, len(values))
    half_width = t_quantile(1, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return Estimate(fmean(values), half_width, len(values))


@lru_cache(maxsize=4096)
def t_quantile(comparisons: int, degrees_of_freedom: int) -> float:
    """Two-sided 95 % quantile of Student's t for so many intervals that shall all hold together (Bonferroni)."""
    from scipy import stats

    return float(stats.t.ppf(1 - (1 - CONFIDENCE) / (2 * comparisons), degrees_of_freedom))


@lru_cache(maxsize=4096)
def difference_quantile(configurations: int, degrees_of_freedom: int) -> float:
    """95 % quantile of the largest difference between any of so many equal means, by the error of one difference.

    Who is the best is read off the same data, so that its differences are the largest of all pairs', not of those with
    one that was chosen before. Source: Tukey's studentised range, Montgomery, Design and Analysis of Experiments,
    section 3.5.7; of two means Student's t.
    """
    if configurations < 3:
        return t_quantile(1, degrees_of_freedom)
    from scipy import stats

    return float(stats.studentized_range.ppf(CONFIDENCE, configurations, degrees_of_freedom)) / math.sqrt(2)


def noise_of(values: Mapping[str, Mapping[int, float]]) -> Noise | None:
    """Spread of objective = configuration + seed + noise, pooled; `values` are configuration → repeat → value.

    Pooled, three repeats of six configurations give 10 degrees of freedom where a single pair has 2; with two
    configurations it is the paired t-test. Source: randomised complete blocks, Montgomery, Design and Analysis of
    Experiments, section 4.1; least squares where blocks are incomplete. None without a repeat to learn it from.
    """
    # A configuration with a single run is fitted exactly and would say nothing.
    repeated = {identity: by_repeat for identity, by_repeat in values.items() if len(by_repeat) > 1}
    if not repeated:
        return None
    _, squares, degrees_of_freedom = _fit(repeated)
    return Noise(math.sqrt(squares / degrees_of_freedom), degrees_of_freedom) if degrees_of_freedom > 0 else None


def levelled_means(values: Mapping[str, Mapping[int, float]]) -> dict[str, float]:
    """Each configuration's mean as if it had run every seed: one that only ran a lucky seed has no advantage."""
    if len({frozenset(by_repeat) for by_repeat in values.values()}) < 2:
        return {identity: fmean(by_repeat.values()) for identity, by_repeat in values.items()}
    return _fit(values)[0]


def _fit(values: Mapping[str, Mapping[int, float]]) -> tuple[dict[str, float], float, int]:
    """Least squares of configuration + seed: levelled means, sum of squared residuals, degrees of freedom."""
    import numpy as np

    repeats = sorted({repeat for by_repeat in values.values() for repeat in by_repeat})
    cells = [(i, repeats.index(r), v) for i, by_repeat in enumerate(values.values()) for r, v in by_repeat.items()]
    places = np.array([i for i, _, _ in cells])
    seeds = np.zeros((len(cells), len(repeats)))
    seeds[np.arange(len(cells)), [j for _, j, _ in cells]] = 1
    observed = np.array([value for _, _, value in cells])
    middle = observed.mean()
    counts = np.bincount(places)

    def own_means(column: Any) -> Any:
        return np.bincount(places, column) / counts

    # Each configuration's own mean is taken out first (Frisch and Waugh 1933), which leaves a column a seed to fit.
    of_seeds = np.apply_along_axis(own_means, 0, seeds)
    own = own_means(observed - middle)
    residual, columns = observed - middle - own[places], seeds - of_seeds[places]
    fitted, _, rank, _ = np.linalg.lstsq(columns, residual, rcond=None)
    squares = float(((residual - columns @ fitted) ** 2).sum())
    means = middle + own - of_seeds @ fitted + fitted.mean()
    return dict(zip(values, means.tolist(), strict=True)), squares, len(cells) - len(values) - int(rank)


def scattered(values: Mapping[str, Mapping[int, float]]) -> frozenset[str]:
    """Configurations whose repeats scatter ten times as far as is usual in the sweep, or further.

    One that is about to diverge would otherwise blow up the pooled noise, and everything would be within it. The limit
    is also past the F-test's at 1 in 1,000, so that chance alone leaves no configuration out.
    """
    repeated = {identity: by_repeat for identity, by_repeat in values.items() if len(by_repeat) > 1}
    if len(repeated) < 3:
        return frozenset()
    centred = {i: {r: v - fmean(by.values()) for r, v in by.items()} for i, by in repeated.items()}
    # The median over configurations, so that one of them cannot pass its own noise on as the seed's shift.
    repeats = {repeat for by_repeat in centred.values() for repeat in by_repeat}
    shifts = {r: median(by_repeat[r] for by_repeat in centred.values() if r in by_repeat) for r in repeats}
    degrees = {identity: len(by_repeat) - 1 for identity, by_repeat in centred.items()}
    spreads = {
        identity: sum((value - shifts[repeat]) ** 2 for repeat, value in by_repeat.items()) / degrees[identity]
        for identity, by_repeat in centred.items()
    }
    usual, all_degrees = median(spreads.values()), sum(degrees.values())
    limits = {i: max(SCATTER**2, _f_quantile(own, all_degrees - own)) for i, own in degrees.items()}
    return frozenset(identity for identity, spread in spreads.items() if spread > limits[identity] * usual > 0)


def competing(
    found: Sequence[ConfigurationSummary],
) -> tuple[list[ConfigurationSummary], frozenset[str]]:
    """Those that the answer is chosen of, and the ids of those left out for the scatter of their repeats."""
    kept = [summary for summary in found if summary.objective and not summary.breaks]
    whole = [summary for summary in kept if not summary.is_broken] or kept
    wild = scattered({summary.configuration_id: summary.objective_by_repeat for summary in whole})
    return [summary for summary in whole if summary.configuration_id not in wild], wild


@lru_cache(maxsize=4096)
def _f_quantile(numerator: int, denominator: int) -> float:
    from scipy import stats

    return float(stats.f.ppf(0.999, numerator, denominator))


def paired_difference(
    one: Mapping[int, float], other: Mapping[int, float], noise: Noise, configurations: int
) -> Estimate | None:
    """`one` minus `other` over the seeds they share; all such between so many configurations hold at once."""
    shared = sorted(set(one) & set(other))
    if not shared:
        return None
    half_width = noise.half_width(configurations, len(shared))
    return Estimate(fmean(one[repeat] - other[repeat] for repeat in shared), half_width, len(shared))


def repeats_to_tell(difference: float, noise: Noise, configurations: int) -> int | None:
    """Repeats that tell a true `difference` between two of so many configurations from the noise, 4 times in 5.

    Power of the two-sided t-test by the noncentral t distribution (as statsmodels' TTestPower); None past 1,000. Over
    all pairs by Bonferroni, whose quantile is that of Tukey's range or a little above, and takes no tenth of a second.
    """
    from scipy import stats

    pairs = math.comb(configurations, 2)

    def power(repeats: int) -> float:
        degrees = (configurations - 1) * (repeats - 1)
        shift = abs(difference) / (noise.sd * math.sqrt(2 / repeats))
        return float(stats.nct.sf(t_quantile(pairs, degrees), degrees, shift))

    if noise.sd == 0:
        return 2
    if not difference or power(MAX_REPEATS) < POWER:
        return None
    low, high = 1, MAX_REPEATS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle) >= POWER else (middle, high)
    return high


def are_the_same(values: Sequence[float]) -> bool:
    """Whether objectives differ in the last bits alone, so that a picture of them would show nothing but that."""
    return max(values) - min(values) <= SAME_OBJECTIVE * max(map(abs, values))


def pareto_front(found: Sequence[ConfigurationSummary], sign: int) -> tuple[str, ...]:
    """Configurations that no other one beats or equals in objective, peak memory and tokens a second at once.

    An objective that differs from the best one in the last bits alone is as good.
    """
    best = min((sign * summary.objective.mean for summary in found if summary.objective), default=0.0)
    costs = {}
    for summary in found:
        if summary.objective:
            memory = summary.peak_memory_bytes if summary.peak_memory_bytes is not None else math.inf
            objective = sign * summary.objective.mean
            objective = best if objective <= as_good_as(best) else objective
            costs[summary.configuration_id] = (objective, memory, -(summary.tokens_per_s or 0.0))
    return front(costs)


def front(costs: Mapping[Key, Costs]) -> tuple[Key, ...]:
    """Those that no other beats or equals in all costs, by the first of them; of equal ones the first."""
    kept, least = list[Key](), list[Costs]()
    # In this order whatever beats a configuration comes before it: by the first cost, and so only the others are
    # compared, with those of the front that none of them beats. Of two costs, that is the last one.
    for identity, cost in sorted(costs.items(), key=lambda entry: entry[1]):
        others = cost[1:]
        if not any(_is_beaten(others, by) for by in least):
            kept.append(identity)
            least = [one for one in least if not _is_beaten(one, others)] + [others]
    return tuple(kept)


def _is_beaten(cost: Costs, by: Costs) -> bool:
    """Or equalled."""
    return all(b <= a for a, b in zip(cost, by, strict=True))
