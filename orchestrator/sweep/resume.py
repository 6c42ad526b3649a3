"""Going on in a folder that has a part of the sweep already: what may have changed since, and which results stay."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from orchestrator.config.sweep_config import SweepConfig
from orchestrator.config.sweep_file import load
from orchestrator.config.trial_config import TrialConfig
from orchestrator.config.yaml_text import shown_as_yaml
from orchestrator.errors import FolderError, InputError, counted, cut
from orchestrator.planning.plan import SweepPlan
from orchestrator.results.folders import SweepFolder, TrialFolder
from orchestrator.results.records import SweepResult, TrialResult, TrialStatus
from orchestrator.results.storage import DamagedRecord, newest, read_table, read_trial_results
from orchestrator.sweep.closing import as_left_on_disk
from orchestrator.sweep.delivered import kept_sweep_id

SAME_KEYS = ("model", "data")
"""Keys without which results could not stand in one table; so too every setting that is not searched."""


@dataclass(frozen=True, slots=True)
class Earlier:
    """What the folder holds of this sweep."""

    sweep: SweepConfig
    result: SweepResult | None
    """None where results.json is lost: the trials' own records are enough to go on."""
    trials: Mapping[str, TrialResult]
    sweep_id: str | None = None
    """None where both files that hold it are lost: MLflow's runs are made anew."""
    damaged: tuple[DamagedRecord, ...] = ()


def read_earlier(folder: SweepFolder) -> Earlier | None:
    """What an earlier run left, or None in a new folder.

    Raises:
        InputError: its sweep.yaml cannot be read, or is missing where there are results.
    """
    if not folder.sweep_file.exists():
        if folder.results_json.exists() or any(trial.result.exists() for trial in folder.trials()):
            raise FolderError(
                f"{folder.shown} holds results and no {folder.sweep_file.name}, so nobody knows of which sweep: put "
                "the file back, or give this sweep another --name"
            )
        return None
    if not folder.sweep_file.is_file():
        raise FolderError(f"{folder.sweep_file} is no file: put it back, or give this sweep another --name")
    try:
        result = read_table(folder)
    except FolderError:
        result = None
    sweep_id = result.sweep_id if result else kept_sweep_id(folder)
    own, damaged = read_trial_results(folder)
    trials = newest(_ended_by_the_table(folder, result), own)
    return Earlier(load(folder.sweep_file), result, trials, sweep_id, damaged)


def _ended_by_the_table(folder: SweepFolder, result: SweepResult | None) -> Iterator[TrialResult]:
    """Trials that had ended, as results.json has them: their own record may be lost, damaged or older.

    Of a trial whose whole folder is gone nothing counts: it is run again.
    """
    for trial in result.trials if result else ():
        if trial.status.is_final and folder.trial(trial.trial_id).root.is_dir():
            yield trial


def stays(record: TrialResult, available_bytes: int) -> bool:
    """Whether an end is final: refusals are made anew, and what ran out of memory may fit where there is more."""
    if record.status is TrialStatus.OUT_OF_MEMORY and record.peak_memory and record.peak_memory.available_bytes:
        return available_bytes <= record.peak_memory.available_bytes
    return record.status.is_final and record.status is not TrialStatus.INFEASIBLE


def words_for_a_plan(folder: SweepFolder, sweep: SweepConfig, plan: SweepPlan) -> Iterator[str]:
    """How much of a plan is done in the sweep's folder already, or that `run` would refuse to go on there.

    `sweep` has its hardware's defaults. A folder in an object store is left out: a plan asks nobody.
    """
    if folder.remote:
        return
    try:
        earlier = read_earlier(folder)
        if earlier:
            require_same_question(folder, earlier.sweep, sweep, knows_hardware=True)
    except InputError as error:
        yield f"run would end at once: {error}"
        return
    done = [t for t in earlier.trials.values() if stays(t, plan.worker_memory_bytes)] if earlier else []
    planned = {trial.trial_id for trial in plan.trials}
    if plan.proposed_by and (tried := {trial.suggestion.number for trial in done if trial.suggestion}):
        yield f"{counted(len(tried), 'configuration')} of this search {_are_done(len(tried), folder)}"
    elif count := sum(trial.trial_id in planned for trial in done):
        yield f"{count} of these trials {_are_done(count, folder)}"


def _are_done(count: int, folder: SweepFolder) -> str:
    return f"{'is' if count == 1 else 'are'} done already in {cut(folder.shown)}: `run` goes on with the rest"


def require_same_question(
    folder: SweepFolder, before: SweepConfig, now: SweepConfig, *, knows_hardware: bool = False
) -> None:
    """Refuse a sweep whose results could not be compared with those in its folder.

    Until the hardware is known, a precision that the file does not name is not compared: it follows the hardware.

    Raises:
        FolderError: with each difference.
    """
    if found := tuple(changes(before, now, knows_hardware)):
        raise FolderError(
            f"{folder.shown} holds a sweep of which the results could not be compared with these: {'; '.join(found)}. "
            "Give this one another --name"
        )


def require_same_data(folder: SweepFolder, earlier: Earlier, data_hash: str) -> None:
    """Refuse data whose rows are others than those that trials were trained on, though their source has the same name.

    Raises:
        FolderError: with both hashes.
    """
    before = earlier.result.data_hash if earlier.result else None
    if before in (None, data_hash) or not any(trial.steps for trial in earlier.trials.values()):
        return
    raise FolderError(
        f"{folder.shown} holds results on other data: the rows of {earlier.sweep.data.train} have changed since (hash "
        f"{before}, now {data_hash}). Bring them back, or give this sweep another --name"
    )


def changes(before: SweepConfig, now: SweepConfig, knows_hardware: bool) -> Iterator[str]:
    """What makes the results of two sweep files incomparable."""
    for key in SAME_KEYS:
        old, new = getattr(before, key), getattr(now, key)
        if old != new:
            yield f"{key} was {shown_as_yaml(old)}, now {shown_as_yaml(new)}"
    # Scores come after training: they may be asked for, and decide, once the trials are there.
    if before.training_objectives != now.training_objectives:
        yield f"objective was {shown_as_yaml(before.objective)}, now {shown_as_yaml(now.objective)}"
    if before.scheduler.pbt != now.scheduler.pbt:
        # Its members began with each other's checkpoints: what they came to belongs to that population.
        yield f"scheduler.pbt was {shown_as_yaml(before.scheduler.pbt)}, now {shown_as_yaml(now.scheduler.pbt)}"
    searched = {*before.domains, *now.domains}
    for name in sorted(searched) if now.scheduler.pbt else ():
        # With other settings its members would be other trials, which begin with checkpoints that have gone.
        old, new = (config.domains.get(name, "not searched") for config in (before, now))
        if old != new:
            yield f"space.{name} was {shown_as_yaml(old)}, now {shown_as_yaml(new)}"
    for name in TrialConfig.model_fields:
        follows = name == "precision" and now.precision_follows_hardware
        if name in searched or (follows and not knows_hardware):
            continue
        old, new = getattr(before.trial, name), getattr(now.trial, name)
        if old != new:
            yield f"trial.{name} was {shown_as_yaml(old)}, now {shown_as_yaml(new)}"


def at_work_s(earlier: Earlier, now_ms: int) -> float:
    """Seconds that its runs took, the pauses between them left out; none of them can have ended after now."""
    result = earlier.result
    if result is None or result.started_ms is None:
        return 0.0
    began_ms = result.run_started_ms or result.started_ms
    ended_ms = result.model_copy(update={"trials": tuple(earlier.trials.values())}).last_sign_ms or began_ms
    return result.earlier_runs_s + max(0, min(ended_ms, now_ms) - began_ms) / 1000


def kept(
    earlier: Earlier, planned: frozenset[str], folder: SweepFolder, *, searches: bool = False
) -> dict[str, TrialResult]:
    """Results of trials that are not asked for now: nothing that was measured is dropped.

    searches: an adaptive search runs now, which may propose what a grid left open.
    """
    found = {}
    for trial_id, record in earlier.trials.items():
        if trial_id in planned or record.status is TrialStatus.INFEASIBLE:
            continue
        if not record.status.is_final:
            may_come = searches and record.suggestion is None
            why = "cut off, and not proposed by the search" if may_come else "the sweep file no longer asks for it"
            record = as_left_on_disk(record, folder.trial(trial_id), earlier.sweep.best_by)
            record = record.model_copy(update={"status": TrialStatus.CANCELLED, "reason": why, "asked_for": False})
        found[trial_id] = record
    return found


def useless_checkpoints(records: Iterable[TrialResult], folder: SweepFolder) -> list[str]:
    """Ids of trials whose checkpoints outlived them in the object store: the run that recorded their end died before it
    removed these. What lies here goes with the record, whenever that is written.
    """
    if not folder.remote:
        return []
    return [
        record.trial_id
        for record in records
        if not record.needs_checkpoint and folder.trial(record.trial_id).checkpoint_steps()
    ]


def with_time_spent(old: TrialResult, new: TrialResult) -> TrialResult:
    """`new`, which is run again, with the time that `old` held its resources and `new` does not count yet."""
    before = old.timing
    # One that was cut off by the end of its driver has no total.
    spent_s = max(before.total_s, before.phases_s) + before.earlier_s
    earlier_s = max(0.0, spent_s - new.timing.total_s)
    return new.model_copy(update={"timing": new.timing.model_copy(update={"earlier_s": earlier_s})})


def gone_on_with(old: TrialResult, new: TrialResult, folder: TrialFolder) -> TrialResult:
    """The record of a trial that waits: with what it had before where it was cut off and left a checkpoint.

    old: as the earlier run left it. new: as if it had never run.
    """
    if new.status is not TrialStatus.PENDING or old.status.is_final or not folder.checkpoint_steps():
        return new
    # Memory may have run out before: the micro-batch stays as small as it had to become.
    sizes = [size for size in (old.config.micro_batch_size, new.config.micro_batch_size) if size != "auto"]
    return old.model_copy(
        update={
            "status": TrialStatus.PENDING,
            "reason": None,
            "asked_for": True,
            "config": new.config.model_copy(update={"micro_batch_size": min(sizes, default="auto")}),
            "notes": tuple(dict.fromkeys((*new.notes, *old.notes))),
            "peak_memory": new.peak_memory,
            "predicted_step_time_s": new.predicted_step_time_s,
            "gpu_shared_by": new.gpu_shared_by,
            "timing": old.timing.model_copy(update={"total_s": old.timing.phases_s}),
            "mlflow_run_id": None,
            # Of an adapter that a better one may take the place of.
            "scores": {},
        }
    )
