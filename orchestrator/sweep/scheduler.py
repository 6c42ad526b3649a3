"""Ray Tune's scheduler out of the sweep file's `scheduler:`: our rules hear every evaluation, it does as they say."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from orchestrator.config.sweep_config import GraceUnit, SweepConfig
from orchestrator.config.trial_config import TrialConfig
from orchestrator.results.folders import SweepFolder
from orchestrator.results.records import MetricPoint, TrialResult, TrialStatus
from orchestrator.search.extrapolation import Extrapolation
from orchestrator.search.observation import Goal
from orchestrator.search.stopping import Halving, Heard, Hyperband, Median, Recalled, StopRule, Together, replay

STOPPED_BY, NEXT = "stopped by ", "; "
A_STOP = re.compile(r"(?:^|; )stopped by ([^:]*) at step (\d{1,9}): (.*?)(?=; stopped by |\Z)", re.DOTALL)
"""In a record's reasons, as in `stopped by median at step 4: …; stopped by extrapolation at step 4: …`."""


class RuleScheduler(FIFOScheduler):
    """First come, first served, until a rule stops a trial; Tune's own schedulers forget their state on a resume."""

    def __init__(self, sweep: SweepConfig, gpus: float = 0.0) -> None:
        """gpus: what each trial holds, for rules that count money."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._cost_per_s = gpus * (sweep.budget.price_per_gpu_hour or 0.0) / 3600
        self._goal = Goal(sweep.primary.metric, sweep.primary.mode)
        self._rules = tuple(rules_of(sweep))
        self.reasons: dict[str, str] = {}
        """Why each trial was stopped."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """All rules hear every evaluation; one that speaks up stops the trial, unless it is at its end anyway."""
        progress, task = result.get("progress"), trial.config["task"]
        if progress is None or progress.last is None or result.get("done") or not self._judges(progress.last):
            return str(TrialScheduler.CONTINUE)
        point, config = progress.last, task.config
        reason = self._hear(task.trial_id, trial.config["configuration_id"], config, point)
        if reason is None or point.step >= config.max_steps:
            return str(TrialScheduler.CONTINUE)
        self.reasons[task.trial_id] = reason
        return str(TrialScheduler.STOP)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """A good moment to forget those that ended before."""
        forget_ended(tune_controller)

    def hear_again(self, folder: SweepFolder, records: Iterable[TrialResult]) -> None:
        """Rebuild the rules' state out of the curves and reasons that earlier runs have left."""
        past = [(record, stops_of(record)) for record in records]
        curves = [(record, stops, self._heard_before(folder, record, stops)) for record, stops in past]
        for name, rule, unit in self._rules:
            replay(
                rule,
                (
                    Recalled(
                        point.time_ms,
                        self._heard(record.trial_id, record.configuration_id, record.config, point, unit),
                        is_answered=point.step <= record.steps,
                        said=stops[name][1] if name in stops and stops[name][0] == point.step else None,
                    )
                    for record, stops, points in curves
                    for point in points
                ),
            )

    def _heard_before(
        self, folder: SweepFolder, record: TrialResult, stops: Mapping[str, tuple[int, str]]
    ) -> list[MetricPoint]:
        """The evaluations that rules heard of: a trial that they stop trains on until it is told so."""
        last = min((step for step, _ in stops.values()), default=math.inf)
        points = folder.trial(record.trial_id).read_metrics()
        return [point for point in points if point.step <= last and self._judges(point)]

    def _judges(self, point: MetricPoint) -> bool:
        """Whether rules hear of it: an evaluation, and its objective is known.

        A speed is not before the warm-up's end, and a gradient that overflowed has no norm.
        """
        return point.eval_loss is not None and getattr(point, self._goal.metric) is not None

    def _hear(self, trial_id: str, configuration_id: str, config: TrialConfig, point: MetricPoint) -> str | None:
        found = []
        for name, rule, unit in self._rules:
            reason = rule.hear(self._heard(trial_id, configuration_id, config, point, unit))
            if reason:
                found.append(f"{STOPPED_BY}{name} at step {point.step}: {reason}")
        return NEXT.join(found) or None

    def _heard(
        self, trial_id: str, configuration_id: str, config: TrialConfig, point: MetricPoint, unit: GraceUnit
    ) -> Heard:
        """An evaluation as a rule takes it."""
        counted: dict[GraceUnit, float] = {
            "steps": point.step,
            "tokens": point.tokens,
            "seconds": point.seconds,
            "cost": point.seconds * self._cost_per_s,
        }
        at = float(counted[unit])
        # The last step's tokens, seconds or money are not known before: at the pace so far. At the end itself they are
        # exact, which a product that is divided again is not.
        end = at if point.step >= config.max_steps else at * config.max_steps / point.step
        return Heard(trial_id, configuration_id, at, self._goal.of(point), end)


def forget_ended(tune_controller: Any) -> None:
    """Take from Tune the trials that have ended and left their slot: nobody asks it for them, our records tell all.

    It would keep each with its settings, and look through all of them in every round of its loop (ray 2.60.0,
    tune_controller.py), for as long as the sweep lasts.
    """
    trials: list[Any] = tune_controller.get_trials()
    ended = {trial for trial in trials if trial.is_finished() and trial not in tune_controller._trial_to_actor}
    trials[:] = [trial for trial in trials if trial not in ended]
    for kept in (tune_controller._stopped_trials, tune_controller._failed_trials, tune_controller._trials_to_cache):
        kept -= ended


def stops_of(record: TrialResult) -> dict[str, tuple[int, str]]:
    """By the name of each rule that stopped the trial: the step, and why."""
    reason = record.reason if record.status is TrialStatus.STOPPED else None
    return {name: (int(step), why) for name, step, why in A_STOP.findall(reason or "")}


def rules_of(sweep: SweepConfig) -> Iterator[tuple[str, StopRule, GraceUnit]]:
    """The rules that the sweep file names, each with its name and what it counts."""
    found = sweep.scheduler
    if found.asha:
        grace, unit = found.asha.grace
        yield f"asha ({grace:g} {unit} of grace)", Halving(grace, found.asha.reduction_factor, unit), unit
    if found.hyperband:
        grace, unit = found.hyperband.grace
        rule = Hyperband(grace, found.hyperband.reduction_factor, found.hyperband.brackets, unit)
        yield f"hyperband ({grace:g} {unit} of grace)", rule, unit
    if found.median:
        grace, unit = found.median.grace
        yield f"median ({grace:g} {unit} of grace)", Together(Median(grace, found.median.min_trials, unit)), unit
    if found.extrapolation:
        grace, unit = found.extrapolation.grace
        yield "extrapolation", Together(Extrapolation(grace, found.extrapolation.min_chance, unit)), unit
