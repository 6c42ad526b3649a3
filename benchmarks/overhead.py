"""What a trial costs beside its training: four ways to run the same trials, side by side in one run.

    python -m benchmarks.overhead                      # 24 trials, two at a time, once: 36 minutes on 2 cores
    python -m benchmarks.overhead --trials 6 --steps 120 --repeats 3    # where the first start counts for most
    python -m benchmarks.overhead --variants warm plain --json overhead.json

- guide: the pattern of Ray's guide (docs.ray.io, "Hyperparameter Tuning with Ray Tune"), in full below: a Tune function
  that starts a TorchTrainer of its own for every trial. Ray's settings are Ray's defaults.
- fresh, warm: `orchestrator run --isolation fresh` and `warm`, MLflow, records and report included.
- plain: the limit. No Ray: processes forked from a template that has imported everything, so many at a time.

All train the same configurations (builtin:tiny-llama, learning rates) on the same data with the same engine, one CPU a
worker; the script checks that every loss of every step is the same in all four. Variants run in processes of their own,
one after the other, interleaved over the repeats.

- makespan: from the launch of the sweep (cluster up, data prepared; for plain: template imported) to the end of the
  last trial's last evaluation.
- start-up a trial: seconds that its slot stood idle before it, from the end of the work before (or the launch) to its
  own first work: for a slot's first trial and for those after. Reading data and loading the model count as work.
- command: the whole process. Its work differs: `orchestrator` also plans, tokenises, and writes MLflow and the report.
"""

from __future__ import annotations

import argparse
import json
import pickle
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.sweeps import (
    Work,
    describe,
    environ,
    losses,
    machine,
    measure_and_tell,
    median,
    run_sweep,
    say,
    startups,
    table,
    work_of,
)
from orchestrator.config.sweep_config import SweepConfig
from orchestrator.results.folders import TrialFolder
from orchestrator.training.task import TrialEnd, TrialProgress, TrialTask, WorkerPlace

VARIANTS = ("guide", "fresh", "warm", "plain")
TITLES = {
    "guide": "(a) Ray's guide",
    "fresh": "(b) orchestrator, fresh",
    "warm": "(c) orchestrator, warm",
    "plain": "(d) plain processes",
}


@dataclass(frozen=True, slots=True)
class Job:
    """What a variant is given."""

    tasks: tuple[TrialTask, ...]
    slots: int
    workers: int
    folder: Path


@dataclass(frozen=True, slots=True)
class Launch:
    """What a variant says beside what its trials wrote."""

    at: float
    """Seconds since 1970."""
    imports_s: float | None = None


@dataclass(frozen=True, slots=True)
class Figures:
    """What one run of a variant came to, in seconds."""

    makespan_s: float
    trial_s: float
    """A slot's time for one trial: start-up and work."""
    work_s: float
    startup_first_s: float
    """Of each slot's first trial."""
    startup_s: float | None
    """Of the trials after it; None where there were none."""
    startup_max_s: float | None
    later_trial_s: float | None
    """Start-up and work of a trial after a slot's first: what one trial more would take."""
    imports_s: float | None
    """Of plain's template, which its makespan leaves out and all others' holds."""
    command_s: float


# --- (a) The pattern of Ray's guide ---


def train_fn_per_worker(config: dict[str, Any]) -> None:
    """The training of one worker: TorchTrainer has made the process group."""
    import os

    import ray.train

    from orchestrator.training import device, training_loop
    from orchestrator.training.ledger import Ledger
    from orchestrator.training.worker_process import compile_no_ops

    # In this pattern's favour: otherwise DeepSpeed compiles an op in the first trial, 45 s.
    compile_no_ops()
    context = ray.train.get_context()
    task, rank = config["task"], context.get_world_rank()
    place = WorkerPlace(rank, context.get_world_size(), context.get_local_rank(), "", 0, "")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

    def report(progress: TrialProgress) -> None:
        ray.train.report({"step": progress.last.step, "eval_loss": progress.last.eval_loss} if progress.last else {})

    ledger = Ledger(device.choose(place.local_rank, None, None), startup_s=0.0)
    progress = training_loop.train(task, place, ledger, report)
    if rank == 0:
        write_setup(task, progress)


def train_driver_fn(config: dict[str, Any]) -> None:
    """One trial, as Tune runs it: a process that starts a TorchTrainer of its own."""
    import ray.train
    import ray.tune
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    job = config["job"]
    trainer = TorchTrainer(
        train_fn_per_worker,
        train_loop_config={"task": job.tasks[config["number"]]},
        scaling_config=ray.train.ScalingConfig(num_workers=job.workers, resources_per_worker={"CPU": 1}),
        run_config=ray.train.RunConfig(
            name=f"train-trial_id={ray.tune.get_context().get_trial_id()}",
            storage_path=str(job.folder / "train"),
            callbacks=[TuneReportCallback()],  # type: ignore[list-item]
        ),
    )
    trainer.fit()


def run_guide(job: Job) -> Launch:
    """All trials, under Tune."""
    import ray
    import ray.tune

    # Of its own: a cluster that was killed leaves its address behind, which Ray would try for minutes.
    ray.init("local", log_to_driver=False)
    # Tune's own process of a trial takes no CPU, in this pattern's favour: the workers need them all.
    no_cpu = ray.tune.PlacementGroupFactory([{"memory": 1}])
    tuner = ray.tune.Tuner(
        ray.tune.with_resources(train_driver_fn, no_cpu),
        param_space={"number": ray.tune.grid_search(list(range(len(job.tasks)))), "job": job},
        tune_config=ray.tune.TuneConfig(metric="eval_loss", mode="min", max_concurrent_trials=job.slots),
        run_config=ray.tune.RunConfig(storage_path=str(job.folder / "tune"), verbose=0),
    )
    launched = time.time()
    results = tuner.fit()
    if results.errors:
        raise RuntimeError(f"a trial of the guide's pattern failed: {results.errors[0]}")
    return Launch(launched)


# --- (d) The limit: plain processes ---


def run_plain(job: Job) -> Launch:
    """All trials, so many at a time."""
    import multiprocessing
    import os
    from concurrent.futures import ThreadPoolExecutor

    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["orchestrator.training.template"])
    begun = time.monotonic()
    first = context.Process(target=time.sleep, args=(0,))
    first.start()
    first.join()
    imports_s = time.monotonic() - begun
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    launched = time.time()
    with ThreadPoolExecutor(job.slots) as pool:
        for end in pool.map(lambda task: run_plain_trial(task, job.workers, store.port), job.tasks):
            if end.progress is None or end.reason:
                raise RuntimeError(f"a trial in plain processes failed: {end.reason}")
    return Launch(launched, imports_s)


def run_plain_trial(task: TrialTask, workers: int, port: int) -> TrialEnd:
    """One trial; returns worker 0's end."""
    import multiprocessing

    from orchestrator.training.child import run_child

    context = multiprocessing.get_context("forkserver")
    processes, readers = [], []
    for rank in range(workers):
        reader, writer = context.Pipe(duplex=False)
        place = WorkerPlace(rank, workers, rank, "127.0.0.1", port, task.trial_id)
        process = context.Process(target=run_child, args=(task, place, writer), daemon=True)
        process.start()
        writer.close()
        processes.append(process)
        readers.append(reader)
    ends = []
    for reader in readers:
        while not isinstance(message := reader.recv(), TrialEnd):
            pass
        ends.append(message)
    for process in processes:
        process.join()
    if ends[0].progress:
        write_setup(task, ends[0].progress)
    return ends[0]


# --- What all variants share ---


def sweep_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The sweep file, all settings that matter to time named."""
    return {
        "name": "overhead",
        "model": "builtin:tiny-llama",
        "data": {"train": "builtin:python-docstrings", "eval": 0.01, "format": "prompt_completion"},
        "trial": {
            "precision": "fp32",
            "global_batch_size": 4 * arguments.workers,
            "micro_batch_size": 4,
            "sequence_length": 64,
            "max_steps": arguments.steps,
            "eval_every": max(1, arguments.steps // 3),
        },
        "space": {"learning_rate": [round(1e-3 * 1.02**number, 8) for number in range(arguments.trials)]},
        "resources": {
            "workers_per_trial": arguments.workers,
            "gpus_per_worker": 0,
            "cpus_per_worker": 1,
            "max_concurrent": arguments.slots,
        },
    }


def prepare(raw: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """Model and tokenised data, which no variant's makespan holds."""
    from orchestrator.training import data, model_source

    sweep = SweepConfig.model_validate(raw)
    model = model_source.materialize(model_source.resolve(sweep.model))
    data.prepare(sweep.data, model, folder / "data")
    return model, folder / "data"


def make_tasks(raw: dict[str, Any], model: Path, data: Path, folder: Path) -> tuple[TrialTask, ...]:
    """The sweep's own trials, with a folder each."""
    return tuple(
        TrialTask(t.trial_id, t.config, str(model), str(data), str(folder / t.trial_id), "eval_loss", "min")
        for t in SweepConfig.model_validate(raw).trials()
    )


def write_setup(task: TrialTask, progress: TrialProgress) -> None:
    """What `orchestrator` has in result.json: the seconds of work before the first step."""
    Path(task.trial_folder, "setup.json").write_text(json.dumps(progress.data_s + progress.model_s))


def measure(variant: str, raw: dict[str, Any], model: Path, data: Path, folder: Path) -> tuple[Figures, list[Any]]:
    """Run a variant; its figures, and every trial's losses."""
    slots, workers = raw["resources"]["max_concurrent"], raw["resources"]["workers_per_trial"]
    if variant in ("fresh", "warm"):
        # Tokenised before, as for the others: worker groups start meanwhile, and that head start would not be counted.
        shutil.copytree(data, folder / raw["name"] / "data")
        ran = run_sweep(folder, raw, "--isolation", variant)
        works, launch, command_s = ran.works(), Launch(ran.launched), ran.command_s
        trials = [ran.folder.trial(work.trial_id) for work in works]
    else:
        job = Job(make_tasks(raw, model, data, folder / "trials"), slots, workers, folder)
        launch, command_s = run_in_process(variant, job)
        trials = [TrialFolder(Path(task.trial_folder)) for task in job.tasks]
        works = [work_of(trial, json.loads((trial.root / "setup.json").read_text())) for trial in trials]
    return figures(works, slots, launch, command_s), [losses(trial) for trial in trials]


def run_in_process(variant: str, job: Job) -> tuple[Launch, float]:
    """Run guide or plain in a process of its own; returns its launch and all its seconds."""
    job.folder.mkdir(parents=True)
    file = job.folder / "job.pickle"
    file.write_bytes(pickle.dumps(job))
    started = time.monotonic()
    command = [sys.executable, "-m", "benchmarks.overhead", "--run-job", variant, str(file)]
    with (job.folder / "log.txt").open("w") as log:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environ(), check=False)
    if done.returncode:
        raise RuntimeError(f"{variant} failed:\n{(job.folder / 'log.txt').read_text()[-3000:]}")
    return Launch(**json.loads(done.stdout.splitlines()[-1])), time.monotonic() - started


def figures(works: list[Work], slots: int, launch: Launch, command_s: float) -> Figures:
    """What the variants are compared by."""
    works = sorted(works, key=lambda work: work.started)
    first, later = startups(works, slots, launch.at)
    work_s = statistics.mean(work.seconds for work in works)
    return Figures(
        makespan_s=max(work.ended for work in works) - launch.at,
        trial_s=work_s + statistics.mean(first + later),
        work_s=work_s,
        startup_first_s=statistics.mean(first),
        startup_s=median(later),
        startup_max_s=max(later, default=None),
        later_trial_s=median(gap + work.seconds for gap, work in zip(later, works[slots:], strict=True)),
        imports_s=launch.imports_s,
        command_s=command_s,
    )


def medians(runs: list[Figures]) -> dict[str, float | None]:
    """Field by field."""
    columns = {name: [asdict(run)[name] for run in runs] for name in Figures.__dataclass_fields__}
    return {name: median(value for value in column if value is not None) for name, column in columns.items()}


def ratios(runs: dict[str, list[Figures]]) -> dict[str, float | None]:
    """Repeat by repeat, then their median."""
    wanted: dict[str, tuple[str, str, Callable[[Figures], float | None]]] = {
        "makespan, guide over warm": ("guide", "warm", lambda run: run.makespan_s),
        "makespan, fresh over guide": ("fresh", "guide", lambda run: run.makespan_s),
        "makespan, warm over plain": ("warm", "plain", lambda run: run.makespan_s),
        "makespan, warm over plain with its imports": ("warm", "plain", lambda r: r.makespan_s + (r.imports_s or 0)),
        "a trial after a slot's first, guide over warm": ("guide", "warm", lambda run: run.later_trial_s),
        "a trial after a slot's first, warm over plain": ("warm", "plain", lambda run: run.later_trial_s),
    }
    return {
        name: median(
            up / down
            for up, down in zip(map(value, runs[over]), map(value, runs[under]), strict=True)
            if up is not None and down
        )
        for name, (over, under, value) in wanted.items()
        if over in runs and under in runs
    }


def run_all(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Every variant, repeat by repeat, each repeat beginning with another."""
    about, raw = machine(), sweep_of(arguments)
    say(describe(about))
    model, data = prepare(raw, folder)
    runs: dict[str, list[Figures]] = {variant: [] for variant in arguments.variants}
    seen: list[Any] = []
    for repeat in range(arguments.repeats):
        turn = repeat % len(arguments.variants)
        for variant in [*arguments.variants[turn:], *arguments.variants[:turn]]:
            found, trial_losses = measure(variant, raw, model, data, folder / f"{repeat}-{variant}")
            runs[variant].append(found)
            seen.append(trial_losses)
            say(f"repeat {repeat + 1}, {variant}: makespan {found.makespan_s:.1f} s, {found.trial_s:.1f} s a trial")
    return {
        "machine": about,
        "sweep": raw,
        "repeats": arguments.repeats,
        "losses_identical": all(losses == seen[0] for losses in seen),
        "medians": {variant: medians(found) for variant, found in runs.items()},
        "ratios": ratios(runs),
        "runs": {variant: [asdict(run) for run in found] for variant, found in runs.items()},
    }


def render(result: dict[str, Any]) -> str:
    """The tables."""
    header = ["seconds", "makespan", "a trial", "of it work", "start-up, slot's first", "after", "at most"]
    header += ["a trial after", "imports before", "command"]
    rows = [[TITLES[variant], *found.values()] for variant, found in result["medians"].items()]
    trials, resources = len(result["sweep"]["space"]["learning_rate"]), result["sweep"]["resources"]
    lines = [
        f"{trials} trials of {result['sweep']['trial']['max_steps']} steps, {resources['max_concurrent']} at a time, "
        f"{resources['workers_per_trial']} worker(s) each; medians of {result['repeats']}; "
        + describe(result["machine"]),
        "",
        table(header, rows),
        "",
        *(f"{name}: {value:.2f}" for name, value in result["ratios"].items() if value is not None),
        f"losses identical in all variants: {'yes' if result['losses_identical'] else 'NO'}",
    ]
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["--run-job"]:
        run = {"guide": run_guide, "plain": run_plain}[sys.argv[2]]
        print(json.dumps(asdict(run(pickle.loads(Path(sys.argv[3]).read_bytes())))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--steps", type=int, default=360, help="optimizer steps of a trial (default: %(default)s)")
    parser.add_argument("--slots", type=int, default=2, help="trials at a time (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="workers a trial, a CPU each (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured there")
    arguments = parser.parse_args()
    result = measure_and_tell("overhead", arguments, run_all, render)
    sys.exit(0 if result["losses_identical"] else 1)


if __name__ == "__main__":
    main()
