"""An adaptive search at work: what it proposes becomes trials, planned as all others are, in the moment it is asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from statistics import fmean

from orchestrator.config.axes import active, axes_of
from orchestrator.config.constraint import Constraint, parse
from orchestrator.config.local_path import local_path
from orchestrator.config.search_space import Settings, configuration_id, descendant, make_trials
from orchestrator.config.sweep_config import SweepConfig
from orchestrator.config.trial_config import TrialConfig
from orchestrator.errors import FolderError
from orchestrator.planning import budget
from orchestrator.planning.planned_trial import PlannedTrial
from orchestrator.results.folders import SweepFolder
from orchestrator.results.records import MetricPoint, StartedFrom, Suggestion, TrialResult, TrialStatus
from orchestrator.results.storage import read_sweep
from orchestrator.search.observation import Goal, Observation, evaluated, observe
from orchestrator.search.payoff import expected_gain
from orchestrator.search.suggest import FIRST, next_settings
from orchestrator.search.warm_start import best_settings, learned
from orchestrator.sweep.lesson import lesson_of
from orchestrator.sweep.preparation import Prepared
from orchestrator.sweep.recorder import Recorder
from orchestrator.sweep.resume import gone_on_with, with_time_spent

NewRecord = Callable[[PlannedTrial, Suggestion | None, StartedFrom | None], TrialResult]


class Suggestions:
    """Proposals one by one, until `budget.trials` of them have been launched or the space holds nothing new."""

    def __init__(self, prepared: Prepared, folder: SweepFolder, recorder: Recorder, new_record: NewRecord) -> None:
        self._prepared, self._sweep = prepared, prepared.sweep
        self._folder, self._recorder, self._new_record = folder, recorder, new_record
        self._ended_curves: dict[str, Sequence[MetricPoint]] = {}
        self._points = to_try_first(self._sweep) or FIRST
        self._of_another_space = frozenset(
            trial_id
            for trial_id, record in recorder.records.items()
            if record.suggestion and as_proposed_now(self._sweep, record) is None
        )
        """Trials that earlier runs proposed, and this one could not."""
        self._lesson = lesson_of(self._sweep, prepared.data_hash, goals(self._sweep), limits(self._sweep))
        self.told_at_start = self._lesson.told
        self.ended_because: str | None = None
        """Where nothing new was left, or another trial not worth it, with what is left of the budget."""

    def more(self) -> Sequence[str]:
        """Propose until a trial may be launched; its repeats' ids, or none at the search's end.

        What the plan refuses is recorded and told to the search, and takes no slot.
        """
        while self._sweep.search.is_adaptive and not is_spent(self._sweep, self._recorder.records.values()):
            records = self._recorder.records.values()
            if why := self._not_worth_it():
                self.ended_because = why
                break
            known = self._known()
            settings = next_settings(
                self._sweep.search.algorithm,
                self._sweep.domains,
                self._sweep.base,
                self._sweep.exclude,
                self._points,
                known,
                self._sweep.search.seed,
                self._lesson.beside(known),
            )
            if settings is None:
                self.ended_because = (
                    "the search ended by itself: its space holds nothing that was not tried in this folder; "
                    f"{self.unused()}"
                )
                break
            suggestion = Suggestion(number=next_number(records), settings=settings)
            made = [self._begun(planned, suggestion) for planned in plan_suggestion(self._prepared, suggestion)]
            for record in made:
                self._recorder.save(record)
            if waiting := [record.trial_id for record in made if record.status is TrialStatus.PENDING]:
                return waiting
        return ()

    def _begun(self, planned: PlannedTrial, suggestion: Suggestion) -> TrialResult:
        """Its record, with what a grid that was cut off in this folder had done of it."""
        new = self._new_record(planned, suggestion, None)
        old = self._recorder.records.get(new.trial_id)
        if old is None:
            return new
        gone_on = with_time_spent(old, gone_on_with(old, new, self._folder.trial(new.trial_id)))
        return gone_on.model_copy(update={"suggestion": suggestion})

    def _not_worth_it(self) -> str | None:
        """What `search.min_gain_per_hour` and `min_gain_per_cost` say; None: go on."""
        sweep, search = self._sweep, self._sweep.search
        ended = [record for record in self._recorder.records.values() if record.timing.total_s and record.suggestion]
        if not (search.min_gain_per_hour or search.min_gain_per_cost) or not ended:
            return None
        known = self._known()
        gain = expected_gain(axes_of(sweep.domains), (*self._lesson.beside(known), *known), search.seed)
        if gain is None:
            return None
        shape, repeats = self._prepared.shape, search.repeats
        hours = repeats * fmean(record.timing.total_s + record.timing.earlier_s for record in ended) / 3600
        gpu_hours = hours * shape.gpus
        spent = (
            ("min_gain_per_hour", search.min_gain_per_hour, hours, "h"),
            ("min_gain_per_cost", search.min_gain_per_cost, budget.cost(sweep.budget, gpu_hours) or 0.0, "of money"),
        )
        for name, least, takes, unit in spent:
            if least and takes and gain / takes < least:
                expected = f"is expected to better {sweep.primary.metric} by {gain:.2%} for {takes:.2g} {unit}"
                asked = f"less than search.{name} ({least:g}) asks for"
                return f"the search ended by itself: another configuration {expected}, {asked}; {self.unused()}"
        return None

    @property
    def is_over(self) -> bool:
        """Whether nothing is to be proposed any more."""
        spent = not self._sweep.search.is_adaptive or is_spent(self._sweep, self._recorder.records.values())
        return spent or self.ended_because is not None

    def unused(self) -> str:
        """What is left of the budget: `not used: 9 of budget.trials 14, 3.2 of budget.gpu_hours 8`."""
        sweep, shape, records = self._sweep, self._prepared.shape, self._recorder.records.values()
        tried = len({record.suggestion.number for record in records if record.suggestion})
        gpu_hours = self._recorder.trial_seconds() * shape.gpus / 3600
        hours = (time.time() - self._recorder.started_at) / 3600
        left = [f"{max(0, (sweep.budget.trials or 0) - tried)} of budget.trials {sweep.budget.trials}"]
        return f"not used: {', '.join([*left, *budget.unspent(sweep.budget, hours, gpu_hours)])}"

    def _known(self) -> tuple[Observation, ...]:
        records, sweep = self._recorder.records.values(), self._sweep
        own = [record for record in records if record.suggestion and record.trial_id not in self._of_another_space]
        # A grid may have run in this folder before. Nobody goes on with what it left open, unless it is proposed here.
        others = [
            record
            for record in records
            if record.status.is_final and (record.suggestion is None or record.trial_id in self._of_another_space)
        ]
        before = learned(others, sweep.domains, sweep.base, goals(sweep), self._curve, limits(sweep))
        return before + observe(own, goals(sweep), self._curve, limits(sweep))

    def _curve(self, trial_id: str) -> Sequence[MetricPoint]:
        """Read once where the trial has ended, and its evaluations kept: a sweep may have thousands of trials with
        thousands of steps, and looks at each proposal.
        """
        if trial_id not in self._ended_curves:
            points = evaluated(self._folder.trial(trial_id).read_metrics())
            if not self._recorder.records[trial_id].status.is_final:
                return points
            self._ended_curves[trial_id] = points
        return self._ended_curves[trial_id]


def to_try_first(sweep: SweepConfig) -> tuple[Settings, ...]:
    """`search.points`, then the best of `search.warm_start`."""
    if sweep.search.warm_start is None:
        return sweep.points
    earlier, _ = read_sweep(SweepFolder(local_path(sweep.search.warm_start)))
    # What another model takes, and comes to, breaks no constraint here.
    bounds = limits(sweep) if earlier.model == sweep.model else {}
    return sweep.points + best_settings(earlier.trials, sweep.domains, sweep.base, goals(sweep)[0], bounds)


def goals(sweep: SweepConfig) -> tuple[Goal, ...]:
    """The objectives as the search takes them."""
    return tuple(Goal(objective.metric, objective.mode) for objective in sweep.training_objectives)


def limits(sweep: SweepConfig) -> dict[str, Constraint]:
    """The constraints as the search takes them."""
    return {text: parse(text) for text in sweep.constraints}


def plan_suggestion(
    prepared: Prepared, suggestion: Suggestion, parent: StartedFrom | None = None, ran: TrialConfig | None = None
) -> list[PlannedTrial]:
    """All repeats of a proposal, planned as those of a grid are.

    parent: what it begins with; `ran` are the settings that that trial ran with.
    """
    config = TrialConfig(**{**prepared.sweep.base, **suggestion.settings})
    if parent and ran and suggestion.member is not None:
        # What fitted its parent fits it too, and the parent's optimizer counts in such micro-batches.
        config = config.model_copy(update={"micro_batch_size": ran.micro_batch_size})
        return [prepared.plan_trial(descendant(config, parent.trial_id, suggestion.member))]
    return [prepared.plan_trial(trial) for trial in make_trials([config], prepared.sweep.search.repeats)]


def known_at_start(
    prepared: Prepared, before: Mapping[str, TrialResult]
) -> Iterator[tuple[PlannedTrial, Suggestion | None, StartedFrom | None]]:
    """The trials that stand before the first launch; of an adaptive search those that earlier runs proposed."""
    if not prepared.sweep.search.is_adaptive:
        yield from ((planned, None, None) for planned in prepared.plan.trials)
        return
    made = {record.configuration_id: record for record in before.values()}.values()
    asked = [(now, record.started_from) for record in made if (now := as_proposed_now(prepared.sweep, record))]
    for suggestion, parent in sorted(asked, key=lambda pair: pair[0].number):
        if parent and parent.trial_id not in before:
            raise FolderError(
                f"trial {parent.trial_id} has left no record, and others of this population began with its checkpoint: "
                "put its folder back, or give this sweep another --name"
            )
        ran = before[parent.trial_id].config if parent else None
        yield from ((planned, suggestion, parent) for planned in plan_suggestion(prepared, suggestion, parent, ran))


def as_proposed_now(sweep: SweepConfig, record: TrialResult) -> Suggestion | None:
    """The proposal that a record came of, in the space of today, which may be another than it was made in.

    A setting that is searched only now has the value that it ran with. None where the same configuration cannot come of
    today's space, as where a setting that is not searched any more had another value than `trial:` has.
    """
    if record.suggestion is None or sweep.scheduler.pbt:
        # A population's space does not change.
        return record.suggestion
    ran = {**record.config.model_dump(mode="json"), **record.suggestion.settings}
    settings = active(axes_of(sweep.domains), sweep.base, ran)
    if configuration_id(TrialConfig(**{**sweep.base, **settings})) != record.configuration_id:
        return None
    return record.suggestion.model_copy(update={"settings": settings})


def is_spent(sweep: SweepConfig, records: Iterable[TrialResult]) -> bool:
    """Whether `budget.trials` configurations were launched; a refusal past the first so many counts as one."""
    refused: dict[int, bool] = {}
    for record in records:
        if record.suggestion:
            number, is_refused = record.suggestion.number, record.status is TrialStatus.INFEASIBLE
            refused[number] = refused.get(number, False) or is_refused
    trials = sweep.budget.trials or 0
    launched, free = sum(not was for was in refused.values()), trials
    return launched + max(0, sum(refused.values()) - free) >= trials


def next_number(records: Iterable[TrialResult]) -> int:
    """Of the proposal after these records'."""
    return 1 + max((record.suggestion.number for record in records if record.suggestion), default=-1)
