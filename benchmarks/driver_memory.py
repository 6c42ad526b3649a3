"""What the processes of a sweep keep of each trial, over thousands of trials that end at once.

    python -m benchmarks.driver_memory                                 # 10,000 trials
    python -m benchmarks.driver_memory --trials 2000 --json memory.json

One sweep of `benchmarks/instant_trials.py`, which says what is real in it. Resident memory of driver, switchboard,
a slot, and Ray's own GCS and raylet, after so many trials. `benchmarks/scaling.py` has what a whole trial costs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

from benchmarks.scaling import sweep_of
from benchmarks.sweeps import describe, environ, machine, measure_and_tell, say, table

LOOK_S = 0.5
PROCESSES = {
    "switchboard": "::InstantBoard",
    "slot": "::ResourceTrainable",
    "gcs": "/gcs_server",
    "raylet": "/raylet/raylet",
}


def run_all(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The sweep, and a row at each mark."""
    about, trials = machine(), arguments.trials
    say(describe(about))
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n}+1=", "completion": str(n + 1)}) + "\n" for n in range(200)))
    raw = sweep_of(trials, slots=2) | {"storage": str(folder)}
    raw["data"] = {"train": str(rows), "eval": 0.05, "format": "prompt_completion"}
    raw["space"] = {"learning_rate": [round(1e-5 * 1.0005**number, 12) for number in range(trials)]}
    file, log = folder / "sweep.yaml", folder / "log.txt"
    file.write_text(yaml.safe_dump(raw))
    command = [sys.executable, "-m", "benchmarks.instant_trials", "run", str(file)]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environ())
    try:
        found = watch(process, log, sorted({100, *range(1000, trials, 1000), trials}))
        exit_code = process.wait()
    finally:
        process.kill()
    if exit_code:
        raise RuntimeError(f"the sweep ended with exit code {exit_code}: {log.read_text()[-2000:]}")
    return {"machine": about, "trials": trials, "marks": found}


def watch(process: subprocess.Popen[bytes], log: Path, marks: list[int]) -> list[dict[str, float]]:
    """Resident MiB of each process whenever so many trials have ended."""
    found: list[dict[str, float]] = []
    started_s = time.monotonic()
    seen_bytes = ended = 0
    while process.poll() is None and marks:
        with log.open("rb") as output:
            output.seek(seen_bytes)
            text = output.read()
        seen_bytes += len(text)
        ended += text.count(b"  completed  ")
        if ended >= marks[0]:
            found.append({"trials": ended, "seconds": time.monotonic() - started_s, **resident(process.pid)})
            say(str(found[-1]))
            marks = [mark for mark in marks if mark > ended]
        time.sleep(LOOK_S)
    return found


def resident(pid: int) -> dict[str, float]:
    driver = psutil.Process(pid)
    sizes = {"driver": driver.memory_info().rss / 2**20}
    for process in driver.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            command = " ".join(process.cmdline())
            for name, mark in PROCESSES.items():
                if mark in command:
                    sizes[name] = max(sizes.get(name, 0.0), process.memory_info().rss / 2**20)
    return sizes


def render(result: dict[str, Any]) -> str:
    """The table."""
    marks = result["marks"]
    names = ["driver", *PROCESSES]
    rows = [[mark["trials"], mark["seconds"], *(mark.get(name) for name in names)] for mark in marks]
    first, last = marks[0], marks[-1]
    each = (last["driver"] - first["driver"]) / max(1, last["trials"] - first["trials"]) * 1024
    told = f"driver: {each:.1f} KiB a trial from {first['trials']} to {last['trials']} trials"
    header = ["trials ended", "after, s", *(f"{name}, MiB" for name in names)]
    return "\n".join([describe(result["machine"]), "", table(header, rows), "", told])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=10_000, help="of the sweep (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured there")
    measure_and_tell("driver-memory", parser.parse_args(), run_all, render)


if __name__ == "__main__":
    main()
