"""The last that MLflow gets of a sweep: when its trials have ended, or later, where the server was away then."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence

from orchestrator.config.sweep_config import SweepConfig
from orchestrator.config.sweep_file import load
from orchestrator.errors import OrchestratorError, TrackingUnreachableError, counted, cut
from orchestrator.reporting.recommendation import trial_to_take
from orchestrator.results.folders import SweepFolder
from orchestrator.results.records import SweepResult, TrialResult
from orchestrator.results.secrets import without_secret
from orchestrator.results.storage import read_sweep, write_results, write_sweep
from orchestrator.sweep import evaluation, logged_model
from orchestrator.sweep.delivered import has_been_told, is_known, told_server
from orchestrator.sweep.folder_lock import only_one
from orchestrator.sweep.tracking import Tracker
from orchestrator.sweep.tracking_address import tracking_uri

LATE_LIMIT_S = 60.0


def deliver(
    sweep: SweepConfig,
    result: SweepResult,
    tracker: Tracker,
    folder: SweepFolder,
    limit_s: float,
    wait: Callable[[str], None] | None,
    save: Callable[[Sequence[TrialResult]], None],
    say: Callable[[str], None],
) -> tuple[SweepResult, bool]:
    """Give MLflow a bounded time to have all trials, and then what belongs to the sweep as a whole.

    wait: as `Tracker.finish` takes it.
    save: keeps the records that have learned their run's id.

    Returns the sweep with these ids, and whether MLflow has everything.
    """
    try:
        is_complete = tracker.finish(limit_s, wait)
    except KeyboardInterrupt:
        is_complete = False
    run_ids = {trial.trial_id: tracker.run_id(trial.trial_id) or trial.mlflow_run_id for trial in result.trials}
    trials = tuple(trial.model_copy(update={"mlflow_run_id": run_ids[trial.trial_id]}) for trial in result.trials)
    # Another server has other runs for them.
    save([new for new, old in zip(trials, result.trials, strict=True) if new.mlflow_run_id != old.mlflow_run_id])
    result = result.model_copy(update={"trials": trials})
    write_sweep(folder, result)
    if is_complete:
        best = trial_to_take(result)
        is_complete = tracker.close_parent(result, best)
        evaluation.log(tracking_uri(sweep), result, folder, say)
        # One that the next run goes on with has no last adapter yet.
        if best and best.status.is_final and best.mlflow_run_id and not result.interrupted:
            logged_model.log_best(sweep, result, best, folder, say)
    return result, is_complete


def deliver_late(folder: SweepFolder, say: Callable[[str], None]) -> None:
    """Once more, for a sweep of which MLflow `is_owed` a part: one line says how it went, and nothing is raised."""
    try:
        with only_one(folder):
            result, _ = read_sweep(folder)
            # The file names the storage as it was called when the sweep ran, and from there.
            sweep = load(folder.sweep_file).model_copy(update={"storage": str(folder.root.absolute().parent)})
            now, before = without_secret(tracking_uri(sweep)), told_server(folder)
            if before is None or not has_been_told(folder, now):
                raise TrackingUnreachableError(
                    f"it went to {before}, and not to {now}: set MLFLOW_TRACKING_URI to that"
                )
            named = without_secret(os.environ.get("MLFLOW_TRACKING_URI", ""))
            if not any(is_known(server) for server in (now, before)) and now != named:
                raise TrackingUnreachableError(
                    f"its folder names {now}, where this account has tracked no sweep, so nothing was sent there: set "
                    "MLFLOW_TRACKING_URI to it if it is yours"
                )
            # A report is not kept waiting by a server that is still away.
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
            tracker = Tracker(sweep, result.sweep_id, folder)
            result = result.model_copy(update={"mlflow_run_id": tracker.parent_run_id})
            for trial in result.trials:
                tracker.track(trial)
            save = functools.partial(write_results, folder)
            _, is_complete = deliver(sweep, result, tracker, folder, LATE_LIMIT_S, say, save, lambda _: None)
    except OrchestratorError as error:
        say(f"MLflow still lacks a part of this sweep: {error}")
    else:
        say("MLflow lacked a part of this sweep: " + _how_it_went(is_complete, tracker.refused()))


def _how_it_went(is_complete: bool, refused: Sequence[str]) -> str:
    if not is_complete:
        return "it did not take all of it now"
    if refused:
        return f"delivered, without {counted(len(refused), 'trial')} that it refuses ({cut(', '.join(refused))})"
    return "delivered"
