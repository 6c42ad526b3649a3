"""Everything that a report says, read from a sweep's folder: the renderings only lay it out."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError

from orchestrator.config.sweep_config import COSTS, BudgetConfig
from orchestrator.config.trial_config import TrialConfig
from orchestrator.errors import StorageError, counted
from orchestrator.planning.pace import to_come
from orchestrator.planning.plan import SweepPlan
from orchestrator.reporting import quantities
from orchestrator.reporting.curves import Curve, Plateau, evaluations, plateaus
from orchestrator.reporting.effects import Effect, Levelling, main_effects
from orchestrator.reporting.importance import importances
from orchestrator.reporting.lineage import lineage_words
from orchestrator.reporting.objectives import ParetoFront, front_of
from orchestrator.reporting.recommendation import Recommendation, recommend
from orchestrator.reporting.statistics import ConfigurationSummary, competing, label, summaries
from orchestrator.reporting.times import Outlay, Times, against_plan, times_of
from orchestrator.reporting.trades import trades
from orchestrator.results.files import read_record, why_unread
from orchestrator.results.folders import SweepFolder
from orchestrator.results.records import SweepResult, TrialResult, TrialStatus
from orchestrator.results.secrets import without_secret
from orchestrator.results.storage import DamagedRecord, is_at_work, read_sweep


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that the renderings say."""

    folder: Path
    sweep: SweepResult
    sweep_file: str | None
    sweep_file_at: str
    """Its path from anywhere, or its address in an object store."""
    plan: SweepPlan | None
    """None where there is no plan.json that can be read."""
    damaged: tuple[DamagedRecord, ...]
    summaries: tuple[ConfigurationSummary, ...]
    recommendation: Recommendation
    front: ParetoFront
    effects: tuple[Effect, ...]
    importances: Mapping[str, float]
    curves: Mapping[str, Curve]
    """Of each trial the evaluations: all steps of thousands of trials would take the driver's memory."""
    plateaus: Mapping[str, Plateau]
    times: Times
    outlays: tuple[Outlay, ...]
    """Against the plan; empty without one."""

    @property
    def counts(self) -> dict[TrialStatus, int]:
        """Trials by status, in the order of the statuses, without the empty ones."""
        found = Counter(trial.status for trial in self.sweep.trials)
        return {status: found[status] for status in TrialStatus if found[status]}

    @property
    def trials_told(self) -> str:
        """`5 trials of up to 14`."""
        return trials_told(self.sweep, self.plan.launches if self.plan else None)

    @property
    def recommended(self) -> TrialResult | None:
        """The trial whose configuration and adapter to take."""
        trials = {trial.trial_id: trial for trial in self.sweep.trials}
        return trials.get(self.recommendation.trial_id or "")

    @property
    def adapter(self) -> Path | None:
        """The recommended trial's adapter, as it is found from anywhere: a page does not know where it is read."""
        trial = self.recommended
        if trial is None or not trial.adapter:
            return None
        return SweepFolder(self.folder.absolute()).trial(trial.trial_id).root / trial.adapter

    @property
    def state(self) -> str:
        """`ended`, `interrupted`, `out of budget`, or `not ended`."""
        if self.sweep.interrupted:
            return "interrupted"
        if self.sweep.cut_short:
            return "out of budget"
        return "ended" if self.sweep.ended_ms else "not ended"


def build(folder: SweepFolder, now_s: float | None = None) -> Report:
    """Read a sweep, running or ended, and work out what it says.

    Args:
        folder: what `orchestrator run` made.
        now_s: seconds since 1970 that a sweep at work is measured to; the clock's where nothing is said.

    Raises:
        FolderError: the folder holds no sweep.
    """
    sweep, damaged = read_sweep(folder)
    plan, unread = _plan(folder)
    sweep_file = sweep_file_of(folder)
    found = summaries(sweep)
    curves = {t.trial_id: evaluations(folder.trial(t.trial_id).read_metrics()) for t in sweep.trials if t.steps}
    levels = plateaus(sweep, curves)
    effects = main_effects(sweep)
    now_s = time.time() if now_s is None else now_s
    times = times_of(sweep, now_s if sweep.ended_ms is None and _may_be_at_work(folder) else None)
    return Report(
        folder=folder.root,
        sweep=sweep,
        sweep_file=sweep_file,
        sweep_file_at=folder.location(folder.sweep_file) if folder.remote else str(folder.sweep_file.absolute()),
        plan=plan,
        damaged=damaged + unread,
        summaries=found,
        recommendation=_with_lineage(sweep, _with_settings(sweep, recommend(sweep), curves, levels, effects)),
        front=front_of(sweep, competing(found)[0]),
        effects=effects,
        importances=importances(sweep),
        curves=curves,
        plateaus=levels,
        times=times,
        outlays=against_plan(sweep, plan, times, budget_in(sweep_file).price_per_gpu_hour) if plan else (),
    )


def _may_be_at_work(folder: SweepFolder) -> bool:
    try:
        return is_at_work(folder)
    except StorageError:
        # The store tells nobody who may only read.
        return True


def _plan(folder: SweepFolder) -> tuple[SweepPlan | None, tuple[DamagedRecord, ...]]:
    try:
        return SweepPlan.model_validate_json(read_record(folder.plan)), ()
    except FileNotFoundError:
        return None, ()
    except (OSError, ValidationError) as error:
        return None, (DamagedRecord(folder.plan, f"{why_unread(error)}; left out"),)


def budget_in(sweep_file: str | None) -> BudgetConfig:
    """That of a sweep file; without limits where it cannot be read."""
    import yaml

    try:
        return BudgetConfig.model_validate(yaml.safe_load(sweep_file or "")["budget"])
    except (yaml.YAMLError, KeyError, TypeError, ValidationError):
        return BudgetConfig()


def _with_settings(
    sweep: SweepResult,
    recommendation: Recommendation,
    curves: Mapping[str, Curve],
    levels: Mapping[str, Plateau],
    effects: Sequence[Effect],
) -> Recommendation:
    """The evidence with what effects and curves add: what settings trade, and whether more of one would still help."""
    told = list(trades(sweep, effects, curves))
    # More of a setting gains no speed, and nobody asks when it stops to.
    if sweep.objective_metric not in COSTS:
        told += [levelling_words(effect.setting, effect.levelling) for effect in effects if effect.levelling]
        if level := levels.get(recommendation.configuration_id or ""):
            told.append(_curve_words(level))
    return replace(recommendation, evidence=(*recommendation.evidence, *told))


def _with_lineage(sweep: SweepResult, recommendation: Recommendation) -> Recommendation:
    trial = next((trial for trial in sweep.trials if trial.trial_id == recommendation.trial_id), None)
    words = lineage_words(sweep, trial)
    return replace(recommendation, evidence=(words, *recommendation.evidence)) if words else recommendation


def levelling_words(setting: str, levelling: Levelling) -> str:
    """`rank levels off at 64: 256 gains 0.0010 ± 0.0040 over 64, all else alike, and 1 % at most.`"""
    mean, half_width = levelling.gain.mean, levelling.gain.half_width
    gains = mean > 0
    words = f"gains {quantities.plus_minus(mean, half_width)} over"
    if mean < -(half_width or 0.0):
        words = f"is worse by {quantities.plus_minus(-mean, half_width)} than"
    compared = f"{levelling.further} {words} {levelling.value}"
    if levelling.state == "levelled_off":
        most = ", and 1 % at most" if gains else ""
        return f"{setting} levels off at {levelling.value}: {compared}, all else alike{most}."
    if levelling.state == "still_gains":
        return f"{setting} has not levelled off: {compared}, all else alike, so that a higher one may gain more."
    return f"Whether {setting} has levelled off cannot be told: {compared}, all else alike."


def _curve_words(level: Plateau) -> str:
    if level.levelled_off_at_step is not None:
        return f"Its curve has levelled off: within 0.5 % of its end since step {level.levelled_off_at_step}."
    fall, between = level.late_fall, f"between step {level.late_step} and {level.last_step}"
    if abs(fall.mean) <= (fall.half_width or 0.0):
        changed = quantities.plus_minus(-fall.mean, fall.half_width)
        return f"Whether its curve has levelled off cannot be told: eval_loss changed by {changed} {between}."
    change = quantities.plus_minus(abs(fall.mean), fall.half_width)
    if fall.mean < 0:
        return f"Its curve has not settled: eval_loss rose by {change} {between}."
    return (
        f"Its curve has not levelled off: eval_loss still fell by {change} {between}, "
        "so more steps (trial.max_steps) may change the answer."
    )


def sweep_file_of(folder: SweepFolder) -> str | None:
    """Its text without secrets; None where it cannot be read."""
    try:
        # A report is shared: `https://user:password@host` in a sweep file must not be.
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


def trials_told(sweep: SweepResult, launches: int | None) -> str:
    """`5 trials of up to 14` where a search that may launch so many has not come to its end."""
    trials = counted(len(sweep.trials), "trial")
    more = 0 if sweep.is_whole else to_come(sweep.trials, launches)
    return f"{trials} of up to {len(sweep.trials) + more}" if more else trials


def behind_text(report: Report, summary: ConfigurationSummary) -> str:
    """`0.004 ± 0.006`: by how much it is worse than the best; of several objectives those on the front are compared."""
    for comparison in report.recommendation.comparisons:
        if comparison.configuration_id == summary.configuration_id and comparison.difference:
            return quantities.plus_minus(comparison.difference.mean, comparison.difference.half_width)
    is_off = report.front.reference is not None and summary.configuration_id not in report.front.configuration_ids
    return "off the front" if is_off and summary.objective and not summary.breaks else ""


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
