"""Several sweeps side by side: what each answers, what may be compared, and what they have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.config.trial_config import TrialConfig
from orchestrator.errors import InputError
from orchestrator.reporting import quantities
from orchestrator.reporting.findings import Report
from orchestrator.reporting.statistics import LOSSES, ConfigurationSummary, Estimate, estimate, label, sign_of, spell
from orchestrator.results.records import TrialStatus

QUESTION = frozenset({"model", "objective", "data"})
"""Sweeps that differ in one of these have no two objectives that measure the same."""


@dataclass(frozen=True, slots=True)
class ComparedSweep:
    """One of the sweeps, under a name that no other one has."""

    name: str
    report: Report

    @property
    def recommended(self) -> ConfigurationSummary | None:
        """What it recommends, or shows where it is too early for that."""
        chosen = self.report.recommendation.configuration_id
        return next((s for s in self.report.summaries if s.configuration_id == chosen), None)

    @property
    def chosen_label(self) -> str | None:
        """`rank=8`; `rank=8 (completed so far)` where that is all that can be said of it."""
        answer = self.report.recommendation
        return answer.label if answer.is_recommended or not answer.label else f"{answer.label} ({answer.called})"

    @property
    def completed(self) -> int:
        """How many of its trials completed."""
        return self.report.counts.get(TrialStatus.COMPLETED, 0)


@dataclass(frozen=True, slots=True)
class SharedConfiguration:
    """A configuration that several sweeps ran, every setting alike."""

    label: str
    """By what was searched in any of the sweeps."""
    by_sweep: Mapping[str, ConfigurationSummary]
    differences: Mapping[str, Estimate]
    """Of the objective to the first sweep that ran it, over the seeds that both ran."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What the renderings say."""

    sweeps: tuple[ComparedSweep, ...]
    answer: str
    differing: tuple[str, ...]
    """What the sweeps do not have in common besides the settings that all of them searched."""
    is_comparable: bool
    """Whether their objectives measure the same: one model, one set of data, one metric; of a loss also one
    `sequence_length` of what they recommend."""
    shared: tuple[SharedConfiguration, ...]

    @property
    def besides(self) -> tuple[str, ...]:
        """In what they differ, but for what the answer says already."""
        return tuple(words for words in self.differing if words not in self.answer)


def compare(reports: Sequence[Report]) -> Comparison:
    """Put sweeps side by side, in the order given.

    Raises:
        InputError: one of them is named twice.
    """
    if len({report.folder.resolve() for report in reports}) < len(reports):
        raise InputError("report compares sweeps, and a folder was named twice: name each once")
    # A sweep may have the name of another's folder, which stands for one whose name is taken.
    taken = Counter(name for report in reports for name in {report.sweep.name, str(report.folder)})
    sweeps = tuple(ComparedSweep(r.sweep.name if taken[r.sweep.name] == 1 else str(r.folder), r) for r in reports)
    told = _differing(sweeps)
    is_loss = sweeps[0].report.sweep.objective_metric in LOSSES
    apart = [words for name, words in told.items() if name in QUESTION or (is_loss and name == "sequence_length")]
    answer = f"Their objectives cannot be compared: {apart[0]}." if apart else _answer(sweeps)
    # What several ran has one length.
    shared = () if told.keys() & QUESTION else _shared(sweeps)
    return Comparison(sweeps, answer, tuple(told.values()), not apart, shared)


def _differing(sweeps: Sequence[ComparedSweep]) -> dict[str, str]:
    """In what they differ, in words; what decides whether objectives are comparable stands first."""
    found = {s.name: s.report.sweep for s in sweeps}
    trials = {name: sweep.trials for name, sweep in found.items()}
    facts: dict[str, dict[str, str]] = {
        "model": {name: sweep.model for name, sweep in found.items()},
        "objective": {name: f"{sweep.objective_mode} {sweep.objective_metric}" for name, sweep in found.items()},
        "data": {name: (sweep.data_hash or "unknown")[:12] for name, sweep in found.items()},
        **_settings(sweeps),
        "devices": {n: ", ".join(sorted({d for t in own for d in t.devices})) or "none" for n, own in trials.items()},
        "commit of the repository they were run in": {
            n: ", ".join(sorted({t.git.commit[:12] for t in own if t.git})) or "unknown" for n, own in trials.items()
        },
    }
    return {
        fact: f"they differ in {fact} ({'; '.join(f'{name}: {value}' for name, value in values.items())})"
        for fact, values in facts.items()
        if len(set(values.values())) > 1
    }


def _settings(sweeps: Sequence[ComparedSweep]) -> dict[str, dict[str, str]]:
    """Of each setting what the sweeps recommend, but of those that all of them searched, which their labels name."""
    searched = set.intersection(*(set(s.report.sweep.searched) for s in sweeps))
    # Repeats are paired by their seed. A length is told wherever it differs: losses hang on it.
    names = [n for n in TrialConfig.model_fields if n not in searched - {"sequence_length"} and n != "seed"]
    configs = {s.name: trial.config for s in sweeps if (trial := s.report.recommended)}
    return {n: {name: spell(getattr(config, n)) for name, config in configs.items()} for n in names}


def _answer(sweeps: Sequence[ComparedSweep]) -> str:
    sign, metric = sign_of(sweeps[0].report.sweep), sweeps[0].report.sweep.objective_metric
    answered = [sweep for sweep in sweeps if sweep.report.recommendation.is_recommended]
    known = [(sign * s.objective.mean, sweep, s) for sweep in answered if (s := sweep.recommended) and s.objective]
    if not known:
        return "None of them has an answer yet."
    (_, best, chosen), *others = sorted(known, key=lambda entry: entry[0])
    words = f"{best.name} recommends the configuration with the best {metric}: {chosen.label} ({_value(chosen)})"
    if not others:
        return f"{words}; no other sweep has an answer yet."
    _, other, next_best = others[0]
    apart = _paired(_by_seed(other, next_best), _by_seed(best, chosen))
    told = f"{words}; {other.name}'s {next_best.label} comes to {_value(next_best)}"
    if apart is None or apart.half_width is None:
        return f"{told}, and without two seeds in common the difference may be chance."
    if max(abs(apart.mean), apart.half_width) < quantities.NOTHING:
        return f"{told}, the same."
    behind = quantities.plus_minus(sign * apart.mean, apart.half_width)
    if sign * apart.mean <= apart.half_width:
        return f"{told}, within the noise of it ({behind})."
    return f"{told}, worse by {behind}."


def _value(summary: ConfigurationSummary) -> str:
    assert summary.objective
    return quantities.plus_minus(summary.objective.mean, summary.objective.half_width)


def _by_seed(sweep: ComparedSweep, summary: ConfigurationSummary) -> dict[int, float]:
    seeds = {t.repeat: t.seed for t in sweep.report.sweep.trials if t.configuration_id == summary.configuration_id}
    return {seeds[repeat]: value for repeat, value in summary.objective_by_repeat.items()}


def _paired(one: Mapping[int, float], other: Mapping[int, float]) -> Estimate | None:
    """`one` minus `other`, over the seeds that both ran."""
    both = sorted(one.keys() & other.keys())
    return estimate([one[seed] - other[seed] for seed in both]) if both else None


def _shared(sweeps: Sequence[ComparedSweep]) -> tuple[SharedConfiguration, ...]:
    searched = tuple(dict.fromkeys(name for sweep in sweeps for name in sweep.report.sweep.searched))
    labels = {t.configuration_id: label(t, searched) for sweep in sweeps for t in sweep.report.sweep.trials}
    ran: dict[str, list[tuple[ComparedSweep, ConfigurationSummary]]] = {}
    for sweep in sweeps:
        for summary in sweep.report.summaries:
            if summary.step_time_s is not None or summary.objective:
                ran.setdefault(summary.configuration_id, []).append((sweep, summary))
    return tuple(_compared(labels[identity], found) for identity, found in ran.items() if len(found) > 1)


def _compared(label: str, found: Sequence[tuple[ComparedSweep, ConfigurationSummary]]) -> SharedConfiguration:
    first, *others = [(sweep.name, _by_seed(sweep, summary)) for sweep, summary in found]
    differences = {name: apart for name, values in others if (apart := _paired(values, first[1]))}
    return SharedConfiguration(label, {sweep.name: summary for sweep, summary in found}, differences)
