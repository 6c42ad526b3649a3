"""Population-based training at work: the first generation is proposed one by one, each later one out of the one before.

A trial's settings never change on disk: a member that goes on is a trial of its own, which begins with the checkpoint
that its parent has left. What is decided is read from the records, so a resumed sweep decides the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from orchestrator.config.axes import axes_of
from orchestrator.config.search_space import Settings
from orchestrator.config.sweep_config import SweepConfig
from orchestrator.planning.pace import to_come
from orchestrator.results.records import StartedFrom, Suggestion, TrialResult, TrialStatus
from orchestrator.search.observation import Observation, Standing, constraints_of
from orchestrator.search.population import Member, Successor, successors
from orchestrator.search.suggest import next_settings
from orchestrator.sweep.preparation import Prepared
from orchestrator.sweep.recorder import Recorder
from orchestrator.sweep.suggestions import NewRecord, goals, limits, next_number, plan_suggestion, to_try_first

GOING_ON = frozenset({TrialStatus.PENDING, TrialStatus.RUNNING})


def last_step(sweep: SweepConfig, record: TrialResult) -> int | None:
    """The step at which a member's generation ends; None where that is its last step anyway."""
    if sweep.scheduler.pbt is None or record.suggestion is None or record.suggestion.generation is None:
        return None
    step = (record.suggestion.generation + 1) * sweep.scheduler.pbt.interval_steps
    return step if step < record.config.max_steps else None


class Generations:
    """Members one by one, until the last generation has begun or nobody is left to go on."""

    def __init__(
        self, prepared: Prepared, recorder: Recorder, new_record: NewRecord, forget: Callable[[str], None]
    ) -> None:
        """Take what has been decided from the records; `forget` removes the checkpoints of a trial that has ended."""
        assert prepared.sweep.scheduler.pbt
        self._prepared, self._sweep, self._pbt = prepared, prepared.sweep, prepared.sweep.scheduler.pbt
        self._recorder, self._new_record, self._forget = recorder, new_record, forget
        self._axes, self._points = axes_of(prepared.sweep.domains), to_try_first(prepared.sweep)
        self._forgotten = 0
        self.ended_because: str | None = None
        self.told_at_start: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        # As the recorder's: Tune pickles what it is given, and its state is never read back.
        return {}

    def more(self) -> Sequence[str] | None:
        """Ids of new trials that wait; none at the search's end, None where a trial has to end first."""
        while settings := self._next_founder():
            made = self._make(settings, generation=0)
            if made.status is TrialStatus.PENDING:
                return [made.trial_id]
        found = [trial_id for generation in range(1, self.generations) for trial_id in self._born(generation)]
        self._forget_parents()
        if found or not any(record.status in GOING_ON for record in self._recorder.records.values()):
            return found
        return None

    @property
    def is_over(self) -> bool:
        """Whether every generation has begun."""
        return self._to_come() == 0

    def unused(self) -> str:
        """How many of its trials have not begun: `not used: 9 of the population's 24 trials`."""
        return f"not used: {self._to_come()} of the population's {self._prepared.plan.launches} trials"

    def _to_come(self) -> int:
        return to_come(self._recorder.records.values(), self._prepared.plan.launches)

    @property
    def generations(self) -> int:
        """How many until the last step; the last one may be shorter."""
        return self._pbt.generations(self._sweep.trial.max_steps)

    def _next_founder(self) -> Settings | None:
        """Another configuration for the first generation; as many as it has may be refused before launch."""
        known = [r for r in self._recorder.records.values() if r.suggestion and r.suggestion.generation == 0]
        found = [record.suggestion for record in known if record.suggestion]
        refused = sum(suggestion.member is None for suggestion in found)
        if len(found) - refused >= self._pbt.population or refused >= self._pbt.population:
            return None
        # Nothing is known of any of them, so that they are spread out.
        seen = [Observation(one.number, one.settings, Standing.OPEN) for one in found]
        sweep = self._sweep
        return next_settings("tpe", sweep.domains, sweep.base, sweep.exclude, self._points, seen, sweep.search.seed)

    def _born(self, generation: int) -> list[str]:
        """Make those members of a generation that are certain by now and are not there yet."""
        parents = self._members(generation - 1)
        there = {suggestion.member for record in self._in(generation) if (suggestion := record.suggestion)}
        if len(there) == len(parents):
            return []
        sweep = self._sweep
        certain = successors(
            self._axes, sweep.base, sweep.exclude, parents, self._pbt.quantile, sweep.search.seed, generation - 1
        )
        made = [self._succeed(one, generation) for one in certain if one.number not in there]
        return [record.trial_id for record in made if record.status is TrialStatus.PENDING]

    def _succeed(self, successor: Successor, generation: int) -> TrialResult:
        parent = StartedFrom(trial_id=successor.parent.trial_id, step=generation * self._pbt.interval_steps)
        return self._make(successor.settings, generation=generation, member=successor.number, parent=parent)

    def _make(
        self, settings: Settings, *, generation: int, member: int | None = None, parent: StartedFrom | None = None
    ) -> TrialResult:
        records = self._recorder.records
        number = next_number(records.values())
        suggestion = Suggestion(number=number, settings=settings, generation=generation, member=member)
        parent_config = records[parent.trial_id].config if parent else None
        (planned,) = plan_suggestion(self._prepared, suggestion, parent, parent_config)
        if generation == 0 and not planned.reasons:
            # Of a member whose record is lost the place is free, not the last one.
            taken = {one.suggestion.member for one in self._in(0) if one.suggestion}
            member = next(number for number in itertools.count() if number not in taken)
            suggestion = suggestion.model_copy(update={"member": member})
        record = self._new_record(planned, suggestion, parent)
        self._recorder.save(record)
        return record

    def _in(self, generation: int) -> list[TrialResult]:
        """Members' records, by their places."""
        found = [
            (suggestion.member, record)
            for record in self._recorder.records.values()
            if (suggestion := record.suggestion)
            and suggestion.generation == generation
            and suggestion.member is not None
        ]
        return [record for _, record in sorted(found, key=lambda pair: pair[0])]

    def _members(self, generation: int) -> list[Member]:
        """All of a generation; of those that are not there yet nothing is known."""
        there = {member.number: member for member in map(self._member, self._in(generation))}
        return [there.get(number, Member(number, "", {}, False)) for number in range(len(self._in(0)))]

    def _member(self, record: TrialResult) -> Member:
        assert record.suggestion
        assert record.suggestion.member is not None
        value = goals(self._sweep)[0].of(record.last) if record.leaves_checkpoint and record.last else None
        violation = sum(max(0.0, excess) for _, excess in constraints_of([record], limits(self._sweep)))
        return Member(
            record.suggestion.member,
            record.trial_id,
            record.suggestion.settings,
            record.status.is_final,
            None if value is None else (violation, value),
        )

    def _forget_parents(self) -> None:
        """The checkpoints of every generation of which all successors have ended."""
        for generation in range(self._forgotten, self.generations - 1):
            parents, children = self._in(generation), self._in(generation + 1)
            if not children or len(children) < len(parents) or not all(c.status.is_final for c in children):
                return
            for parent in parents:
                self._forget(parent.trial_id)
            self._forgotten = generation + 1
