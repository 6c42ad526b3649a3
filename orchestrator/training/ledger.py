"""What a worker knows of its trial so far: steps, times, memory, the best evaluation; told even if the trial fails."""

from __future__ import annotations

import bisect
import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TextIO

import torch

from orchestrator.errors import StorageError
from orchestrator.results.records import MetricPoint
from orchestrator.training import device as devices
from orchestrator.training.task import START_LIMIT_S, TrialProgress

WARM_UP_STEPS = 2
"""Left out of speeds: the first steps allocate, compile and autotune."""
SIGN_OF_LIFE_S = 5.0
"""How often a worker that saves shows that it lives."""
Phase = Literal["data", "model", "training", "evaluation", "saving"]


@dataclass(slots=True)
class Speed:
    """Step times without the warm-up."""

    warm_up_steps: int
    sorted_s: list[float] = field(default_factory=list)
    total_s: float = 0.0
    tokens: int = 0
    steps: int = 0

    def add(self, step_s: float, tokens: int) -> None:
        """Count one optimizer step of all workers."""
        self.steps += 1
        if self.steps <= self.warm_up_steps:
            return
        bisect.insort(self.sorted_s, step_s)
        self.total_s += step_s
        self.tokens += tokens

    @property
    def tokens_per_s(self) -> float | None:
        """Mean over the counted steps."""
        return self.tokens / self.total_s if self.total_s > 0 else None

    @property
    def step_time_s(self) -> float | None:
        """Median of the counted steps."""
        # Asked for at every step: statistics.median would sort them all again.
        middle = len(self.sorted_s) // 2
        return (self.sorted_s[middle] + self.sorted_s[~middle]) / 2 if self.sorted_s else None


class Ledger:
    """One worker's record of one trial."""

    def __init__(self, device: torch.device, startup_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.device, self.startup_s, self._clock = device, startup_s, clock
        self.seconds: dict[Phase, float] = dict.fromkeys(("data", "model", "training", "evaluation", "saving"), 0.0)
        self.speed = Speed(WARM_UP_STEPS)
        self.step = 0
        self.overflows = 0
        """Steps in a row, up to now, whose gradients overflowed."""
        self.tokens = 0
        self.last: MetricPoint | None = None
        self.best: MetricPoint | None = None
        self.trainable_parameters = 0
        self.peak_bytes = 0
        self.reserved_bytes: int | None = None
        self.has_adapter = False
        self.alive: Callable[[], None] = lambda: None
        """Told at every micro-batch, and while something is saved."""
        self.went_on_from: int | None = None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, as plain values."""
        return {
            "seconds": self.seconds,
            "speed": asdict(self.speed),
            "tokens": self.tokens,
            "last": self.last and self.last.model_dump(),
            "best": self.best and self.best.model_dump(),
            "peak_bytes": self.peak_bytes,
            "reserved_bytes": self.reserved_bytes,
            "has_adapter": self.has_adapter,
        }

    def go_on(self, step: int, state: Mapping[str, Any]) -> None:
        """Count on from a checkpoint after `step`; what this process took to get here counts too."""
        for phase, seconds in state["seconds"].items():
            self.seconds[phase] += seconds
        self.speed = Speed(**state["speed"])
        self.step, self.tokens, self.went_on_from = step, state["tokens"], step
        self.last = state["last"] and MetricPoint.model_validate(state["last"])
        self.best = state["best"] and MetricPoint.model_validate(state["best"])
        self.peak_bytes, self.reserved_bytes = state["peak_bytes"], state["reserved_bytes"]
        self.has_adapter = state["has_adapter"]

    def begin_after(self, step: int, state: Mapping[str, Any]) -> None:
        """Begin with another trial's checkpoint after `step`: its tokens count, its time and best are its own."""
        self.step, self.tokens = step, state["tokens"]

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """The phase in which a large model is gathered and written for longer than silence is allowed: signs of life,
        for as long as a start may take. Every worker must be in it until the slowest has done."""
        done, until_s = threading.Event(), time.monotonic() + START_LIMIT_S

        def tell() -> None:
            while not done.wait(SIGN_OF_LIFE_S) and time.monotonic() < until_s:
                self.alive()

        teller = threading.Thread(target=tell, daemon=True)
        teller.start()
        try:
            with self.phase("saving"):
                yield
        finally:
            # What it tells goes through the pipe that the worker's own reports take: not both at once.
            done.set()
            teller.join()

    @contextlib.contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Book the time inside, whether or not it ends well."""
        started = self._clock()
        try:
            yield
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        finally:
            self.seconds[name] += self._clock() - started

    def progress(self) -> TrialProgress:
        """All of it as plain values."""
        own = devices.peak(self.device)
        return TrialProgress(
            last=self.last,
            best=self.best,
            trainable_parameters=self.trainable_parameters,
            startup_s=self.startup_s,
            data_s=self.seconds["data"],
            model_s=self.seconds["model"],
            training_s=self.seconds["training"],
            evaluation_s=self.seconds["evaluation"],
            saving_s=self.seconds["saving"],
            peak_memory_bytes=max(self.peak_bytes, own.held_bytes),
            reserved_bytes=own.reserved_bytes and max(self.reserved_bytes or 0, own.reserved_bytes),
            memory_kind="cuda_allocated" if self.device.type == "cuda" else "resident",
            device=devices.describe(self.device),
            host=socket.gethostname(),
            has_adapter=self.has_adapter,
            went_on_from=self.went_on_from,
        )


def open_metrics(file: Path, kept_bytes: int = 0) -> TextIO:
    """The curve, cut back to its first bytes; every line is in the file when `write` returns.

    In a new file each time: an attempt that was given up for dead, as where its node has lost the head and not the
    storage, may go on for a minute, and writes to the one that it has.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.new")
    partial.write_bytes(file.read_bytes()[:kept_bytes] if kept_bytes else b"")
    metrics = partial.open("a", encoding="utf-8", buffering=1)
    os.fsync(metrics.fileno())
    partial.replace(file)
    return metrics


def require_own(metrics: TextIO, file: Path) -> None:
    """Refuse to go on beside another attempt of the trial.

    Raises:
        StorageError: the curve is another's by now.
    """
    try:
        is_own = os.path.samestat(os.fstat(metrics.fileno()), file.stat())
    except FileNotFoundError:
        is_own = False
    if not is_own:
        raise StorageError(f"{file.name} is this attempt's no more: another goes on with the trial, or it was removed")


def process_age_s() -> float:
    """Seconds since this process was started or forked: its imports are in it."""
    try:
        # Field 22 of proc(5), counted behind the name, which may hold spaces.
        started_ticks = int(Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
        up_s = float(Path("/proc/uptime").read_text(encoding="utf-8").split()[0])
        return up_s - started_ticks / os.sysconf("SC_CLK_TCK")
    except OSError:
        return 0.0
