"""Kills at random moments, and what was lost by them: nothing, or the script says what and ends with exit code 1.

    python -m benchmarks.chaos                              # 4 sweeps with 3 kills each: about 15 minutes on 2 cores
    python -m benchmarks.chaos --sweeps 34 --first-seed 100 --json chaos.json

Each sweep trains builtin:tiny-llama three times with dropout on a real local Ray cluster and real MLflow. Its seed
draws what is killed and when (after how many of all training steps): the driver (SIGKILL, SIGTERM, SIGINT), a Ray
worker, the template that trials are forked from, or a trial's own process. After a kill that ends the driver the same
command is given again, until the sweep ends. One more sweep runs on two nodes and loses one. Then:

- every trial that had ended is there, equal, with the same curve: none was run twice;
- every trial is `completed`, but for those whose own process was killed, which say why;
- every curve has each step once and equals, bit for bit, that of the same trial run in a plain process without Ray;
- MLflow has one parent, one run a trial, and the points on disk, none twice and none missing;
- no process, shared-memory segment, lock, lease, checkpoint or half-written file is left, and the folder can be taken.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml
from mlflow import MlflowClient

from benchmarks.sweeps import describe, environ, machine, measure_and_tell, say, table
from orchestrator.results.records import MetricPoint, SweepResult, TrialResult, TrialStatus
from orchestrator.results.storage import SweepFolder, is_at_work, read_sweep
from orchestrator.sweep.tracking import metrics_of
from orchestrator.training.task import TrialTask
from tests.ray.clusters import Head, joined_node, started_head

LIMIT_S = 420.0
GONE_LIMIT_S = 40.0
SIGNALS = {"driver SIGKILL": signal.SIGKILL, "driver SIGTERM": signal.SIGTERM, "driver SIGINT": signal.SIGINT}
PROCESSES = ("worker", "template", "trial")
KINDS = (*SIGNALS, *PROCESSES)
NODE = "node"


@dataclass(frozen=True, slots=True)
class Kill:
    """What to kill, and once how many steps of all trials are on disk."""

    what: str
    at_step: int


@dataclass(slots=True)
class Ordeal:
    """One sweep, what it went through, and what was found wrong afterwards."""

    seed: int
    kills: list[Kill]
    """Those that met something to kill."""
    runs: int = 0
    went_on: int = 0
    """Times that a trial went on from a checkpoint."""
    closed_s: list[float] = field(default_factory=list)
    """From SIGTERM or SIGINT to the driver's exit."""
    wrong: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Seen:
    """A trial that had ended, as it was on disk then."""

    record: TrialResult
    curve: bytes


def sweep_keys(storage: Path, trials: int, steps: int) -> dict[str, Any]:
    """The sweep file, with its data beside it."""
    storage.mkdir(parents=True, exist_ok=True)
    data = storage / "rows.jsonl"
    rows = [f"row {n}: " + " ".join(f"{word} {n * (word + 3) % 97}" for word in range(n % 19 + 3)) for n in range(240)]
    data.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
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
        "space": {"rank": [2 ** (n + 1) for n in range(trials)]},
        "resources": {"workers_per_trial": 1, "cpus_per_worker": 1, "max_concurrent": 1},
        "storage": str(storage),
    }


def drawn_kills(seed: int, count: int, all_steps: int) -> list[Kill]:
    """By the seed alone; in the order of their moments."""
    draw = random.Random(seed)
    moments = sorted(draw.randrange(1, all_steps) for _ in range(count))
    return [Kill(draw.choice(KINDS), moment) for moment in moments]


def endure(keys: dict[str, Any], kills: Sequence[Kill], seed: int) -> Ordeal:
    """Run the sweep to its end through the kills, and look at what is left."""
    ordeal = Ordeal(seed, [])
    folder = SweepFolder(Path(keys["storage"]) / keys["name"])
    waiting = list(kills)
    ended: dict[str, _Seen] = {}
    while True:
        driver = _start(keys, ordeal)
        try:
            below = _live_through(driver, folder, waiting, ordeal)
            exit_code = driver.wait()
        finally:
            driver.kill()
        ordeal.wrong += _left_by(below)
        ordeal.wrong += _changed(folder, ended)
        if exit_code in (0, 1):
            break
        ended |= _ended(folder)
        if ordeal.runs > len(kills) + 1:
            ordeal.wrong.append(f"the driver ended with exit code {exit_code} and nobody had killed it")
            return ordeal
    return _judged(ordeal, folder, keys)


def endure_lost_node(keys: dict[str, Any], at_step: int, seed: int) -> Ordeal:
    """Run the sweep on a cluster of two nodes, a trial on each; take one node away, and then give another."""
    ordeal = Ordeal(seed, [])
    keys = {**keys, "resources": {"workers_per_trial": 1, "cpus_per_worker": 2, "max_concurrent": 2}}
    folder = SweepFolder(Path(keys["storage"]) / keys["name"])
    with started_head({"RAY_AUTH_MODE": "disabled"}) as head, contextlib.ExitStack() as node:
        node.enter_context(joined_node(head))
        driver = _start(keys, ordeal, "--address", head.address)
        while driver.poll() is None and _steps_on_disk(folder) < at_step:
            time.sleep(0.2)
        if driver.poll() is None:
            ordeal.kills.append(Kill(NODE, at_step))
        node.close()
        node.enter_context(joined_node(head))
        try:
            if exit_code := driver.wait(LIMIT_S):
                ordeal.wrong.append(f"the driver ended with exit code {exit_code}")
        except subprocess.TimeoutExpired:
            ordeal.wrong.append(f"the sweep had not ended {LIMIT_S:.0f} s after its node was lost")
            driver.kill()
        ordeal.wrong += _held_of(head)
    return _judged(ordeal, folder, keys)


def _held_of(head: Head) -> list[str]:
    """Placement groups that a sweep left on a cluster that goes on."""
    code = f"import ray; ray.init('{head.address}'); print(ray.util.placement_group_table())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environ())
    if done.returncode:
        return [f"the cluster does not answer any more: {done.stderr[-300:]}"]
    return ["a placement group is left"] if "'CREATED'" in done.stdout else []


def _start(keys: dict[str, Any], ordeal: Ordeal, *arguments: str) -> subprocess.Popen[bytes]:
    ordeal.runs += 1
    storage = Path(keys["storage"])
    file = storage / "chaos.yaml"
    file.write_text(yaml.safe_dump(keys), encoding="utf-8")
    command = [sys.executable, "-m", "orchestrator", "run", str(file), *arguments]
    with (storage / f"run{ordeal.runs}.log").open("w", encoding="utf-8") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environ())


def _judged(ordeal: Ordeal, folder: SweepFolder, keys: dict[str, Any]) -> Ordeal:
    """After the sweep's end: what is wrong with what it left."""
    ordeal.wrong += _wrong_in(folder, keys, ordeal.kills)
    ordeal.went_on = sum(note.startswith("went on") for trial in _trials(folder) for note in trial.notes)
    return ordeal


def _live_through(
    driver: subprocess.Popen[bytes], folder: SweepFolder, waiting: list[Kill], ordeal: Ordeal
) -> dict[int, psutil.Process]:
    """Deliver the kills until the driver has ended; returns every process that was below it."""
    below: dict[int, psutil.Process] = {}
    segments: set[str] = set()
    until_s = time.monotonic() + LIMIT_S
    while driver.poll() is None:
        if time.monotonic() > until_s:
            ordeal.wrong.append(f"run {ordeal.runs} had not ended after {LIMIT_S:.0f} s")
            driver.kill()
            break
        below |= {process.pid: process for process in _below(driver.pid)}
        if not waiting or _steps_on_disk(folder) < waiting[0].at_step:
            time.sleep(0.2)
            continue
        segments |= _segments(below.values())
        kill = waiting[0]
        if kill.what in SIGNALS:
            waiting.pop(0)
            ordeal.kills.append(kill)
            started = time.monotonic()
            driver.send_signal(SIGNALS[kill.what])
            driver.wait(LIMIT_S)
            if kill.what != "driver SIGKILL":
                ordeal.closed_s.append(time.monotonic() - started)
                if driver.returncode != 130:
                    ordeal.wrong.append(f"{kill.what}: exit code {driver.returncode}, not 130")
        elif victim := _find(kill.what, below.values()):
            waiting.pop(0)
            ordeal.kills.append(kill)
            victim.kill()
        else:
            time.sleep(0.05)
    ordeal.wrong += [f"shared-memory segment {name} is left" for name in segments if Path(name).exists()]
    return below


def _below(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()) or process.name()
    except psutil.Error:
        return ""


def _find(what: str, processes: Iterable[psutil.Process]) -> psutil.Process | None:
    for process in processes:
        command = _command(process)
        if what == "worker" and "RayTrainWorker" in command:
            return process
        if "multiprocessing.forkserver" not in command:
            continue
        try:
            parent = process.parent()
        except psutil.Error:
            continue
        forked = parent is not None and "multiprocessing.forkserver" in _command(parent)
        if what == ("trial" if forked else "template"):
            return process
    return None


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


def _steps_on_disk(folder: SweepFolder) -> int:
    steps = 0
    for trial in folder.trials():
        try:
            steps += trial.metrics.read_bytes().count(b"\n")
        except OSError:
            continue
    return steps


def _left_by(below: dict[int, psutil.Process]) -> list[str]:
    # Ray's own two agents outlive a raylet that was killed with its driver (ray 2.60.0); they hold nothing of ours.
    ours = [process for process in below.values() if "Agent" not in _command(process)]
    return [
        f"process {process.pid} is left: {_command(process)[:80]}"
        for process in psutil.wait_procs(ours, GONE_LIMIT_S)[1]
    ]


def _ended(folder: SweepFolder) -> dict[str, _Seen]:
    return {
        trial.trial_id: _Seen(trial, folder.trial(trial.trial_id).metrics.read_bytes())
        for trial in _trials(folder)
        if trial.status.is_final
    }


def _trials(folder: SweepFolder) -> tuple[TrialResult, ...]:
    return read_sweep(folder)[0].trials if folder.results_json.exists() else ()


def _changed(folder: SweepFolder, ended: dict[str, _Seen]) -> list[str]:
    now = {trial.trial_id: trial for trial in _trials(folder)}
    wrong = []
    for trial_id, seen in ended.items():
        # Only its run in MLflow may have become known since.
        if trial_id not in now or _comparable(now[trial_id]) != _comparable(seen.record):
            wrong.append(f"trial {trial_id} had ended and its record is lost or another")
        if folder.trial(trial_id).metrics.read_bytes() != seen.curve:
            wrong.append(f"trial {trial_id} had ended and was run again")
    return wrong


def _comparable(record: TrialResult) -> dict[str, Any]:
    return record.model_dump(exclude={"mlflow_run_id"})


def _wrong_in(folder: SweepFolder, keys: dict[str, Any], kills: Sequence[Kill]) -> Iterable[str]:
    """What an ended sweep's folder and MLflow should not look like."""
    sweep, damaged = read_sweep(folder)
    yield from (f"{one.file} is damaged: {one.why}" for one in damaged)
    if len(sweep.trials) != len(keys["space"]["rank"]):
        yield f"{len(sweep.trials)} trials, not {len(keys['space']['rank'])}"
    unfinished = [trial for trial in sweep.trials if trial.status is not TrialStatus.COMPLETED]
    may_fail = sum(kill.what in ("trial", "template") for kill in kills)
    for trial in unfinished:
        if trial.status not in (TrialStatus.FAILED, TrialStatus.OUT_OF_MEMORY) or not trial.reason:
            yield f"trial {trial.trial_id} is {trial.status} ({trial.reason})"
    if len(unfinished) > may_fail:
        yield f"{len(unfinished)} trials did not complete, and {may_fail} had their own process killed"
    yield from _wrong_curves(folder, sweep, keys["resources"]["cpus_per_worker"])
    yield from _wrong_in_mlflow(folder, sweep)
    yield from _left_in(folder)


def _wrong_curves(folder: SweepFolder, sweep: SweepResult, threads: int) -> Iterable[str]:
    expected = plain_curves(folder, threads)
    for trial in sweep.trials:
        if trial.status is not TrialStatus.COMPLETED:
            continue
        curve = [_figures(point) for point in folder.trial(trial.trial_id).read_metrics()]
        steps = [step for step, *_ in curve]
        if steps != list(range(1, trial.config.max_steps + 1)):
            twice = [step for step, times in Counter(steps).items() if times > 1]
            missing = sorted(set(range(1, trial.config.max_steps + 1)) - set(steps))
            yield f"trial {trial.trial_id}: steps {twice} twice, {missing} missing"
        elif json.loads(json.dumps(curve)) != expected[trial.trial_id]:
            yield f"trial {trial.trial_id}: its curve is not that of a trial without interruption"


def _figures(point: MetricPoint) -> list[Any]:
    return [point.step, point.tokens, point.loss, point.eval_loss, point.grad_norm, point.learning_rate]


def plain_curves(folder: SweepFolder, threads: int) -> dict[str, list[list[Any]]]:
    """Every trial's curve as one plain process makes it, without Ray and without interruption."""
    out = folder.root.parent / "reference.json"
    if not out.exists():
        command = [sys.executable, "-m", "benchmarks.chaos", "--reference", str(folder.root), "--json", str(out)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**environ(), "OMP_NUM_THREADS": str(threads)}
        )
        if done.returncode:
            raise RuntimeError(f"the trials without interruption failed:\n{done.stderr[-2000:]}")
    curves: dict[str, list[list[Any]]] = json.loads(out.read_text(encoding="utf-8"))
    return curves


def _train_plainly(folder: SweepFolder, out: Path) -> None:
    from orchestrator.training import model_source, template  # noqa: F401

    sweep = read_sweep(folder)[0]
    model = str(model_source.materialize(model_source.resolve(sweep.model)))
    curves = {}
    for trial in sweep.trials:
        reference = SweepFolder(folder.root.parent / "reference").trial(trial.trial_id)
        task = TrialTask(trial.trial_id, trial.config, model, str(folder.data), str(reference.root), "eval_loss", "min")
        # A process each: DeepSpeed keeps the groups of the process group that is gone (0.19.8, utils/groups.py).
        process = multiprocessing.get_context("fork").Process(target=_train_one, args=(task,))
        process.start()
        process.join()
        curves[trial.trial_id] = [_figures(point) for point in reference.read_metrics()]
    out.write_text(json.dumps(curves), encoding="utf-8")


def _train_one(task: TrialTask) -> None:
    from orchestrator.training import worker_process
    from orchestrator.training.task import WorkerPlace

    worker_process.run(task, WorkerPlace(0, 1, 0, "127.0.0.1", 0, task.trial_id), lambda _: None)


def _wrong_in_mlflow(folder: SweepFolder, sweep: SweepResult) -> Iterable[str]:
    client = MlflowClient(f"sqlite:///{folder.root.parent / 'mlflow.db'}")
    runs = [run for e in client.search_experiments() for run in client.search_runs([e.experiment_id])]
    parents = [run for run in runs if run.data.tags.get("kind") == "sweep"]
    children = {run.data.tags["trial_id"]: run for run in runs if run.data.tags.get("kind") == "trial"}
    if len(parents) != 1 or len(runs) != 1 + len(sweep.trials):
        yield f"MLflow has {len(parents)} parents and {len(runs) - len(parents)} trials, not 1 and {len(sweep.trials)}"
    for trial in sweep.trials:
        run = children.get(trial.trial_id)
        if run is None:
            yield f"MLflow lacks trial {trial.trial_id}"
            continue
        if run.data.tags.get("status") != trial.status.value:
            yield f"MLflow has trial {trial.trial_id} as {run.data.tags.get('status')}, the disk as {trial.status}"
        points = [metric for point in folder.trial(trial.trial_id).read_metrics() for metric in metrics_of(point)]
        for key in sorted({metric.key for metric in points}):
            there = [(m.step, m.timestamp, m.value) for m in client.get_metric_history(run.info.run_id, key)]
            here = [(m.step, m.timestamp, m.value) for m in points if m.key == key]
            if sorted(there) != sorted(here):
                yield f"trial {trial.trial_id}: {len(there)} points of {key} in MLflow, {len(here)} (or others) on disk"


def _left_in(folder: SweepFolder) -> Iterable[str]:
    if is_at_work(folder):
        yield "the folder's lock is still held"
    for path in sorted(folder.root.rglob("*")):
        name, inside = path.name, path.relative_to(folder.root).parts[0]
        half_written = name.startswith(".") and path != folder.lock and inside != folder.tune.name
        if half_written or (name.startswith("checkpoint-") and inside == "trials"):
            yield f"{path.relative_to(folder.root)} is left"


def run_all(arguments: argparse.Namespace, storage: Path) -> dict[str, Any]:
    """Every sweep's ordeal."""
    found = machine()
    ordeals = []
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.sweeps + arguments.lost_nodes):
        keys = sweep_keys(storage / str(seed), arguments.trials, arguments.steps)
        all_steps = arguments.trials * arguments.steps
        if seed < arguments.first_seed + arguments.sweeps:
            kills = drawn_kills(seed, arguments.kills, all_steps)
            say(f"seed {seed}: {', '.join(f'{kill.what} at {kill.at_step}' for kill in kills)}")
            ordeal = endure(keys, kills, seed)
        else:
            ordeal = endure_lost_node(keys, random.Random(seed).randrange(1, all_steps // 2), seed)
        say(f"seed {seed}: {len(ordeal.kills)} kills, {ordeal.runs} runs, " + ("; ".join(ordeal.wrong) or "all right"))
        ordeals.append(asdict(ordeal))
        if arguments.json:
            arguments.json.write_text(json.dumps({"machine": found, "sweeps": ordeals}, indent=1) + "\n")
    return {"machine": found, "sweeps": ordeals}


def render(result: dict[str, Any]) -> str:
    """The counts."""
    sweeps = result["sweeps"]
    kills = Counter(kill["what"] for one in sweeps for kill in one["kills"])
    wrong = [f"seed {one['seed']}: {told}" for one in sweeps for told in one["wrong"]]
    closed_s = [seconds for one in sweeps for seconds in one["closed_s"]]
    return "\n".join(
        [
            f"{kills.total()} kills over {len(sweeps)} sweeps; " + describe(result["machine"]),
            "",
            table(["killed", "times"], [[what, kills[what]] for what in (*KINDS, NODE)]),
            "",
            f"trials that went on from a checkpoint: {sum(one['went_on'] for one in sweeps)}; "
            f"slowest end after SIGTERM or SIGINT: {max(closed_s, default=0):.1f} s",
            f"found wrong: {len(wrong)}",
            *wrong,
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweeps", type=int, default=4, help="each with a seed of its own (default: %(default)s)")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=3, help="in a sweep (default: %(default)s)")
    parser.add_argument("--lost-nodes", type=int, default=1, help="sweeps that lose one of two nodes")
    parser.add_argument("--trials", type=int, default=3, help="of a sweep (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="of a trial (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything found there")
    parser.add_argument("--reference", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.reference:
        _train_plainly(SweepFolder(arguments.reference), arguments.json)
        return
    result = measure_and_tell("chaos", arguments, run_all, render)
    sys.exit(any(one["wrong"] for one in result["sweeps"]))


if __name__ == "__main__":
    main()
