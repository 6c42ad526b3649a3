"""A sweep's records on disk: read back, damaged ones told, and written."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import socket
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout
from pydantic_core import from_json

from orchestrator.errors import FolderError, cut
from orchestrator.results.files import read_record, sync, why_unread, write_atomically
from orchestrator.results.folders import TABLE, SweepFolder, TrialFolder
from orchestrator.results.records import SweepResult, TrialResult, upgrade

Answer = TypeVar("Answer")
WRITES = 16
"""Of records at a time: 600 took 0.3 s in place of 2.9 (ext4)."""
DEAD_AFTER_S = 20.0
"""An owner on another host that has not renewed its lease for so long is gone."""


@dataclass(frozen=True, slots=True)
class DamagedRecord:
    """A file that should hold a record and does not."""

    file: Path
    why: str

    def __str__(self) -> str:
        """In one line."""
        return f"{self.file}: {self.why}"


def read_trial_results(folder: SweepFolder) -> tuple[dict[str, TrialResult], tuple[DamagedRecord, ...]]:
    """Every trial's record from its own file; damaged ones are named, never skipped in silence."""
    results: dict[str, TrialResult] = {}
    damaged = []
    for trial in folder.trials():
        try:
            record = TrialResult.model_validate(upgrade(from_json(read_record(trial.result))))
            if record.trial_id != trial.root.name:
                raise ValueError(f"it is the record of trial {record.trial_id}")
            results[trial.root.name] = record
            if trial.metrics.is_dir():
                damaged.append(DamagedRecord(trial.metrics, "a folder: the curve is lost"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError) as error:
            damaged.append(DamagedRecord(trial.result, why_unread(error)))
    return results, tuple(damaged)


def read_table(folder: SweepFolder) -> SweepResult:
    """The sweep as results.json has it: its trials as they stood when it was written.

    Raises:
        FolderError: the folder holds no sweep.
    """
    try:
        return SweepResult.model_validate(upgrade(from_json(read_record(folder.results_json))))
    except (FileNotFoundError, NotADirectoryError) as error:
        if folder.sweep_file.exists() and any(folder.trials()):
            told = (
                f"{cut(str(folder.results_json))} is lost, and the trials are there: run the sweep again to rebuild it"
            )
            raise FolderError(told) from error
        raise FolderError(f"{cut(folder.shown)} holds no sweep: name a folder that `orchestrator run` made") from error
    except PermissionError as error:
        raise FolderError(f"{folder.results_json} may not be read by this account: give it the right to") from error
    except (OSError, ValueError, RecursionError) as error:
        raise FolderError(
            f"{cut(str(folder.results_json))} cannot be read ({why_unread(error)}): run the sweep again to rebuild it"
        ) from error


def read_sweep(folder: SweepFolder) -> tuple[SweepResult, tuple[DamagedRecord, ...]]:
    """The sweep with every trial as its own file has it, running or ended; of a damaged one as results.json does.

    Raises:
        FolderError: the folder holds no sweep.
    """
    sweep = read_table(folder)
    results, damaged = read_trial_results(folder)
    known = {trial.trial_id for trial in sweep.trials}
    # What an adaptive search has proposed since is in its own file alone.
    own = {trial_id: trial for trial_id, trial in results.items() if trial_id in known or trial.suggestion}
    told = tuple(_with_its_consequence(record, known - results.keys()) for record in damaged)
    return sweep.model_copy(update={"trials": tuple(newest(sweep.trials, own).values())}), told


def _with_its_consequence(record: DamagedRecord, in_the_table_alone: Collection[str]) -> DamagedRecord:
    """What a reader makes of a trial whose own record is damaged; of other files the reason tells it."""
    trial = TrialFolder(record.file.parent)
    if record.file != trial.result:
        return record
    is_told = trial.root.name in in_the_table_alone
    return replace(record, why=f"{record.why}; {'told from results.json' if is_told else 'left out'}")


def newest(table: Iterable[TrialResult], own: Mapping[str, TrialResult]) -> dict[str, TrialResult]:
    """By id, what a trial's own file says of it, and where it has none what results.json does.

    Of a trial that had ended an own record that knows of no end is the older one, as after a power cut.
    """
    found = {trial.trial_id: trial for trial in table}
    for trial_id, record in own.items():
        if record.status.is_final or trial_id not in found or not found[trial_id].status.is_final:
            found[trial_id] = record
    return found


def read_lease(folder: SweepFolder) -> dict[str, object]:
    """What the run at work tells other hosts of itself; empty where there is none, or what stands there is no lease."""
    try:
        found = json.loads(read_record(folder.lease))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def is_at_work(folder: SweepFolder) -> bool:
    """Whether a run holds the folder's lock, or on another host, whose locks a mount may keep to itself, its lease.

    A dead owner's lock is free at once, since the kernel holds it.
    """
    if folder.remote:
        from orchestrator.results import lease

        found = lease.look(folder.remote)
        return found is not None and found.is_alive
    if not folder.lock.exists():
        return False
    try:
        with FileLock(folder.lock, timeout=0):
            pass
    except (Timeout, OSError):
        # What cannot be locked, as on a read-only mount, cannot be known: the records are believed.
        return True
    if read_lease(folder).get("host") in (None, socket.gethostname()):
        return False
    try:
        return time.time() - folder.lease.stat().st_mtime < DEAD_AFTER_S
    except OSError:
        return False


def newest_sweep(storage: Path) -> SweepFolder:
    """The sweep in `storage` that was written to last.

    Raises:
        FolderError: there is none.
    """
    found = [SweepFolder(entry.parent) for entry in storage.glob(f"*/{TABLE}")]
    if not found:
        raise FolderError(f"{storage} holds no sweep: name a folder that `orchestrator run` made")
    return max(found, key=_written_at)


def newest_sweeps(storage: Path, count: int) -> Iterator[SweepResult]:
    """The sweeps in `storage` that were written to last, newest first; what cannot be read is left out."""
    found = [SweepFolder(entry.parent) for entry in storage.glob(f"*/{TABLE}")]
    for folder in sorted(found, key=_written_at, reverse=True)[:count]:
        with contextlib.suppress(FolderError):
            yield read_sweep(folder)[0]


def _written_at(folder: SweepFolder) -> float:
    try:
        return folder.results_json.stat().st_mtime
    except OSError:
        return 0.0


def write_sweep(folder: SweepFolder, sweep: SweepResult) -> None:
    """Write results.json and results.csv."""
    write_atomically(folder.results_json, sweep.model_dump_json(indent=1) + "\n")
    write_atomically(folder.results_csv, results_table(sweep))


def write_result(folder: SweepFolder, result: TrialResult) -> None:
    """Write a trial's result.json; a trial that has ended needs no checkpoint any more, unless others do.

    Raises:
        StorageError: it cannot be written.
    """
    trial = folder.trial(result.trial_id)
    if result.status.is_final:
        # A record that tells of an end must not outlast its curve in a power cut.
        sync(trial.metrics)
    write_atomically(trial.result, result.model_dump_json(indent=1) + "\n")
    if not result.needs_checkpoint:
        if trial.checkpoint_steps():
            # Here alone: it takes as long as a record itself, and a sweep writes thousands.
            sync(trial.root)
        trial.forget_checkpoints()


def at_once(write: Callable[[TrialResult], Answer], results: Iterable[TrialResult]) -> list[Answer]:
    """What `write` answers to each: a write waits for the disk, which takes many that wait side by side in the time of
    a few."""
    with ThreadPoolExecutor(WRITES) as pool:
        return list(pool.map(write, results))


def write_results(folder: SweepFolder, results: Iterable[TrialResult]) -> None:
    """Write many trials' records.

    Raises:
        StorageError: one of them cannot be written.
    """
    at_once(partial(write_result, folder), results)


def results_table(sweep: SweepResult) -> str:
    """The trials as CSV: identity, status, every setting, and the figures that people compare."""
    out = io.StringIO()
    scores = sorted({name for trial in sweep.trials for name in trial.scores})
    rows = [{**_row(trial), **{name: trial.scores.get(name) for name in scores}} for trial in sweep.trials]
    writer = csv.DictWriter(out, fieldnames=list(rows[0]) if rows else ["trial_id"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _row(trial: TrialResult) -> dict[str, Any]:
    best, memory = trial.best, trial.peak_memory
    return {
        "trial_id": trial.trial_id,
        "status": trial.status.value,
        "reason": trial.reason,
        "repeat": trial.repeat,
        **trial.config.model_dump(mode="json"),
        "steps": trial.steps,
        "started_from": trial.started_from.trial_id if trial.started_from else None,
        "started_from_step": trial.started_from.step if trial.started_from else None,
        "tokens": trial.tokens,
        "best_step": best.step if best else None,
        "best_eval_loss": best.eval_loss if best else None,
        "best_loss": best.loss if best else None,
        "last_loss": trial.last.loss if trial.last else None,
        "tokens_per_s": trial.tokens_per_s,
        "step_time_s": trial.step_time_s,
        "trainable_parameters": trial.trainable_parameters,
        "predicted_memory_bytes": memory.predicted_bytes if memory else None,
        "peak_memory_bytes": memory.measured_bytes if memory else None,
        "peak_memory_kind": memory.kind if memory else None,
        "total_s": trial.timing.total_s,
        "mlflow_run_id": trial.mlflow_run_id,
    }
