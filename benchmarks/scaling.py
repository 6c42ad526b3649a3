"""What orchestrating a trial costs, at 10, 100 and 1,000 trials of a trivial training, on a cluster of many nodes.

    python -m benchmarks.scaling                              # about 20 minutes on 2 cores
    python -m benchmarks.scaling --trials 10 100 --nodes 4 --json scaling.json

`orchestrator run` itself, untouched, on a cluster simulated on this machine (`ray.cluster_utils.Cluster`: a head
without CPUs and nodes with one CPU each): Tune, switchboard, worker groups, templates, forked processes, process
groups, records, results, MLflow and report are real. Replaced is what a trial computes: `trivial_training.py` says how.

- a trial: seconds that a slot stood idle between two trials; neither their work nor a slot's first start is in it.
- first tenth, last tenth: the same over the sweep's first and last trials, which shows growth inside a sweep.
  A sweep of few trials has few such gaps, hence the median of several sweeps there.
- end: from the last trial's end to the command's exit (MLflow's rest, results, report), per trial.
- driver: peak resident memory of the `orchestrator run` process; growth: per trial, from the first trial's end on.
- board: peak resident memory of the switchboard's process.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.sweeps import Ran, describe, environ, machine, measure_and_tell, run_sweep, say, startups, table
from benchmarks.trivial_training import SLEEP_S

SAMPLE_S = 0.5


@dataclass(slots=True)
class Memory:
    """Resident bytes of the driver and the switchboard, while a sweep runs."""

    driver: list[tuple[float, int]] = field(default_factory=list)
    """(seconds since 1970, bytes)"""
    board_peak: int = 0

    def watch(self, process: subprocess.Popen[str]) -> None:
        """Sample until the process ends."""
        import psutil

        driver, board = psutil.Process(process.pid), None
        while process.poll() is None:
            # Either may end between being seen and being asked.
            with contextlib.suppress(psutil.Error):
                self.driver.append((time.time(), driver.memory_info().rss))
                board = board or _switchboard()
                self.board_peak = max(self.board_peak, board.memory_info().rss if board else 0)
            time.sleep(SAMPLE_S)

    def growth(self, since: float, until: float) -> int:
        """Bytes that the driver grew by between two moments: medians of a few samples around each."""
        at = [min(range(len(self.driver)), key=lambda i: abs(self.driver[i][0] - moment)) for moment in (since, until)]
        before, after = (statistics.median(rss for _, rss in self.driver[max(0, i - 1) : i + 2]) for i in at)
        return int(after - before)


def _switchboard() -> Any:
    """The process of the actor, among our own descendants: raylets are started by this process."""
    import psutil

    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "ray::Switchboard" in " ".join(process.cmdline()):
                return process
    return None


@dataclass(frozen=True, slots=True)
class Size:
    """What one sweep came to."""

    trials: int
    completed: int
    in_mlflow: int
    """Trials whose run in MLflow has ended."""
    trial_s: float
    trial_median_s: float
    first_tenth_s: float
    last_tenth_s: float
    start_s: float
    """From the launch to the last slot's first work: worker groups and templates."""
    end_s: float
    makespan_s: float
    command_s: float
    driver_peak_bytes: int
    driver_growth_bytes: int
    """A trial."""
    board_peak_bytes: int


def sweep_of(trials: int, slots: int) -> dict[str, Any]:
    """The sweep file."""
    return {
        "name": f"scaling-{trials}",
        "model": "builtin:tiny-llama",
        "data": {"train": "builtin:python-docstrings", "eval": 0.01, "format": "prompt_completion"},
        "trial": {"precision": "fp32", "global_batch_size": 4, "micro_batch_size": 4, "max_steps": 5, "eval_every": 2},
        "space": {"learning_rate": [round(1e-5 * 1.005**number, 10) for number in range(trials)]},
        "resources": {"workers_per_trial": 1, "gpus_per_worker": 0, "cpus_per_worker": 1, "max_concurrent": slots},
    }


def measure(trials: int, slots: int, address: str, folder: Path) -> Size:
    """One sweep."""
    memory = Memory()
    hook = {"RAY_RUNTIME_ENV_HOOK": "benchmarks.trivial_training.runtime_env_hook"}
    started = time.time()
    ran = run_sweep(folder, sweep_of(trials, slots), "--address", address, environment=hook, watch=memory.watch)
    if any(trial.step_time_s != SLEEP_S for trial in ran.sweep.trials):
        raise RuntimeError("a trial trained for real: Ray did not call the hook in its worker")
    works = sorted(ran.works(), key=lambda work: work.started)
    first, later = startups(works, slots, ran.launched)
    tenth = max(1, len(later) // 10)
    ended = max(work.ended for work in works)
    return Size(
        trials=trials,
        completed=sum(trial.status.value == "completed" for trial in ran.sweep.trials),
        in_mlflow=finished_runs(ran, folder),
        trial_s=statistics.mean(later),
        trial_median_s=statistics.median(later),
        first_tenth_s=statistics.mean(later[:tenth]),
        last_tenth_s=statistics.mean(later[-tenth:]),
        start_s=max(first),
        end_s=(started + ran.command_s - ended) / trials,
        makespan_s=ended - ran.launched,
        command_s=ran.command_s,
        driver_peak_bytes=max(rss for _, rss in memory.driver),
        driver_growth_bytes=memory.growth(works[0].ended, ended) // trials,
        board_peak_bytes=memory.board_peak,
    )


def finished_runs(ran: Ran, folder: Path) -> int:
    """The trials' runs that MLflow holds and that have ended."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(ran.sweep.name)
    assert experiment is not None
    condition = "tags.kind = 'trial' and attributes.status = 'FINISHED'"
    return len(client.search_runs([experiment.experiment_id], condition, max_results=10_000))


@contextlib.contextmanager
def cluster_of(nodes: int) -> Iterator[str]:
    """The address of a cluster on this machine: a head without CPUs, and nodes with one each."""
    # The nodes' processes, and the workers in them, have their environment from here.
    os.environ.update(environ())
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(nodes):
            cluster.add_node(wait=False, num_cpus=1)
        cluster.wait_for_nodes()
        yield cluster.address
    finally:
        cluster.shutdown()


def medians(sizes: list[Size]) -> Size:
    """Field by field, of repeats of one size."""
    return Size(**{name: statistics.median_low(asdict(size)[name] for size in sizes) for name in asdict(sizes[0])})


def run_all(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Every size, each on a cluster of its own."""
    about, sizes = machine(), []
    say(describe(about))
    for trials in arguments.trials:
        repeats = arguments.repeats if trials < 100 else 1
        with cluster_of(arguments.nodes) as address:
            found = [measure(trials, arguments.slots, address, folder / f"{trials}-{n}") for n in range(repeats)]
        sizes.append(size := medians(found))
        say(f"{trials} trials: {size.trial_s:.3f} s each, driver {size.driver_peak_bytes / 2**20:.0f} MiB")
    first, last = sizes[0], sizes[-1]
    return {
        "machine": about,
        "nodes": arguments.nodes,
        "slots": arguments.slots,
        "ratios": {
            "cost_a_trial": last.trial_s / first.trial_s,
            "driver_memory": last.driver_peak_bytes / first.driver_peak_bytes,
        },
        "sizes": [asdict(size) for size in sizes],
    }


def render(result: dict[str, Any]) -> str:
    """The table."""
    header = ["trials", "completed", "in MLflow", "a trial, s", "first tenth", "last tenth", "end, s a trial"]
    header += ["makespan, s", "command, s", "driver, MiB", "growth, KiB a trial", "board, MiB"]
    rows = [
        [
            *(size[name] for name in ("trials", "completed", "in_mlflow", "trial_s", "first_tenth_s", "last_tenth_s")),
            *(size[name] for name in ("end_s", "makespan_s", "command_s")),
            round(size["driver_peak_bytes"] / 2**20),
            round(size["driver_growth_bytes"] / 2**10, 1),
            round(size["board_peak_bytes"] / 2**20),
        ]
        for size in result["sizes"]
    ]
    low, high = result["sizes"][0]["trials"], result["sizes"][-1]["trials"]
    ratios = result["ratios"]
    return "\n".join(
        [
            f"{result['nodes']} simulated nodes, {result['slots']} trials at a time; " + describe(result["machine"]),
            "",
            table(header, rows),
            "",
            f"from {low} to {high} trials: cost a trial × {ratios['cost_a_trial']:.2f}, "
            f"driver's memory × {ratios['driver_memory']:.2f}",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--nodes", type=int, default=8, help="of one CPU each (default: %(default)s)")
    parser.add_argument("--slots", type=int, default=2, help="trials at a time (default: %(default)s)")
    parser.add_argument(
        "--repeats", type=int, default=3, help="of sizes under 100 trials, medians taken (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured there")
    arguments = parser.parse_args()
    if min(arguments.trials) <= arguments.slots:
        parser.error("a sweep needs more trials than --slots: a slot's first trial is not counted")
    measure_and_tell("scaling", arguments, run_all, render)


if __name__ == "__main__":
    main()
