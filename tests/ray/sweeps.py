"""Sweeps as a user runs them: a process of their own, a folder of their own, a real local cluster."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from orchestrator.results.folders import SweepFolder
from orchestrator.results.records import SweepResult, TrialResult
from orchestrator.results.storage import read_sweep

LIMIT_S = 300.0


def _rows_file() -> Path:
    """A small file of prompts and completions: reading the running Python's library would take 10 s a sweep."""
    file = Path(tempfile.mkdtemp(prefix="orchestrator-rows-")) / "rows.jsonl"
    names = ("list", "tuple", "string", "mapping", "number", "file", "socket", "thread", "path", "frame")
    rows = [
        {
            "prompt": f"def {verb}_{name}({name}):\n",
            "completion": f"{verb.title()} the {name} and return it as a {other}.",
        }
        for verb in ("open", "read", "sort", "close", "copy", "send")
        for name in names
        for other in names[:5]
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


BASE: dict[str, Any] = {
    "name": "test",
    "model": "builtin:tiny-llama",
    "data": {"train": str(_rows_file()), "eval": 0.05, "format": "prompt_completion"},
    "trial": {
        "precision": "fp32",
        "learning_rate": 5e-3,
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "sequence_length": 32,
        "max_steps": 6,
        "eval_every": 2,
    },
    # One at a time, unless a test says so: a second slot's actors and imports would double what a sweep takes to start.
    "resources": {"workers_per_trial": 1, "cpus_per_worker": 1, "max_concurrent": 1},
}


@dataclass(frozen=True, slots=True)
class Run:
    """One `orchestrator run` and where its sweep lies."""

    process: subprocess.Popen[str]
    folder: SweepFolder

    def wait(self) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        try:
            out, err = self.process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            out, err = self.process.communicate()
            raise AssertionError(f"the sweep hangs; it said:\n{err}") from None
        return self.process.returncode, out, err

    def sweep(self) -> SweepResult:
        return read_sweep(self.folder)[0]

    def trials(self) -> dict[str, TrialResult]:
        return {trial.trial_id: trial for trial in self.sweep().trials}

    def statuses(self) -> list[str]:
        return [trial.status.value for trial in self.sweep().trials]


def start(storage: Path, *arguments: str, within: Sequence[str] = (), **keys: Any) -> Run:
    """Start a sweep; `trial` and others are merged into BASE key by key, and `within` is a command that runs it."""
    merged = {key: {**BASE.get(key, {}), **value} if isinstance(value, dict) else value for key, value in keys.items()}
    raw = {**BASE, **merged, "storage": str(storage)}
    raw["trial"] = {name: value for name, value in raw["trial"].items() if name not in raw.get("space", {})}
    file = storage / "sweep.yaml"
    storage.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(raw))
    command = [*within, sys.executable, "-m", "orchestrator", "run", str(file), *arguments]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "NO_COLOR": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    _STARTED.append(process)
    return Run(process, SweepFolder(storage / raw["name"]))


_STARTED: list[subprocess.Popen[str]] = []


def end_all() -> None:
    """End what a test that failed has left at work: it would hold the machine for all tests after it."""
    while _STARTED:
        process = _STARTED.pop()
        if process.poll() is None:
            process.terminate()
            try:
                process.communicate(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()


def processes_of(run: Run) -> list[psutil.Process]:
    """Everything below the run: Ray's processes, workers, templates and trials."""
    try:
        return psutil.Process(run.process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def command_of(process: psutil.Process | None) -> str:
    try:
        return " ".join(process.cmdline()) or process.name() if process else ""
    except psutil.Error:
        return ""


def trial_processes(run: Run, trial_id: str | None = None) -> list[psutil.Process]:
    """The forked processes that train, children of a template: all, or those that write one trial's log."""
    found = []
    for process in processes_of(run):
        try:
            parent = process.parent()
            forked = "multiprocessing.forkserver" in command_of(process) and "forkserver" in command_of(parent)
            if forked and (trial_id is None or _writes_in(process, run.folder.trial(trial_id).root)):
                found.append(process)
        except psutil.Error:
            continue
    return found


def _writes_in(process: psutil.Process, folder: Path) -> bool:
    return any(Path(file.path).parent == folder.resolve() for file in process.open_files())
