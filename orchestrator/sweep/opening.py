"""What a sweep's folder says at its start: a record for each trial that is known, and the sweep's own."""

from __future__ import annotations

import functools
import uuid
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from orchestrator.config.sweep_config import SweepConfig
from orchestrator.config.sweep_file import to_yaml
from orchestrator.errors import counted
from orchestrator.planning.plan_warnings import points_left_out
from orchestrator.planning.planned_trial import PlannedTrial
from orchestrator.results import provenance
from orchestrator.results.files import write_atomically
from orchestrator.results.folders import SweepFolder
from orchestrator.results.records import PeakMemory, StartedFrom, Suggestion, SweepResult, TrialResult, TrialStatus
from orchestrator.results.secrets import without_secret
from orchestrator.results.storage import write_results, write_sweep
from orchestrator.sweep.preparation import Prepared
from orchestrator.sweep.resume import Earlier, at_work_s, gone_on_with, kept, stays, with_time_spent
from orchestrator.sweep.suggestions import NewRecord, known_at_start


def opening_records(
    prepared: Prepared, folder: SweepFolder, earlier: Earlier | None, new_record: NewRecord
) -> dict[str, TrialResult]:
    """What each trial starts with: as it ended before, refused, or pending, with what it had when it was cut off."""
    before = earlier.trials if earlier else {}
    records = {}
    for planned, suggestion, parent in known_at_start(prepared, before):
        old = before.get(planned.trial_id)
        if old and suggestion:
            # As it is told in today's space.
            old = old.model_copy(update={"suggestion": suggestion})
        if old and stays(old, prepared.plan.worker_memory_bytes):
            records[planned.trial_id] = old
            continue
        new = new_record(planned, suggestion, parent)
        records[planned.trial_id] = (
            with_time_spent(old, gone_on_with(old, new, folder.trial(planned.trial_id))) if old else new
        )
    if earlier is None:
        return records
    return records | kept(earlier, frozenset(records), folder, searches=prepared.sweep.search.is_adaptive)


def record_maker(prepared: Prepared) -> NewRecord:
    """Makes the record that a planned trial begins with; versions and git are asked for once."""
    made_with = {"versions": provenance.versions(), "git": provenance.git_state(Path.cwd())}
    return functools.partial(_new_record, prepared, made_with)


def _new_record(
    prepared: Prepared,
    made_with: Mapping[str, Any],
    planned: PlannedTrial,
    suggestion: Suggestion | None,
    parent: StartedFrom | None,
) -> TrialResult:
    predicted = prepared.predicted_bytes(planned.config) if planned.memory else None
    return TrialResult(
        trial_id=planned.trial_id,
        configuration_id=planned.configuration_id,
        status=TrialStatus.INFEASIBLE if planned.reasons else TrialStatus.PENDING,
        reason="; ".join(planned.reasons) or None,
        config=planned.config,
        repeat=planned.repeat,
        seed=planned.config.seed,
        suggestion=suggestion,
        started_from=parent,
        **made_with,
        notes=planned.notes,
        predicted_step_time_s=prepared.step_seconds(planned.config).expected if planned.memory else None,
        gpu_shared_by=prepared.plan.gpu_shared_by,
        peak_memory=PeakMemory(
            predicted_bytes=predicted, available_bytes=prepared.plan.worker_memory_bytes, kind=prepared.memory_kind
        ),
    )


def opening_result(
    prepared: Prepared, earlier: Earlier | None, records: Mapping[str, TrialResult], started_at: float
) -> SweepResult:
    """The sweep's own record; an earlier run's goes on."""
    sweep = prepared.sweep
    before = earlier.result if earlier else None
    searched = (*(before.searched if before else ()), *sweep.domains)
    started_ms = int(started_at * 1000)
    return SweepResult(
        name=sweep.name,
        question=sweep.question,
        sweep_id=(earlier and earlier.sweep_id) or uuid.uuid4().hex[:12],
        model=sweep.model,
        objective_metric=sweep.objectives[0].metric,
        objective_mode=sweep.objectives[0].mode,
        objectives=tuple((objective.metric, objective.mode) for objective in sweep.objectives),
        constraints=sweep.constraints,
        searched=tuple(dict.fromkeys(searched)),
        started_ms=before.started_ms if before else started_ms,
        run_started_ms=started_ms if before else None,
        earlier_runs_s=at_work_s(earlier, started_ms) if earlier else 0.0,
        data_hash=prepared.data_hash,
        train_rows=prepared.train_rows,
        eval_rows=prepared.eval_rows,
        rows_left_out=prepared.rows_left_out,
        rows_too_long=prepared.rows_too_long,
        trials=tuple(records.values()),
    )


def write_opening(prepared: Prepared, folder: SweepFolder, records: Iterable[TrialResult], result: SweepResult) -> None:
    """The folder's files, before the first launch."""
    write_atomically(folder.sweep_file, without_secret(to_yaml(prepared.sweep)))
    write_atomically(folder.plan, prepared.plan.model_dump_json(indent=1) + "\n")
    write_results(folder, records)
    write_sweep(folder, result)


def start_words(records: Collection[TrialResult], folder: SweepFolder, slots: int, sweep: SweepConfig) -> str:
    """What is left to do, and what an earlier run has done."""
    found = Counter(record.status for record in records)
    pending, refused, cut_off = (
        found[status] for status in (TrialStatus.PENDING, TrialStatus.INFEASIBLE, TrialStatus.CANCELLED)
    )
    done = len(records) - pending - refused - cut_off
    told = f"{_to_run(records, pending, sweep)}, {slots} at a time; {refused} refused; {done} done before"
    waiting = (record for record in records if record.status is TrialStatus.PENDING)
    # Where it was cut off is not done, and not lost either.
    if going_on := sum(bool(folder.trial(record.trial_id).checkpoint_steps()) for record in waiting):
        told += f"; {going_on} {'goes on from its checkpoint' if going_on == 1 else 'go on from their checkpoints'}"
    if cut_off:
        told += f"; {cut_off} cut off before and not asked for now"
    return "; ".join([told, *points_left_out(sweep)])


def _to_run(records: Collection[TrialResult], pending: int, sweep: SweepConfig) -> str:
    """The trials that wait; of a search, which proposes each when a slot is free for it, all that it may make."""
    if pbt := sweep.scheduler.pbt:
        return f"a population of {pbt.population} in {counted(pbt.generations(sweep.trial.max_steps), 'generation')}"
    if not sweep.search.is_adaptive:
        return f"{counted(pending, 'trial')} to run"
    waiting = {one.suggestion.number for one in records if one.suggestion and one.status is TrialStatus.PENDING}
    ran = {one.suggestion.number for one in records if one.suggestion and one.status is not TrialStatus.INFEASIBLE}
    left = max(0, (sweep.budget.trials or 0) - len(ran - waiting))
    return f"{'up to ' if left else ''}{counted(left, 'configuration')} to try"
