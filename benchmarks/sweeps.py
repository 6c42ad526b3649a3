"""What the benchmarks share: sweeps as a user runs them, when their trials worked, and the machine they ran on."""

from __future__ import annotations

import argparse
import heapq
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from orchestrator.results.folders import SweepFolder, TrialFolder
from orchestrator.results.provenance import git_state, versions
from orchestrator.results.records import SweepResult, TrialResult
from orchestrator.results.storage import read_sweep

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Work:
    """When a trial worked, by its own clock: from reading its data to its last evaluation; start-up is not in it."""

    trial_id: str
    started: float
    """Seconds since 1970."""
    ended: float

    @property
    def seconds(self) -> float:
        return self.ended - self.started


@dataclass(frozen=True, slots=True)
class Ran:
    """A sweep that ended."""

    folder: SweepFolder
    sweep: SweepResult
    command_s: float
    """The whole command, from its start to its exit."""

    @property
    def launched(self) -> float:
        """When the sweep had its cluster, plan and data; seconds since 1970."""
        assert self.sweep.started_ms is not None
        return self.sweep.started_ms / 1000

    def works(self) -> list[Work]:
        return [work_of(self.folder.trial(t.trial_id), t.timing.data_s + t.timing.model_s) for t in self.sweep.trials]


def run_sweep(
    storage: Path,
    raw: Mapping[str, Any],
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    watch: Callable[[subprocess.Popen[str]], None] = lambda _: None,
) -> Ran:
    """Run `orchestrator run` on this sweep; `watch` is called with its process while it runs, and waits for its end.

    Raises:
        RuntimeError: it did not end well, or one of its trials did not.
    """
    storage.mkdir(parents=True, exist_ok=True)
    file = storage / f"{raw['name']}.yaml"
    file.write_text(yaml.safe_dump({**raw, "storage": str(storage)}), encoding="utf-8")
    command = [sys.executable, "-m", "orchestrator", "run", str(file), *arguments]
    log = storage / f"{raw['name']}.log"
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, text=True, env={**environ(), **(environment or {})}
        )
        try:
            watch(process)
            exit_code = process.wait()
        finally:
            process.terminate()
    command_s = time.monotonic() - started
    if exit_code:
        raise RuntimeError(f"the sweep ended with exit code {exit_code}; it said:\n{log.read_text()[-3000:]}")
    folder = SweepFolder(storage / str(raw["name"]))
    return Ran(folder, read_sweep(folder)[0], command_s)


def environ() -> dict[str, str]:
    """For every process that is measured: CPUs alone, and this checkout."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "NO_COLOR": "1", "RAY_AUTH_MODE": "disabled"}


def work_of(trial: TrialFolder, setup_s: float) -> Work:
    """By the trial's curve: the clock after step 1, less what was done till then; its last line follows all work.

    `setup_s` are its seconds for data and model.
    """
    first = trial.read_metrics()[0]
    return Work(trial.root.name, first.time_ms / 1000 - first.seconds - setup_s, trial.metrics.stat().st_mtime)


def startups(works: Iterable[Work], slots: int, launched: float) -> tuple[list[float], list[float]]:
    """Seconds that a slot stood idle before each trial: those before a slot's first trial, and all others.

    Trials take the slot that fell free first, so no variant has to say which slot a trial had.
    """
    free = [launched] * slots
    gaps = []
    for work in sorted(works, key=lambda work: work.started):
        gaps.append(work.started - heapq.heappop(free))
        heapq.heappush(free, work.ended)
    return gaps[:slots], gaps[slots:]


def losses(folder: TrialFolder) -> tuple[float | None, ...]:
    """Of every step."""
    return tuple(point.loss for point in folder.read_metrics())


def best_loss(trials: Iterable[TrialResult]) -> float:
    """The lowest evaluation loss of all; infinite where none was evaluated, as of a trial that diverged."""
    found = [t.best.eval_loss for t in trials if t.best and t.best.eval_loss is not None]
    return min(found, default=math.inf)


def median(values: Iterable[float]) -> float | None:
    """None where there is nothing to take it of."""
    values = list(values)
    return statistics.median(values) if values else None


def machine() -> dict[str, Any]:
    """What a table of timings must say of where it was made."""
    cpu = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    git = git_state(ROOT)
    return {
        "cpu": cpu[1] if cpu else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": versions(),
        "commit": git.commit + ("+" if git.dirty else "") if git else None,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def describe(machine: Mapping[str, Any]) -> str:
    """One line of it."""
    return (
        f"{machine['cores']} cores ({machine['cpu']}), {machine['memory_gib']} GiB, Python {machine['python']}, "
        f"load before {machine['load_before']:.2f}"
    )


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [list(header), ["---", *["---:"] * (len(header) - 1)], *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"


def say(text: str) -> None:
    """On stderr: stdout is for the result."""
    print(text, file=sys.stderr, flush=True)


def measure_and_tell(
    name: str,
    arguments: argparse.Namespace,
    run_all: Callable[[argparse.Namespace, Path], dict[str, Any]],
    render: Callable[[dict[str, Any]], str],
) -> dict[str, Any]:
    """Measure in a folder of its own, write the JSON where `--json` asks for it, print the table."""
    with tempfile.TemporaryDirectory(prefix=f"{name}-") as folder:
        result = run_all(arguments, Path(folder))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(render(result))
    return result
