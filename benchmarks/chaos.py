"""Kills at random moments, and what was lost by them: nothing, or the script says what and ends with exit code 1.

    python -m benchmarks.chaos                              # 4 sweeps with 24 kills each, one that loses nodes
    python -m benchmarks.chaos --sweeps 1 --first-seed 100 --lost-nodes 0 --json chaos.json

Each sweep trains builtin:tiny-llama with dropout, two trials at a time, on a real local Ray cluster, with a real MLflow
server where one is to be killed. Its seed draws what is killed and when (after how many of all training steps). After a
kill that ends the driver, or where the sweep says so, the same command is given again, until the sweep ends. One more
sweep runs on two nodes and loses one, again and again. Then (benchmarks/aftermath.py):

- every trial that had ended is there, equal, with the same curve: none was run twice;
- every trial is `completed`, but for those whose own process was killed twice, which say why;
- every curve has each step once and equals, bit for bit, that of the same trial run in a plain process without Ray;
- MLflow has one parent, one run a trial, and the points on disk, none twice and none missing;
- no process, shared-memory segment, lock, lease, checkpoint or half-written file is left, and the folder can be taken.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from benchmarks.aftermath import Ended, changed, ended_trials, left_on, trials_of, wrong_in
from benchmarks.sweeps import describe, environ, machine, measure_and_tell, say, table
from orchestrator.results.folders import SweepFolder
from tests.ray.clusters import joined_node, started_head
from tests.tracking_servers import FragileServer

STANDSTILL_LIMIT_S = 240.0
"""A sweep of which no file of figures changes for so long hangs."""
END_LIMIT_S = 120.0
GONE_LIMIT_S = 40.0
SIGNALS = {"driver SIGKILL": signal.SIGKILL, "driver SIGTERM": signal.SIGTERM, "driver SIGINT": signal.SIGINT}
POWER = "power"
EXIT_CODES = {
    "driver SIGKILL": -9,
    "driver SIGTERM": 130,
    "driver SIGINT": 130,
    "switchboard": 3,
    "groups": 3,
    POWER: -9,  # benchmarks/power_cuts.py
}
"""Of kills that end the driver; that of a lost raylet is Ray's."""
ACTORS = {
    "worker": "RayTrainWorker",
    # `tune.with_resources` makes a class of its own around ours, and Ray names the process by it (2.60.0).
    "slot": "ResourceTrainable",
    "controller": "TrainController",
    "switchboard": "Switchboard",
    "groups": "WorkerGroups",
}
SERVER, NODE = "MLflow server", "node"
# How often each is drawn: what ends the driver takes half a minute to come back, a trial's process none.
KINDS = {
    "trial": 8,
    "template": 5,
    "worker": 4,
    "slot": 3,
    "controller": 1,
    "switchboard": 1,
    "groups": 1,
    "raylet": 1,
    **dict.fromkeys(SIGNALS, 1),
    SERVER: 2,
}
ENDS_DRIVER = (*EXIT_CODES, "raylet")


@dataclass(frozen=True, slots=True)
class Kill:
    """What to kill, and once how many steps of all trials are on disk."""

    what: str
    at_step: int


@dataclass(frozen=True, slots=True)
class DriverEnd:
    """After a kill that ends the driver: when it had ended, and when the last process below it had."""

    what: str
    exit_s: float
    gone_s: float


@dataclass(slots=True)
class Ordeal:
    """One sweep, what it went through, and what was found wrong afterwards."""

    seed: int
    kills: list[Kill]
    """Those that met something to kill."""
    runs: int = 0
    went_on: int = 0
    """Times that a trial went on from a checkpoint."""
    ends: list[DriverEnd] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def sweep_keys(storage: Path, trials: int, steps: int, concurrent: int = 1) -> dict[str, Any]:
    """The sweep file, with its data beside it; four ranks at most, the rest are repeats."""
    storage.mkdir(parents=True, exist_ok=True)
    data = storage / "rows.jsonl"
    rows = [f"row {n}: " + " ".join(f"{word} {n * (word + 3) % 97}" for word in range(n % 19 + 3)) for n in range(240)]
    data.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    ranks = [2 ** (n + 1) for n in range(min(trials, 4))]
    return {
        "name": "chaos",
        "model": "builtin:tiny-llama",
        "data": {"train": str(data), "eval": 0.05},
        "trial": {
            "precision": "fp32",
            "lora_dropout": 0.1,
            "learning_rate": 5e-3,
            "global_batch_size": 4,
            "micro_batch_size": 2,
            "sequence_length": 32,
            "max_steps": steps,
            "eval_every": max(1, steps // 10),
        },
        "space": {"rank": ranks},
        "search": {"repeats": trials // len(ranks)},
        "resources": {"workers_per_trial": 1, "cpus_per_worker": 1, "max_concurrent": concurrent},
        "storage": str(storage),
    }


def trials_in(keys: dict[str, Any]) -> int:
    return len(keys["space"]["rank"]) * int(keys["search"]["repeats"])


def drawn_kills(seed: int, count: int, all_steps: int) -> list[Kill]:
    """By the seed alone; in the order of their moments."""
    draw = random.Random(seed)
    moments = sorted(draw.randrange(1, all_steps) for _ in range(count))
    return [
        Kill(what, moment)
        for what, moment in zip(draw.choices([*KINDS], [*KINDS.values()], k=count), moments, strict=True)
    ]


def endure(keys: dict[str, Any], kills: Sequence[Kill], seed: int) -> Ordeal:
    """Run the sweep to its end through the kills, and look at what is left."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(_server(keys)) if any(kill.what == SERVER for kill in kills) else None
        return Chaos(keys, kills, seed, server).run()


@contextlib.contextmanager
def _server(keys: dict[str, Any]) -> Iterator[FragileServer]:
    folder = Path(keys["storage"]) / "mlflow-server"
    folder.mkdir()
    server = FragileServer(folder)
    server.start()
    try:
        yield server
    finally:
        server.kill()


class Chaos:
    """A sweep that is killed in."""

    def __init__(self, keys: dict[str, Any], kills: Sequence[Kill], seed: int, server: FragileServer | None) -> None:
        self.server, self.ordeal = server, Ordeal(seed, [])
        self.keys = {**keys, "tracking": {"uri": server.uri}} if server else keys
        self.folder = SweepFolder(Path(keys["storage"]) / keys["name"])
        self.waiting, self.draw = list(kills), random.Random(seed)
        self.runs_at_most = 2 + sum(kill.what in (*ENDS_DRIVER, SERVER) for kill in kills)

    def run(self) -> Ordeal:
        ended: dict[str, Ended] = {}
        while True:
            driver, log = start(self.keys, self.ordeal)
            try:
                below, exit_code, was_ended = self._live_through(driver)
            finally:
                driver.kill()
            self.ordeal.wrong += left_by(below)
            self.ordeal.wrong += changed(self.folder, ended)
            ended |= ended_trials(self.folder)
            is_over = (
                exit_code in (0, 1) and not was_ended and all(trial.status.is_final for trial in trials_of(self.folder))
            )
            if is_over and "MLflow did not take everything" not in log.read_text():
                break
            if self.ordeal.runs > self.runs_at_most:
                self.ordeal.wrong.append(f"run {self.ordeal.runs} ended with exit code {exit_code}: {_end_of(log)}")
                return self.ordeal
        return judged(self.ordeal, self.folder, self.keys)

    def _live_through(self, driver: subprocess.Popen[bytes]) -> tuple[dict[int, psutil.Process], int, bool]:
        """Deliver the kills until the driver has ended.

        Returns every process that was below it, its exit code, and whether a kill had ended it.
        """
        below: dict[int, psutil.Process] = {}
        segments: set[str] = set()
        seen, seen_s = -1, time.monotonic()
        killed: Kill | None = None
        while driver.poll() is None:
            steps = steps_on_disk(self.folder)
            if steps != seen:
                seen, seen_s = steps, time.monotonic()
            if time.monotonic() > seen_s + STANDSTILL_LIMIT_S:
                self.ordeal.wrong.append(f"run {self.ordeal.runs} stood still for {STANDSTILL_LIMIT_S:.0f} s")
                driver.kill()
                break
            below |= {process.pid: process for process in below_of(driver.pid)}
            if not self.waiting or steps < self.waiting[0].at_step:
                time.sleep(0.1)
                continue
            segments |= _segments(below.values())
            killed = self.deliver(driver, below) or killed
            if killed and killed.what in ENDS_DRIVER:
                self._await_end(driver, killed, below)
        exit_code, was_ended = driver.wait(), killed is not None and killed.what in ENDS_DRIVER
        if exit_code not in (0, 1) and not was_ended:
            self.ordeal.wrong.append(f"run {self.ordeal.runs} ended with {exit_code}, and nothing had ended it")
        self.ordeal.wrong += [f"shared-memory segment {name} is left" for name in segments if Path(name).exists()]
        return below, exit_code, was_ended

    def deliver(self, driver: subprocess.Popen[bytes], below: dict[int, psutil.Process]) -> Kill | None:
        """The next kill, where its victim is there."""
        kill = self.waiting[0]
        if kill.what in (*ENDS_DRIVER, SERVER) and not find("trial", below.values()):
            # A run that has not begun yet ends otherwise: nothing was started.
            time.sleep(0.05)
            return None
        if kill.what in SIGNALS:
            driver.send_signal(SIGNALS[kill.what])
        elif kill.what == SERVER:
            assert self.server
            self.server.kill()
            # Waited for, the rest of a quick sweep would pass meanwhile, and with it the kills that are to come.
            self.server.launch()
        elif victims := find(kill.what, below.values()):
            with contextlib.suppress(psutil.NoSuchProcess):
                self.draw.choice(victims).kill()
        else:
            time.sleep(0.05)
            return None
        say(f"  {kill.what} at {kill.at_step}")
        self.waiting.pop(0)
        self.ordeal.kills.append(kill)
        return kill

    def _await_end(self, driver: subprocess.Popen[bytes], kill: Kill, below: dict[int, psutil.Process]) -> None:
        started_s = time.monotonic()
        try:
            exit_code = driver.wait(END_LIMIT_S)
        except subprocess.TimeoutExpired:
            self.ordeal.wrong.append(f"{kill.what}: the driver had not ended after {END_LIMIT_S:.0f} s")
            driver.kill()
            return
        exit_s = time.monotonic() - started_s
        psutil.wait_procs(_ours(below), GONE_LIMIT_S)
        self.ordeal.ends.append(DriverEnd(kill.what, exit_s, time.monotonic() - started_s))
        if exit_code != EXIT_CODES.get(kill.what, exit_code) or exit_code == 0:
            self.ordeal.wrong.append(f"{kill.what}: exit code {exit_code}, not {EXIT_CODES.get(kill.what)}")


def endure_lost_nodes(keys: dict[str, Any], moments: Sequence[int], seed: int) -> Ordeal:
    """Run the sweep on a cluster of two nodes, a trial on each; at each moment take one away, and give another."""
    ordeal = Ordeal(seed, [])
    keys = {**keys, "resources": {"workers_per_trial": 1, "cpus_per_worker": 2, "max_concurrent": 2}}
    folder = SweepFolder(Path(keys["storage"]) / keys["name"])
    with started_head({"RAY_AUTH_MODE": "disabled"}) as head, contextlib.ExitStack() as node:
        node.enter_context(joined_node(head))
        driver, log = start(keys, ordeal, "--address", head.address)
        for at_step in sorted(moments):
            while driver.poll() is None and steps_on_disk(folder) < at_step:
                time.sleep(0.2)
            if driver.poll() is not None:
                break
            ordeal.kills.append(Kill(NODE, at_step))
            say(f"  {NODE} at {at_step}")
            node.close()
            node.enter_context(joined_node(head))
        try:
            if exit_code := driver.wait(STANDSTILL_LIMIT_S):
                ordeal.wrong.append(f"the driver ended with exit code {exit_code}: {_end_of(log)}")
        except subprocess.TimeoutExpired:
            ordeal.wrong.append(f"the sweep had not ended {STANDSTILL_LIMIT_S:.0f} s after its node was lost")
            driver.kill()
        ordeal.wrong += left_on(head.address)
        ours = [one for one in below_of(psutil.Process().pid) if "RayTrainWorker" in _command(one)]
        ordeal.wrong += left_by({process.pid: process for process in ours})
    return judged(ordeal, folder, keys)


def start(keys: dict[str, Any], ordeal: Ordeal, *arguments: str) -> tuple[subprocess.Popen[bytes], Path]:
    ordeal.runs += 1
    storage = Path(keys["storage"])
    file, log = storage / "chaos.yaml", storage / f"run{ordeal.runs}.log"
    file.write_text(yaml.safe_dump(keys), encoding="utf-8")
    command = [sys.executable, "-m", "orchestrator", "run", str(file), *arguments]
    with log.open("w", encoding="utf-8") as output:
        return subprocess.Popen(command, stdout=output, stderr=output, env=environ()), log


def _end_of(log: Path) -> str:
    return " | ".join(log.read_text(errors="replace").strip().splitlines()[-5:])


def judged(ordeal: Ordeal, folder: SweepFolder, keys: dict[str, Any]) -> Ordeal:
    """After the sweep's end: what is wrong with what it left."""
    # Of one trial the second such kill is the last.
    may_fail = sum(kill.what in ("trial", "template") for kill in ordeal.kills) // 2
    uri = keys.get("tracking", {}).get("uri") or f"sqlite:///{folder.root.parent / 'mlflow.db'}"
    ordeal.wrong += wrong_in(folder, trials_in(keys), may_fail, keys["resources"]["cpus_per_worker"], uri)
    ordeal.went_on = sum(note.startswith("went on") for trial in trials_of(folder) for note in trial.notes)
    return ordeal


def below_of(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()) or process.name()
    except psutil.Error:
        return ""


def find(what: str, processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """The living processes of this kind."""
    commands = {process: _command(process) for process in processes}
    if what in ACTORS:
        return [process for process, command in commands.items() if f"::{ACTORS[what]}" in command]
    if what == "raylet":
        return [process for process, command in commands.items() if command.partition(" ")[0].endswith("/raylet")]
    found = []
    for process in [process for process, command in commands.items() if "multiprocessing.forkserver" in command]:
        with contextlib.suppress(psutil.Error):
            parent = process.parent()
            forked = parent is not None and "multiprocessing.forkserver" in _command(parent)
            if what == ("trial" if forked else "template"):
                found.append(process)
    return found


def _segments(processes: Iterable[psutil.Process]) -> set[str]:
    """Files in /dev/shm that they have mapped."""
    found = set()
    for process in processes:
        try:
            maps = Path(f"/proc/{process.pid}/maps").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        found |= {line.partition("/dev/shm")[1] + line.partition("/dev/shm")[2] for line in maps.splitlines()}
    return {name for name in found if name and not name.endswith("(deleted)")}


def steps_on_disk(folder: SweepFolder) -> int:
    """Of all trials."""
    steps = 0
    for trial in folder.trials():
        with contextlib.suppress(OSError):
            steps += trial.metrics.read_bytes().count(b"\n")
    return steps


def _ours(below: dict[int, psutil.Process]) -> list[psutil.Process]:
    # Ray's own two agents outlive a raylet that was killed with its driver (ray 2.60.0); they hold nothing of ours.
    return [process for process in below.values() if "Agent" not in _command(process)]


def left_by(below: dict[int, psutil.Process]) -> list[str]:
    """Of a run that has ended: processes that have not."""
    left = psutil.wait_procs(_ours(below), GONE_LIMIT_S)[1]
    return [f"process {process.pid} is left: {_command(process)[:80]}" for process in left]


def run_all(arguments: argparse.Namespace, storage: Path) -> dict[str, Any]:
    """Every sweep's ordeal."""
    found = machine()
    ordeals: list[dict[str, Any]] = []
    trials, steps = arguments.trials, arguments.steps
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.sweeps + arguments.lost_nodes):
        started_s = time.monotonic()
        keys = sweep_keys(storage / str(seed), trials, steps, concurrent=2)
        say(f"seed {seed}")
        if seed < arguments.first_seed + arguments.sweeps:
            ordeal = endure(keys, drawn_kills(seed, arguments.kills, trials * steps), seed)
        else:
            moments = random.Random(seed).sample(range(1, trials * steps // 2), arguments.node_kills)
            ordeal = endure_lost_nodes(keys, moments, seed)
        say(
            f"seed {seed}: {len(ordeal.kills)} kills, {ordeal.runs} runs, {time.monotonic() - started_s:.0f} s: "
            + ("; ".join(ordeal.wrong) or "all right")
        )
        ordeals.append(asdict(ordeal))
        if arguments.json:
            arguments.json.write_text(json.dumps({"machine": found, "sweeps": ordeals}, indent=1) + "\n")
    return {"machine": found, "sweeps": ordeals}


def render(result: dict[str, Any]) -> str:
    """The counts."""
    sweeps = result["sweeps"]
    kills = Counter(kill["what"] for one in sweeps for kill in one["kills"])
    wrong = [f"seed {one['seed']}: {told}" for one in sweeps for told in one["wrong"]]
    ends = [end for one in sweeps for end in one["ends"]]
    asked = [end for end in ends if end["what"] in ("driver SIGTERM", "driver SIGINT")]
    return "\n".join(
        [
            f"{kills.total()} kills over {len(sweeps)} sweeps; " + describe(result["machine"]),
            "",
            table(["killed", "times"], [[what, kills[what]] for what in (*KINDS, NODE)]),
            "",
            f"trials that went on from a checkpoint: {sum(one['went_on'] for one in sweeps)}; after SIGTERM or SIGINT "
            f"the driver had ended in {max((end['exit_s'] for end in asked), default=0):.1f} s at most, the last "
            f"process in {max((end['gone_s'] for end in asked), default=0):.1f} s",
            f"found wrong: {len(wrong)}",
            *wrong,
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweeps", type=int, default=4, help="each with a seed of its own (default: %(default)s)")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=24, help="in a sweep (default: %(default)s)")
    parser.add_argument("--lost-nodes", type=int, default=1, help="sweeps that lose one of two nodes")
    parser.add_argument("--node-kills", type=int, default=4, help="in each of these (default: %(default)s)")
    parser.add_argument("--trials", type=int, default=24, help="of a sweep (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="of a trial (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything found there")
    result = measure_and_tell("chaos", parser.parse_args(), run_all, render)
    sys.exit(any(one["wrong"] for one in result["sweeps"]))


if __name__ == "__main__":
    main()
