"""Everything that a report says, read from a sweep's folder: the renderings only lay it out."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from orchestrator.config.trial_config import TrialConfig
from orchestrator.reporting import quantities
from orchestrator.reporting.curves import Curve, Plateau, plateaus
from orchestrator.reporting.effects import Effect, main_effects
from orchestrator.reporting.recommendation import Recommendation, recommend
from orchestrator.reporting.statistics import (
    ConfigurationSummary,
    Times,
    label,
    pareto_front,
    sign_of,
    summaries,
    times_of,
)
from orchestrator.results.provenance import without_secret
from orchestrator.results.records import SweepResult, TrialResult, TrialStatus
from orchestrator.results.storage import DamagedRecord, SweepFolder, read_record, read_sweep

"""A report is shared: `https://user:password@host` in a sweep file must not be."""


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that the renderings say."""

    folder: Path
    sweep: SweepResult
    sweep_file: str | None
    damaged: tuple[DamagedRecord, ...]
    summaries: tuple[ConfigurationSummary, ...]
    recommendation: Recommendation
    front: frozenset[str]
    effects: tuple[Effect, ...]
    curves: Mapping[str, Curve]
    plateaus: Mapping[str, Plateau]
    times: Times

    @property
    def counts(self) -> dict[TrialStatus, int]:
        """Trials by status, in the order of the statuses, without the empty ones."""
        found = Counter(trial.status for trial in self.sweep.trials)
        return {status: found[status] for status in TrialStatus if found[status]}

    @property
    def recommended(self) -> TrialResult | None:
        """The trial whose configuration and adapter to take."""
        trials = {trial.trial_id: trial for trial in self.sweep.trials}
        return trials.get(self.recommendation.trial_id or "")

    @property
    def adapter(self) -> Path | None:
        """The recommended trial's adapter."""
        trial = self.recommended
        if trial is None or not trial.adapter:
            return None
        return SweepFolder(self.folder).trial(trial.trial_id).root / trial.adapter

    @property
    def state(self) -> str:
        """`ended`, `interrupted`, or `not ended`."""
        if self.sweep.interrupted:
            return "interrupted"
        return "ended" if self.sweep.ended_ms else "not ended"


def build(folder: SweepFolder, now_s: float | None = None) -> Report:
    """Read a sweep, running or ended, and work out what it says.

    Args:
        folder: what `orchestrator run` made.
        now_s: seconds since 1970 that a sweep which has not ended is measured to; the clock's where nothing is said.

    Raises:
        FolderError: the folder holds no sweep.
    """
    sweep, damaged = read_sweep(folder)
    found = summaries(sweep)
    curves = {trial.trial_id: folder.trial(trial.trial_id).read_metrics() for trial in sweep.trials if trial.steps}
    levels = plateaus(sweep, curves)
    return Report(
        folder=folder.root,
        sweep=sweep,
        sweep_file=_sweep_file(folder),
        damaged=damaged,
        summaries=found,
        recommendation=_with_plateau(recommend(sweep), levels),
        front=pareto_front(found, sign_of(sweep)),
        effects=main_effects(sweep),
        curves=curves,
        plateaus=levels,
        times=times_of(sweep, time.time() if now_s is None else now_s),
    )


def _with_plateau(recommendation: Recommendation, levels: Mapping[str, Plateau]) -> Recommendation:
    """The evidence with what the curves add: an answer after too few steps may not hold after more."""
    level = levels.get(recommendation.configuration_id or "")
    if level is None:
        return recommendation
    fall = quantities.plus_minus(level.late_fall.mean, level.late_fall.half_width)
    if level.levelled_off_at_step is not None:
        told = f"Its curve has levelled off: within 0.5 % of its end since step {level.levelled_off_at_step}."
    elif level.late_fall.mean <= 0:
        told = f"Its curve has not settled: eval_loss changed by {fall} upwards in the last quarter of its steps."
    else:
        told = (
            f"Its curve has not levelled off: eval_loss still fell by {fall} in the last quarter of its steps, "
            "so more of them (trial.max_steps) may change the answer."
        )
    return replace(recommendation, evidence=(*recommendation.evidence, told))


def _sweep_file(folder: SweepFolder) -> str | None:
    try:
        return without_secret(read_record(folder.sweep_file).decode())
    except (OSError, UnicodeDecodeError):
        return None


def trial_snippet(report: Report) -> str | None:
    """The recommended configuration as a sweep file's `trial:`: what was searched, and what is no default."""
    import yaml

    trial = report.recommended
    if trial is None:
        return None
    defaults = TrialConfig().model_dump(mode="json")
    config = trial.config.model_dump(mode="json")
    # The default precision depends on the hardware.
    told = {*report.sweep.searched, "precision"}
    wanted = {n: v for n, v in config.items() if n != "seed" and (n in told or v != defaults[n])}
    return yaml.safe_dump({"trial": wanted}, sort_keys=False, allow_unicode=True, width=100)


def behind_text(report: Report, summary: ConfigurationSummary) -> str:
    """`0.004 ± 0.006`: by how much it is worse than the best."""
    for comparison in report.recommendation.comparisons:
        if comparison.configuration_id == summary.configuration_id and comparison.difference:
            return quantities.plus_minus(comparison.difference.mean, comparison.difference.half_width)
    return ""


def objective_text(summary: ConfigurationSummary) -> str:
    """`2.413 ± 0.012`; in brackets where it is not that of a completed trial."""
    if summary.objective:
        return quantities.plus_minus(summary.objective.mean, summary.objective.half_width)
    provisional = summary.provisional_objective
    return f"({quantities.number(provisional)})" if provisional is not None else quantities.UNKNOWN


def reasons(report: Report) -> tuple[tuple[TrialStatus, str, tuple[str, ...]], ...]:
    """Why trials did not complete: status, reason and the labels that share it, in the order of the statuses."""
    groups: dict[tuple[TrialStatus, str], list[str]] = {}
    for trial in report.sweep.trials:
        if trial.reason:
            groups.setdefault((trial.status, without_secret(trial.reason)), []).append(_name(report, trial))
    order = list(TrialStatus)
    ranked = sorted(groups.items(), key=lambda group: order.index(group[0][0]))
    return tuple((status, reason, tuple(dict.fromkeys(names))) for (status, reason), names in ranked)


def _name(report: Report, trial: TrialResult) -> str:
    return label(trial, report.sweep.searched) if report.sweep.searched else trial.trial_id
