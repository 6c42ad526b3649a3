"""A sweep's folder and a trial's: every path in them, and what a trial's holds."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from orchestrator.errors import StorageError
from orchestrator.results.files import is_storage_failure, opened
from orchestrator.results.records import MetricPoint

CURVES_END_BYTES = 2**14
"""Some 40 points."""
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

    def points_after(self, step: int) -> tuple[MetricPoint, ...]:
        """The end of the curve, past that step; no more of it is parsed: it may have 100,000."""
        try:
            with opened(self.metrics) as file:
                *lines, _ = file.read().split(b"\n")
        except OSError:
            return ()
        found: list[MetricPoint] = []
        for line in reversed(lines):
            with contextlib.suppress(ValidationError):
                point = MetricPoint.model_validate_json(line)
                if point.step <= step:
                    break
                found.append(point)
        return tuple(reversed(found))

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
