"""The sweep folder: every path in it, writing that is never half done, and reading back."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import ValidationError
from pydantic_core import from_json

from orchestrator.errors import FolderError, StorageError
from orchestrator.results.records import MetricPoint, SweepResult, TrialResult, upgrade


@dataclass(frozen=True, slots=True)
class TrialFolder:
    """STORAGE/NAME/trials/TRIAL_ID."""

    root: Path

    @property
    def result(self) -> Path:
        """TrialResult; written by the sweep process alone."""
        return self.root / "result.json"

    @property
    def metrics(self) -> Path:
        """A MetricPoint a line; written by worker 0 alone, as all below."""
        return self.root / "metrics.jsonl"

    @property
    def deepspeed(self) -> Path:
        """The configuration that DeepSpeed was given."""
        return self.root / "deepspeed.json"

    @property
    def adapter(self) -> Path:
        """The PEFT adapter of the best evaluation; the whole model where all weights are trained."""
        return self.root / "adapter"

    @property
    def evaluation(self) -> Path:
        """What its best adapter wrote and scored; written by the sweep process."""
        return self.root / "evaluation.json"

    @property
    def log(self) -> Path:
        """What the trial's process printed."""
        return self.root / "log.txt"

    def worker_log(self, rank: int) -> Path:
        """Worker 0 has log.txt; the others have files of their own beside it."""
        return self.log if rank == 0 else self.root / f"log-worker{rank}.txt"

    def read_metrics(self) -> tuple[MetricPoint, ...]:
        """The curve so far; a last line that is still being written is left out."""
        return self.read_metrics_from(0)[0]

    def read_metrics_from(self, offset_bytes: int) -> tuple[tuple[MetricPoint, ...], int]:
        """The points after `offset_bytes`, and where to read on; from the start where the file began anew."""
        try:
            with self.metrics.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                start = file.seek(offset_bytes if offset_bytes <= size else 0)
                whole, newline, _ = file.read().rpartition(b"\n")
        except (FileNotFoundError, IsADirectoryError):
            return (), 0
        points = []
        for line in whole.splitlines():
            try:
                points.append(MetricPoint.model_validate_json(line))
            except ValidationError:
                continue
        return tuple(points), start + len(whole) + len(newline)


@dataclass(frozen=True, slots=True)
class SweepFolder:
    """STORAGE/NAME; no other module spells a file name in it."""

    root: Path

    @property
    def sweep_file(self) -> Path:
        """The sweep as it was run, all defaults filled in."""
        return self.root / "sweep.yaml"

    @property
    def plan(self) -> Path:
        """SweepPlan."""
        return self.root / "plan.json"

    @property
    def data(self) -> Path:
        """The tokenised data, shared by all trials."""
        return self.root / "data"

    @property
    def results_json(self) -> Path:
        """SweepResult."""
        return self.root / "results.json"

    @property
    def results_csv(self) -> Path:
        """A row a trial."""
        return self.root / "results.csv"

    @property
    def report(self) -> Path:
        """The answer, in one self-contained file."""
        return self.root / "report.html"

    @property
    def lock(self) -> Path:
        """Held by the run that is at work here."""
        return self.root / ".lock"

    @property
    def tune(self) -> Path:
        """Ray Tune's own state."""
        return self.root / "tune"

    def trial(self, trial_id: str) -> TrialFolder:
        """The folder of one trial."""
        return TrialFolder(self.root / "trials" / trial_id)

    def trials(self) -> Iterator[TrialFolder]:
        """Every trial's folder, by name."""
        try:
            names = sorted(entry.name for entry in os.scandir(self.root / "trials") if not entry.is_file())
        except (FileNotFoundError, NotADirectoryError):
            return
        for name in names:
            yield self.trial(name)


@dataclass(frozen=True, slots=True)
class DamagedRecord:
    """A file that should hold a record and does not."""

    file: Path
    why: str


def read_trial_results(folder: SweepFolder) -> tuple[dict[str, TrialResult], tuple[DamagedRecord, ...]]:
    """Every trial's record from its own file; damaged ones are named, never skipped in silence."""
    results: dict[str, TrialResult] = {}
    damaged = []
    for trial in folder.trials():
        try:
            record = TrialResult.model_validate(upgrade(from_json(trial.result.read_bytes())))
            if record.trial_id != trial.root.name:
                raise ValueError(f"it is the record of trial {record.trial_id}")
            results[trial.root.name] = record
            if trial.metrics.is_dir():
                damaged.append(DamagedRecord(trial.metrics, "a folder: the curve is lost"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError) as error:
            damaged.append(DamagedRecord(trial.result, str(error)))
    return results, tuple(damaged)


def read_sweep(folder: SweepFolder) -> tuple[SweepResult, tuple[DamagedRecord, ...]]:
    """The sweep with every trial as its own file has it, running or ended.

    Raises:
        FolderError: the folder holds no sweep.
    """
    try:
        sweep = SweepResult.model_validate(upgrade(from_json(folder.results_json.read_bytes())))
    except FileNotFoundError as error:
        raise FolderError(f"{folder.root} holds no sweep: name a folder that `orchestrator run` made") from error
    except (OSError, ValueError, RecursionError) as error:
        why = " ".join(str(error).split())[:200]
        raise FolderError(f"{folder.results_json} cannot be read ({why}): run the sweep again to rebuild it") from error
    results, damaged = read_trial_results(folder)
    trials = tuple(results.get(trial.trial_id, trial) for trial in sweep.trials)
    return sweep.model_copy(update={"trials": trials}), damaged


def is_at_work(folder: SweepFolder) -> bool:
    """Whether a run holds the folder's lock; a dead owner's is free at once, since the kernel holds it."""
    if not folder.lock.exists():
        return False
    try:
        with FileLock(folder.lock, timeout=0):
            return False
    except (Timeout, OSError):
        # What cannot be locked, as on a read-only mount, cannot be known: the records are believed.
        return True


def newest_sweep(storage: Path) -> SweepFolder:
    """The sweep in `storage` that was written to last.

    Raises:
        FolderError: there is none.
    """
    found = [SweepFolder(entry.parent) for entry in storage.glob("*/results.json")]
    if not found:
        raise FolderError(f"{storage} holds no sweep: name a folder that `orchestrator run` made")
    return max(found, key=lambda folder: folder.results_json.stat().st_mtime)


def write_sweep(folder: SweepFolder, sweep: SweepResult) -> None:
    """Write results.json and results.csv."""
    write_atomically(folder.results_json, sweep.model_dump_json(indent=1) + "\n")
    write_atomically(folder.results_csv, results_table(sweep))


def write_result(folder: SweepFolder, result: TrialResult) -> None:
    """Write a trial's result.json."""
    write_atomically(folder.trial(result.trial_id).result, result.model_dump_json(indent=1) + "\n")


def results_table(sweep: SweepResult) -> str:
    """The trials as CSV: identity, status, every setting, and the figures that people compare."""
    out = io.StringIO()
    rows = [_row(trial) for trial in sweep.trials]
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


def write_atomically(path: Path, text: str) -> None:
    """Replace `path`; a reader sees the old text or the new, never half of one.

    Raises:
        StorageError: the file cannot be written.
    """
    # In the same folder, since a rename across file systems is a copy.
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise StorageError(
            f"cannot write {path} ({error}): free some space there, or name another --storage"
        ) from error
