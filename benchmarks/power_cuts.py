"""Power cuts at random moments: every process of a sweep ends at once, and what was not synced to its disk is lost.

    lazyfs MOUNT --config-path lazyfs.toml -o allow_other -o modules=subdir -o subdir=FOLDER
    python -m benchmarks.power_cuts MOUNT --faults faults.fifo --done done.fifo --sweeps 2 --cuts 6

The disk is LazyFS's (https://github.com/dsrhaslab/lazyfs, Ramos et al. 2023, When Amnesia Strikes), which keeps what is
written in a cache of its own until it is synced, and forgets the rest when it is told to; `fifo_path` and
`fifo_path_completed` of its configuration are `--faults` and `--done`. Names (a rename, a removal) are on the disk at
once there. After each cut the same command is given again; what is looked at in the end is what `benchmarks/chaos.py`
looks at, and after each cut also that every trial whose end was to be seen before it is there, equal.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import psutil

from benchmarks.aftermath import changed, ended_trials
from benchmarks.chaos import POWER, Chaos, Kill, below_of, find, sweep_keys
from benchmarks.sweeps import describe, machine, say

AFTER_S = 2.0
"""A cut comes within so long after its moment: moments are seen when figures are on the disk, and those are synced."""
LIMIT_S = 30.0


class Dark(Chaos):
    """A sweep whose machine loses its power."""

    faults: Path
    done: Path
    seen = 0
    """Trials whose end was to be seen before a cut, over all cuts."""

    def deliver(self, driver: subprocess.Popen[bytes], below: dict[int, psutil.Process]) -> Kill | None:
        """The next cut, once a trial is at work."""
        if not find("trial", below.values()):
            time.sleep(0.05)
            return None
        time.sleep(self.draw.random() * AFTER_S)
        ended = ended_trials(self.folder)
        processes = [psutil.Process(driver.pid), *below_of(driver.pid)]
        # Stopped first: none is to see another one's end.
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        driver.wait()
        psutil.wait_procs(processes, LIMIT_S)
        forget(self.faults, self.done)
        self.ordeal.wrong += changed(self.folder, ended)
        self.seen += len(ended)
        kill = self.waiting.pop(0)
        say(f"  {kill.what} at {kill.at_step}: {len(ended)} trials had ended")
        self.ordeal.kills.append(kill)
        return kill


def forget(faults: Path, done: Path) -> None:
    """Let the file system lose what was not synced; returns once it has."""
    # Before it is told, or it finds nobody to answer.
    answer = os.open(done, os.O_RDONLY | os.O_NONBLOCK)
    try:
        faults.write_bytes(b"lazyfs::clear-cache\n")
        until_s, heard = time.monotonic() + LIMIT_S, b""
        while b"finished" not in heard:
            if time.monotonic() > until_s:
                raise TimeoutError(f"LazyFS has not answered in {done} after {LIMIT_S:.0f} s")
            with contextlib.suppress(BlockingIOError):
                heard += os.read(answer, 4096)
            time.sleep(0.02)
    finally:
        os.close(answer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mount", type=Path, help="of LazyFS, empty")
    parser.add_argument("--faults", type=Path, required=True, metavar="FIFO")
    parser.add_argument("--done", type=Path, required=True, metavar="FIFO")
    parser.add_argument("--sweeps", type=int, default=2)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--cuts", type=int, default=6, help="in a sweep (default: %(default)s)")
    parser.add_argument("--trials", type=int, default=8, help="of a sweep (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="of a trial (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything found there")
    arguments = parser.parse_args()
    found, ordeals, seen = machine(), [], 0
    say(describe(found))
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.sweeps):
        keys = sweep_keys(arguments.mount / str(seed) / "storage", arguments.trials, arguments.steps, concurrent=2)
        with Path(keys["data"]["train"]).open("rb+") as rows:
            os.fsync(rows)
        draw = random.Random(seed)
        moments = sorted(draw.randrange(1, arguments.trials * arguments.steps) for _ in range(arguments.cuts))
        sweep = Dark(keys, [Kill(POWER, moment) for moment in moments], seed, None)
        sweep.faults, sweep.done = arguments.faults, arguments.done
        ordeal = sweep.run()
        say(f"seed {seed}: {len(ordeal.kills)} cuts, {ordeal.runs} runs: " + ("; ".join(ordeal.wrong) or "all right"))
        ordeals.append(ordeal)
        seen += sweep.seen
    if arguments.json:
        found_all = {"machine": found, "sweeps": [asdict(one) for one in ordeals]}
        arguments.json.write_text(json.dumps(found_all, indent=1) + "\n")
    wrong = [told for one in ordeals for told in one.wrong]
    print(
        f"{sum(len(one.kills) for one in ordeals)} power cuts over {len(ordeals)} sweeps; ends of trials seen before "
        f"them: {seen}; trials that went on from a checkpoint: {sum(one.went_on for one in ordeals)}; found wrong: "
        f"{len(wrong)}",
        *wrong,
        sep="\n",
    )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
