"""One sweep from its file to its report: plan, launch, resume, finish."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.config.local_path import local_path
from orchestrator.config.storage_address import is_remote
from orchestrator.config.sweep_config import SweepConfig
from orchestrator.reporting import report
from orchestrator.reporting.findings import Report
from orchestrator.results.files import write_atomically
from orchestrator.results.folders import SweepFolder
from orchestrator.results.records import SweepResult, TrialStatus
from orchestrator.results.remote import sweep_folder
from orchestrator.results.storage import write_sweep
from orchestrator.sweep import cluster, evaluation, system_metrics
from orchestrator.sweep.callbacks import Callbacks
from orchestrator.sweep.carrier import Carrier, carried
from orchestrator.sweep.delivery import deliver
from orchestrator.sweep.folder_lock import Tenure, only_one
from orchestrator.sweep.gauges import Gauges
from orchestrator.sweep.head_watch import told_of_a_lost_head
from orchestrator.sweep.launch import Isolation, Search, launch, search_of
from orchestrator.sweep.opening import (
    opening_records,
    opening_result,
    record_maker,
    start_words,
    write_opening,
)
from orchestrator.sweep.preparation import Prepared, prepare
from orchestrator.sweep.progress import Progress
from orchestrator.sweep.recorder import Recorder
from orchestrator.sweep.resume import (
    Earlier,
    read_earlier,
    require_same_data,
    require_same_question,
    useless_checkpoints,
)
from orchestrator.sweep.scheduler import RuleScheduler
from orchestrator.sweep.signals import Signals
from orchestrator.sweep.stopper import Stopper
from orchestrator.sweep.tracking import Tracker, awaited_tracker
from orchestrator.sweep.tracking_address import require_address, tracking_uri
from orchestrator.training.inputs import FoundModel, require_warm_start

TRACKING_LIMIT_S = 60.0
TRACKING_WAIT_S = 600.0
INTERRUPTED_TRACKING_LIMIT_S = 5.0
"""Kubernetes gives 30 s from SIGTERM to SIGKILL; what MLflow lacks is on disk, and the next run carries it over."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a sweep ended."""

    sweep: SweepResult
    report: Report
    tracked: bool
    """Whether MLflow has everything; what it lacks is on disk, and the next `run` or `report` carries it over."""

    tracking_uri: str

    @property
    def exit_code(self) -> int:
        """The contract's: 130 interrupted, 1 with trials that failed, 0 otherwise."""
        if self.sweep.interrupted:
            return 130
        return int(any(trial.status in (TrialStatus.FAILED, TrialStatus.PREEMPTED) for trial in self.sweep.trials))


def run(
    sweep: SweepConfig, model: FoundModel, address: str | None, isolation: Isolation, say: Callable[[str], None]
) -> Outcome:
    """Run a sweep, or go on with it where its folder has a part already.

    sweep: as `lasting` has it. model: the sweep's, as `inputs` found it.

    Raises:
        InputError: it cannot be run as it is written; nothing was started.
        UnreachableError: the cluster, the tracking server or the storage.
    """
    folder = sweep_folder(sweep.storage, sweep.name)
    # An address that cannot be is told before anything starts.
    require_address(sweep)
    # What it teaches is read later; that it is there is known before anything starts.
    require_warm_start(sweep)
    signals = Signals()
    with only_one(folder) as tenure, signals.heard(), carried(folder, tenure) as carrier:
        earlier = read_earlier(folder)
        if earlier:
            require_same_question(folder, earlier.sweep, sweep)
            # What a search proposed is in that record alone: it may propose the same once more, or not.
            lost = "the search goes on without it" if sweep.search.is_adaptive else "its trial is run again"
            for record in earlier.damaged:
                say(f"damaged: {record}; {lost}, unless results.json knows how it ended")
        try:
            ended = {name for name, trial in earlier.trials.items() if trial.status.is_final} if earlier else ()
            prepared = prepare(sweep, model, folder, address, ended, say)
            with told_of_a_lost_head(say, lambda: signals.came):
                return _run_prepared(prepared, folder, tenure, carrier, earlier, isolation, signals, say)
        finally:
            cluster.disconnect()


def lasting(sweep: SweepConfig) -> SweepConfig:
    """In a job relative paths to sweeps stand in the home folder, where a resubmitted one finds them again."""
    if not cluster.runs_in_a_job():
        return sweep
    home, search = local_path("~"), sweep.search
    if search.warm_start and not is_remote(search.warm_start):
        search = search.model_copy(update={"warm_start": str(home / local_path(search.warm_start))})
    storage = sweep.storage if is_remote(sweep.storage) else str(home / local_path(sweep.storage))
    return sweep.model_copy(update={"storage": storage, "search": search})


def _run_prepared(
    prepared: Prepared,
    folder: SweepFolder,
    tenure: Tenure,
    carrier: Carrier,
    earlier: Earlier | None,
    isolation: Isolation,
    signals: Signals,
    say: Callable[[str], None],
) -> Outcome:
    sweep = prepared.sweep
    if earlier:
        require_same_question(folder, earlier.sweep, sweep, knows_hardware=True)
        require_same_data(folder, earlier, prepared.data_hash)
    started_at = time.time()
    new_record = record_maker(prepared)
    records = opening_records(prepared, folder, earlier, new_record)
    result = opening_result(prepared, earlier, records, started_at)
    # Nobody looks on where a job starts, and the server may have been deployed in the same moment.
    wait_s = TRACKING_WAIT_S if cluster.runs_in_a_job() else 0.0
    tracker = awaited_tracker(sweep, result.sweep_id, folder, wait_s, say)
    result = result.model_copy(update={"mlflow_run_id": tracker.parent_run_id})
    useless = useless_checkpoints(records.values(), folder)
    write_opening(prepared, folder, records.values(), result)
    carrier.push()
    for trial_id in useless:
        carrier.forget_checkpoints(trial_id)
    scheduler = RuleScheduler(sweep, prepared.shape.gpus)
    if earlier:
        scheduler.hear_again(folder, records.values())
    progress = _progress(prepared, folder, result)
    callbacks = Callbacks(say, records.values())
    gauges = Gauges(sweep, records.values())
    recorder = Recorder(
        folder,
        records,
        started_at,
        prepared.board,
        scheduler.reasons,
        prepared.predicted_bytes,
        carrier.fetch,
        sweep.best_by,
        tenure,
        (carrier.track, carrier.once_stored(tracker.track), gauges.track, progress, callbacks.track),
    )
    search = search_of(prepared, folder, recorder, new_record, carrier.forget_checkpoints)
    stopper = _stopper(prepared, recorder, carrier)
    for record in records.values():
        if record.status is not TrialStatus.PENDING:
            tracker.track(record)
    say(start_words(records.values(), folder, prepared.slots, sweep))
    if search.told_at_start:
        say(search.told_at_start)
    sampled = system_metrics.logged(tracking_uri(sweep), tracker.parent_run_id)
    with progress, signals.to(stopper, progress.stopping), sampled:
        launch(prepared, folder, recorder, search, scheduler, [recorder, progress], stopper, isolation)
    recorder.tenure.require()
    if stopper.interrupted:
        carrier.hurry()
    recorder.look_again()
    cut_off = recorder.cancel_rest(stopper.reason or "the sweep ended before it: run the same command again")
    if error := stopper.broken():
        tracker.finish(INTERRUPTED_TRACKING_LIMIT_S)
        raise type(error)(
            f"the sweep was stopped, since it could not go on: {error}. What had ended before is safe: run the same "
            "command again"
        )
    if search.ended_because:
        say(search.ended_because)
        result = result.model_copy(update={"search_ended": search.ended_because})
    if cut_short := cut_short_words(prepared.sweep, stopper, search, cut_off):
        say(cut_short)
        result = result.model_copy(update={"cut_short": cut_short})
    if earlier and earlier.result and earlier.result.ended_ms and not recorder.has_launched:
        # A run that found all done adds nothing to the time that the sweep took.
        spent = ("run_started_ms", "earlier_runs_s", "ended_ms")
        result = result.model_copy(update={name: getattr(earlier.result, name) for name in spent})
    outcome = _finish(prepared, result, recorder, tracker, carrier, folder, stopper, say)
    callbacks.sweep_ended(outcome.sweep, folder.root)
    return outcome


def _progress(prepared: Prepared, folder: SweepFolder, result: SweepResult) -> Progress:
    # A score comes after training.
    known = {"objective_metric": prepared.sweep.primary.metric, "objective_mode": prepared.sweep.primary.mode}
    return Progress(
        folder,
        result.model_copy(update=known),
        prepared.slots,
        {trial.trial_id: trial.seconds or 0.0 for trial in prepared.plan.trials},
        prepared.plan.launches,
        prepared.sweep.budget.hours,
    )


def _stopper(prepared: Prepared, recorder: Recorder, carrier: Carrier) -> Stopper:
    lost_actor = cluster.watch(prepared.board, prepared.groups)
    return Stopper(
        prepared.board,
        prepared.sweep.budget,
        lambda: recorder.trial_seconds() * prepared.shape.gpus / 3600,
        lambda: recorder.storage_error or carrier.away() or lost_actor(),
    )


def cut_short_words(sweep: SweepConfig, stopper: Stopper, search: Search, cut_off: int) -> str | None:
    """What a limit of the budget left undone, where one ended the sweep; `cut_off`: trials that it ended."""
    if stopper.reason is None or stopper.interrupted or not (cut_off or not search.is_over):
        return None
    return f"{stopper.reason}; {search.unused()}" if sweep.search.is_adaptive else stopper.reason


def _finish(
    prepared: Prepared,
    result: SweepResult,
    recorder: Recorder,
    tracker: Tracker,
    carrier: Carrier,
    folder: SweepFolder,
    stopper: Stopper,
    say: Callable[[str], None],
) -> Outcome:
    """Write results and report, then give MLflow a bounded time to have it all."""
    sweep = prepared.sweep
    ended = {"ended_ms": result.ended_ms or int(time.time() * 1000), "interrupted": stopper.interrupted}
    result = result.model_copy(update={"trials": tuple(recorder.records.values()), **ended})
    if not result.interrupted:
        is_evaluated = evaluation.evaluate(sweep, result, prepared.shape, folder, carrier.wrote, say)
        recorder.save_all(evaluation.scored(result, folder))
        trials = tuple(recorder.records.values())
        result = result.model_copy(update={"trials": trials, "interrupted": not is_evaluated})
        recorder.tenure.require()
    say("writing the report")
    # Before MLflow is waited for: what was measured is safe whatever happens then.
    write_sweep(folder, result)
    made = report.build(folder)
    write_atomically(folder.report, report.render_html(made))
    # And MLflow hears of an end when the store has it.
    carrier.finish()
    limit_s, wait = (INTERRUPTED_TRACKING_LIMIT_S, None) if result.interrupted else (TRACKING_LIMIT_S, say)
    result, tracked = deliver(sweep, result, tracker, folder, limit_s, wait, recorder.save_all, say)
    return Outcome(result, made, tracked, tracking_uri(sweep))
