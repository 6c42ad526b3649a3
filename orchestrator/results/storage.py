"""The sweep folder: every path in it, writing that is never half done, and reading back."""

from __future__ import annotations

import contextlib
import csv
import errno
import glob
import io
import json
import os
import re
import shutil
import socket
import stat
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from filelock import FileLock, Timeout
from pydantic import ValidationError
from pydantic_core import from_json

from orchestrator.errors import FolderError, StorageError, cut
from orchestrator.results.records import MetricPoint, SweepResult, TrialResult, upgrade

Answer = TypeVar("Answer")
_STORAGE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EHOSTDOWN)
LARGEST_BYTES = 2**30
"""Of a file that is read whole; the records of 100,000 trials have less."""
CURVES_END_BYTES = 2**14
"""Some 40 points."""
WRITES = 16
"""Of records at a time: 600 took 0.3 s in place of 2.9 (ext4)."""
DEAD_AFTER_S = 20.0
"""An owner on another host that has not renewed its lease for so long is gone."""
TABLE = "results.json"
TRIALS = "trials"
TUNE = "tune"
CHECKPOINT = "checkpoint-"
"""The step follows."""
_CHECKPOINT = re.compile(rf"\.?{CHECKPOINT}([1-9][0-9]{{0,17}})")
CHECKPOINT_PART = re.compile(r"worker[0-9]+-of-([1-9][0-9]*)\.safetensors")
"""Of how many workers it is one: whoever sees the names alone knows whether a checkpoint is whole."""


def checkpoint_part(rank: int, workers: int) -> str:
    """The file in a checkpoint that holds this worker's state."""
    return f"worker{rank}-of-{workers}.safetensors"


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

    def checkpoint(self, step: int) -> Path:
        """The state of all workers after a step, whole; there while the trial has not ended."""
        return self.root / f"{CHECKPOINT}{step}"

    def partial_checkpoint(self, step: int) -> Path:
        """One that is being written."""
        return self.root / f".{CHECKPOINT}{step}"

    def checkpoint_steps(self) -> list[int]:
        """Of the whole ones, in their order."""
        return sorted(int(name.rpartition("-")[2]) for name in self._checkpoints() if not name.startswith("."))

    def forget_checkpoints(self, but: int | None = None) -> None:
        """Remove them, half written ones too; the one after step `but` stays."""
        for name in self._checkpoints():
            if but is None or name != self.checkpoint(but).name:
                shutil.rmtree(self.root / name, ignore_errors=True)

    def _checkpoints(self) -> list[str]:
        try:
            return [entry.name for entry in os.scandir(self.root) if _CHECKPOINT.fullmatch(entry.name)]
        except (FileNotFoundError, NotADirectoryError):
            return []

    def read_metrics(self) -> tuple[MetricPoint, ...]:
        """The curve so far, none where it cannot be read; a last line that is still being written is left out."""
        with contextlib.suppress(StorageError):
            return self.read_metrics_from(0)[0]
        return ()

    def read_metrics_from(self, offset_bytes: int, last_step: int | None = None) -> tuple[tuple[MetricPoint, ...], int]:
        """The points after `offset_bytes`, and where to read on; from the start where the file began anew.

        last_step: later points are left for another time, and all of them where they cannot be read now.

        Raises:
            StorageError: the disk fails, and the whole curve was asked for.
        """
        try:
            with opened(self.metrics) as file:
                size = file.seek(0, os.SEEK_END)
                end = file.seek(offset_bytes if offset_bytes <= size else 0)
                *lines, _ = file.read().split(b"\n")
        except OSError as error:
            if not is_storage_failure(error):
                # Gone, a folder, a circle of links: `read_trial_results` names it.
                return (), 0
            if last_step is None:
                raise StorageError(f"cannot read {self.metrics} ({error}): mend the disk, or its mount") from error
            return (), offset_bytes
        points = []
        for line in lines:
            with contextlib.suppress(ValidationError):
                point = MetricPoint.model_validate_json(line)
                if last_step is not None and point.step > last_step:
                    break
                points.append(point)
            end += len(line) + 1
        return tuple(points), end

    def last_point(self) -> MetricPoint | None:
        """The newest of the curve; None where there is none. The curve's end alone is read: it may have 100,000."""
        try:
            with opened(self.metrics) as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - CURVES_END_BYTES))
                *lines, _ = file.read().split(b"\n")
        except OSError:
            return None
        for line in reversed(lines):
            with contextlib.suppress(ValidationError):
                return MetricPoint.model_validate_json(line)
        return None

    def began_ms(self) -> int | None:
        """When the first point of the curve was made; None where there is none yet."""
        try:
            with opened(self.metrics) as file:
                return MetricPoint.model_validate_json(file.readline()).time_ms
        except (OSError, ValidationError):
            return None

    def curve_bytes(self, steps: int, after: int = 0) -> int | None:
        """How long metrics.jsonl was after so many steps; None where it does not hold each of them in a line.

        after: the step that the trial began after; its curve holds the later ones alone.
        """
        length = 0
        try:
            with opened(self.metrics) as file:
                for step in range(after + 1, steps + 1):
                    line = file.readline()
                    if not line.endswith(b"\n") or MetricPoint.model_validate_json(line).step != step:
                        return None
                    length += len(line)
        except (OSError, ValidationError):
            return None
        return length


@dataclass(frozen=True, slots=True)
class SweepFolder:
    """STORAGE/NAME; no other module spells a file name in it."""

    root: Path
    remote: str | None = None
    """The address in an object store that `root` is a copy of."""

    @property
    def shown(self) -> str:
        """As the user named it."""
        return self.remote or str(self.root)

    def location(self, path: Path) -> str:
        """A path in the folder as every node finds it: the same path, or an address."""
        return f"{self.remote}/{self.inside(path)}" if self.remote else str(path)

    def holds(self, path: Path) -> bool:
        """Whether something is there, and in this folder, not behind a link that leads out of it."""
        return path.exists() and path.resolve().is_relative_to(self.root.resolve())

    def inside(self, path: Path) -> str:
        """A path as it is named within the folder."""
        return path.relative_to(self.root).as_posix()

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
        return self.root / TABLE

    @property
    def results_csv(self) -> Path:
        """A row a trial."""
        return self.root / "results.csv"

    @property
    def report(self) -> Path:
        """The answer, in one self-contained file."""
        return self.root / "report.html"

    @property
    def comparison(self) -> Path:
        """This sweep beside others, in one self-contained file."""
        return self.root / "comparison.html"

    @property
    def tracking(self) -> Path:
        """How much of the trials MLflow has."""
        return self.root / "tracking.json"

    @property
    def lock(self) -> Path:
        """Held by the run that is at work here."""
        return self.root / ".lock"

    @property
    def lease(self) -> Path:
        """Renewed by the run that is at work here, for other hosts to see."""
        return self.root / ".lease"

    @property
    def tune(self) -> Path:
        """Ray Tune's own state."""
        return self.root / TUNE

    def trial(self, trial_id: str) -> TrialFolder:
        """The folder of one trial."""
        return TrialFolder(self.root / TRIALS / trial_id)

    def trials(self) -> Iterator[TrialFolder]:
        """Every trial's folder, by name."""
        try:
            names = sorted(path.name for path in (self.root / TRIALS).iterdir() if not path.is_file())
        except OSError:
            # None yet, or no folder.
            return
        for name in names:
            yield self.trial(name)


@dataclass(frozen=True, slots=True)
class DamagedRecord:
    """A file that should hold a record and does not."""

    file: Path
    why: str

    def __str__(self) -> str:
        """In one line."""
        return f"{self.file}: {self.why}"


def why_unread(error: Exception) -> str:
    """Why a record cannot be read, in one line: of a wrong value, or the first of them, where it stands."""
    if isinstance(error, OSError) and error.strerror:
        # Whoever tells it names the file.
        return error.strerror
    if not isinstance(error, ValidationError):
        return " ".join(str(error).split())[:200]
    wrong = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in wrong["loc"])
    # Before the words of a check of ours pydantic puts its own.
    why = wrong["msg"].removeprefix("Value error, ")
    return cut(f"{place}: {why}" if place else why)


@contextmanager
def opened(file: Path) -> Iterator[BinaryIO]:
    """The file, open for reading, and nothing that never ends: a pipe, a device, a file of holes.

    Raises:
        OSError: it cannot be opened, is no regular file, or larger than any of ours.
    """
    # To open a pipe would wait for whoever writes to it.
    with open(file, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as stream:
        found = os.fstat(stream.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(file))
        if found.st_size > LARGEST_BYTES:
            raise OSError(errno.EFBIG, f"larger than {LARGEST_BYTES // 2**20:,} MiB", str(file))
        yield stream


def read_record(file: Path) -> bytes:
    """All of a file.

    Raises:
        OSError: as `opened`.
    """
    with opened(file) as stream:
        return stream.read()


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


def is_storage_failure(error: BaseException) -> bool:
    """Whether an error says that the disk is full, read-only or away, and nothing about what was to be written."""
    if isinstance(error, StorageError):
        return True
    if isinstance(error, OSError) and error.errno in _STORAGE_ERRNOS:
        return True
    # Libraries in Rust and C tell it in words alone.
    return any(os.strerror(number) in str(error) for number in _STORAGE_ERRNOS)


def write_atomically(path: Path, text: str) -> None:
    """Replace `path`; a reader sees the old text or the new, never half of one.

    What a writer that was killed has left half written of it goes, and so does what finds no room. Of two that write at
    once, one wins.

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
        try:
            partial.replace(path)
        except FileNotFoundError:
            # Another writer has ended meanwhile, and took this for a half of one that is gone.
            if not path.is_file():
                raise
        for half in path.parent.glob(f".{glob.escape(path.name)}.*"):
            half.unlink(missing_ok=True)
    except OSError as error:
        # Where the folder is away or read-only there is nothing to be removed.
        with contextlib.suppress(OSError):
            partial.unlink()
        raise StorageError(f"cannot write {path} ({error}): free some space there, or make it writable") from error


def require_there(folder: Path) -> None:
    """Refuse to begin anything in the place of a folder that was moved away: brought back, it would lie inside of it.

    Raises:
        StorageError: it is not there, as where its mount has gone away, too.
    """
    if not folder.is_dir():
        raise StorageError(f"{folder} is gone, as where it was moved or its mount went away: bring it back")


def let_read(file: Path) -> None:
    """Give a file the mode that its folder has from the umask: safetensors lets only the owner read its files."""
    # A mount that knows no modes refuses, and is no worse a place for it.
    with contextlib.suppress(OSError):
        file.chmod(file.parent.stat().st_mode & 0o666)


def sync(path: Path) -> None:
    """Let what is in a file, or the names in a folder, outlast a power cut, where there is one that can be synced.

    Raises:
        StorageError: the disk is full, read-only or away.
    """
    try:
        # To open a pipe would wait for whoever writes to it.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        # Not all file systems can sync a folder: they say EINVAL (fsync(2)).
        if is_storage_failure(error):
            raise StorageError(f"cannot write {path} ({error}): mend the disk, or its mount") from error
