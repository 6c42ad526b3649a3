"""Two sweeps at once on a cloud of two types of GPU that are not there: are the GPUs kept busy, and only one's own?

    python -m benchmarks.cloud                                        # 8 nodes × 8 GPUs: 2 minutes on 2 cores
    python -m benchmarks.cloud --nodes 64 --nodes-a-trial 4 --trials 24 --steps 240   # 16 GiB, 17 minutes

`orchestrator run` itself, twice, on a cluster simulated on this machine (`ray.cluster_utils.Cluster`): half of the
nodes say that they have T4s, half A100s, and every trial takes all GPUs of a node, one a worker. One sweep asks for
A100; the other names no type, and is to take the smaller one, since its trials run on either. All but the workers is
real; `absent_gpus.py` says what stands in their place. A trial takes `--steps` seconds, all of them the same. With
`--nodes-a-trial` it takes all GPUs of so many nodes: fewer slots, whose processes fit on one machine.

- busy: of what all GPUs of the cloud could have worked from the first trial's start to the last one's end, the share
  that trials did. Filling the slots, which takes this machine longer than a trial, and the end, when fewer trials are
  left than slots, count against it.
- full: the same while every slot had had a trial and trials were still waiting: what is lost between two trials.
- hand-over: the seconds that a slot's GPUs stood idle between one trial and the next, the median and the longest. The
  first start of its workers is not in it: that is in "all slots after".
- placed: trials by the type of the node that they ran on, as Ray's placement groups tell.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.sweeps import (
    Ran,
    Work,
    describe,
    environ,
    machine,
    measure_and_tell,
    median,
    run_sweep,
    say,
    startups,
    table,
)

TYPES = ("T4", "A100")
NODES_LIMIT_S = 900.0
SWEEPS: Mapping[str, dict[str, str]] = {"names-none": {}, "asks-for-a100": {"accelerator": "A100"}}
QUIET = {
    # Nothing that the sweeps did not ask for: no worker before its task, none kept after it.
    "RAY_prestart_worker_first_driver": "0",
    "RAY_num_workers_soft_limit": "0",
    # Some hundred processes start on few cores, in which a node may be silent for longer than Ray would wait.
    "RAY_health_check_timeout_ms": "60000",
    "RAY_health_check_failure_threshold": "20",
    # Ray starts a worker again that has not said its name within a minute, and would do so for ever.
    "RAY_worker_register_timeout_seconds": "900",
    # What a node does while nothing happens, rarely: 64 of them would keep two cores busy with it.
    "REPORTER_UPDATE_INTERVAL_MS": "600000",
    "METRICS_RECORD_INTERVAL_S": "600",
    "RAY_metrics_report_interval_ms": "600000",
    "RAY_ray_events_report_interval_ms": "100000",
    "RAY_raylet_report_resources_period_milliseconds": "1000",
    "RAY_raylet_check_gc_period_milliseconds": "10000",
    "RAY_local_fs_monitor_interval_ms": "60000",
    "RAY_report_worker_backlog_interval_ms": "10000",
}


def sweep_of(name: str, trials: int, workers: int, steps: int) -> dict[str, Any]:
    """The sweep file: a trial takes so many GPUs, one a worker."""
    return {
        "name": name,
        "model": "builtin:tiny-llama",
        "data": {"train": "builtin:python-docstrings", "eval": 0.01, "format": "prompt_completion"},
        "trial": {
            "precision": "fp32",
            "global_batch_size": workers,
            "micro_batch_size": 1,
            "max_steps": steps,
            "eval_every": steps,
        },
        "space": {"learning_rate": [round(1e-5 * 1.001**number, 12) for number in range(trials)]},
        "resources": {"workers_per_trial": workers, "gpus_per_worker": 1, "cpus_per_worker": 1, **SWEEPS[name]},
    }


@dataclass(frozen=True, slots=True)
class Cloud:
    """A cluster without a real GPU."""

    address: str
    types: Mapping[str, str]
    """Of each node, by Ray's id."""


@contextlib.contextmanager
def cloud_of(nodes: int, gpus: int) -> Iterator[Cloud]:
    """A head without CPUs, and nodes with so many GPUs of either type in turn."""
    os.environ.update(environ() | QUIET)
    # A node that has no GPU by this variable may not say that it has.
    del os.environ["CUDA_VISIBLE_DEVICES"]
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for number in range(nodes):
            resources = {f"accelerator_type:{TYPES[number % 2]}": 1.0}
            cluster.add_node(
                wait=False, num_cpus=gpus, num_gpus=gpus, resources=resources, object_store_memory=80 * 2**20
            )
        cluster.wait_for_nodes(NODES_LIMIT_S)
        types = {node["NodeID"]: _type_of(node["Resources"]) for node in cluster.global_state.node_table()}
        yield Cloud(cluster.address, types)
    finally:
        cluster.shutdown()


def _type_of(resources: Mapping[str, float]) -> str:
    return next((kind for kind in TYPES if f"accelerator_type:{kind}" in resources), "head")


def busy_share(works: Sequence[Work], slots: int, started: float, ended: float) -> float:
    """Of the time that so many slots had between two moments, the share that trials worked."""
    worked = sum(max(0.0, min(work.ended, ended) - max(work.started, started)) for work in works)
    return worked / ((ended - started) * slots)


def full_span(works: Sequence[Work], slots: int) -> tuple[float, float]:
    """From when every slot had had a trial until no trial waited."""
    starts = sorted(work.started for work in works)
    return starts[slots - 1], starts[-1]


def run_both(cloud: Cloud, arguments: argparse.Namespace, folder: Path) -> dict[str, Ran]:
    """The two sweeps beside each other, with a storage each."""
    hook = {"RAY_RUNTIME_ENV_HOOK": "benchmarks.absent_gpus.runtime_env_hook"}

    def one(name: str) -> Ran:
        raw = sweep_of(name, arguments.trials, arguments.gpus * arguments.nodes_a_trial, arguments.steps)
        return run_sweep(folder / name, raw, "--address", cloud.address, environment=hook)

    with ThreadPoolExecutor(len(SWEEPS)) as pool:
        return dict(zip(SWEEPS, pool.map(one, SWEEPS), strict=True))


def told_of(ran: Ran, slots: int, types: Mapping[str, str]) -> dict[str, Any]:
    """One sweep's row."""
    works = ran.works()
    _, between = startups(works, slots, ran.launched)
    return {
        "trials": len(works),
        "completed": sum(trial.status.value == "completed" for trial in ran.sweep.trials),
        "full_share": busy_share(works, slots, *full_span(works, slots)),
        "hand_over_s": median(between),
        "hand_over_max_s": max(between),
        "start_s": min(work.started for work in works) - ran.launched,
        "fill_s": full_span(works, slots)[0] - ran.launched,
        "command_s": ran.command_s,
        "placed": dict(Counter(_types_of(host, types) for trial in ran.sweep.trials for host in trial.hosts)),
    }


def _types_of(nodes: str, types: Mapping[str, str]) -> str:
    """Of all nodes that a trial ran on: more than one type would be wrong."""
    return " and ".join(sorted({types[node] for node in nodes.split(",")}))


def run_all(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One cloud, both sweeps."""
    about = machine()
    say(describe(about))
    with cloud_of(arguments.nodes, arguments.gpus) as cloud:
        say(f"{len(cloud.types) - 1} nodes are there")
        ran = run_both(cloud, arguments, folder)
    slots = arguments.nodes // arguments.nodes_a_trial
    works = [work for one in ran.values() for work in one.works()]
    whole = min(work.started for work in works), max(work.ended for work in works)
    return {
        "machine": about,
        "nodes": arguments.nodes,
        "gpus_a_node": arguments.gpus,
        "nodes_a_trial": arguments.nodes_a_trial,
        "trial_s": sum(work.seconds for work in works) / len(works),
        "busy_share": busy_share(works, slots, *whole),
        "sweeps": {name: told_of(one, slots // 2, cloud.types) for name, one in ran.items()},
    }


def render(result: dict[str, Any]) -> str:
    """The table."""
    header = ["sweep", "trials", "completed", "full", "hand-over, s", "longest, s", "first trial after, s"]
    header += ["all slots after, s", "command, s", "placed"]
    names = ("trials", "completed", "full_share", "hand_over_s", "hand_over_max_s", "start_s", "fill_s", "command_s")
    rows = [
        [name, *(one[key] for key in names), ", ".join(f"{count} on {kind}" for kind, count in one["placed"].items())]
        for name, one in result["sweeps"].items()
    ]
    where = (
        f"{result['nodes']} simulated nodes × {result['gpus_a_node']} GPUs, half T4, half A100, "
        f"{result['nodes_a_trial']} node(s) a trial; {describe(result['machine'])}"
    )
    busy = f"GPUs busy from the first trial to the last: {result['busy_share']:.1%}; a trial: {result['trial_s']:.1f} s"
    return "\n".join([where, "", table(header, rows), "", busy])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=8, help="an even number (default: %(default)s)")
    parser.add_argument("--gpus", type=int, default=8, help="of each node (default: %(default)s)")
    parser.add_argument("--nodes-a-trial", type=int, default=1, help="all GPUs of so many (default: %(default)s)")
    parser.add_argument("--trials", type=int, default=12, help="of each sweep (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="of a trial, a second each (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured there")
    arguments = parser.parse_args()
    slots, rest = divmod(arguments.nodes, 2 * arguments.nodes_a_trial)
    if rest or arguments.trials <= slots:
        parser.error("both types are to have nodes for whole trials, and --trials is to be more than they hold at once")
    measure_and_tell("cloud", arguments, run_all, render)


if __name__ == "__main__":
    main()
