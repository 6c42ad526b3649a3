"""A sweep on a cloud of two types of GPU that are not there: are the GPUs kept busy, and only those it should take?

    python -m benchmarks.cloud                                  # 4 nodes × 2 GPUs, 24 trials
    python -m benchmarks.cloud --nodes 64 --gpus 8 --trials 5120 --slots 512     # where some 500 processes have room

`orchestrator run` itself on a cluster simulated on this machine (`ray.cluster_utils.Cluster`): half of the nodes say
that they have T4s, half A100s. All but the training is real; `trivial_training.py` says what stands in its place. The
sweep file names no type: the trials fit on either, so all of them are to run on the smaller one.

- busy: of the seconds that the slots had from the first trial's start to the last one's end, the share that trials
  worked. A slot's first start, in which a worker group comes up, is told apart (start-up).
- placed: placement groups that were seen while it ran, by the type of the node that they lay on.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.sweeps import Ran, describe, environ, machine, measure_and_tell, run_sweep, say, startups, table

TYPES = ("T4", "A100")
SAMPLE_S = 1.0


def sweep_of(trials: int, slots: int, steps: int) -> dict[str, Any]:
    """The sweep file; `steps` of 20 ms each."""
    return {
        "name": "cloud",
        "model": "builtin:tiny-llama",
        "data": {"train": "builtin:python-docstrings", "eval": 0.01, "format": "prompt_completion"},
        "trial": {
            "precision": "fp32",
            "global_batch_size": 4,
            "micro_batch_size": 4,
            "max_steps": steps,
            "eval_every": max(1, steps // 4),
        },
        "space": {"learning_rate": [round(1e-5 * 1.001**number, 12) for number in range(trials)]},
        "resources": {"workers_per_trial": 1, "gpus_per_worker": 1, "cpus_per_worker": 1, "max_concurrent": slots},
    }


@contextlib.contextmanager
def cloud_of(nodes: int, gpus: int) -> Iterator[str]:
    """The address of a cluster: a head without CPUs, and nodes with so many GPUs of either type in turn."""
    os.environ.update(environ())
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for number in range(nodes):
            resources = {f"accelerator_type:{TYPES[number % 2]}": 1.0}
            cluster.add_node(wait=False, num_cpus=gpus, num_gpus=gpus, resources=resources)
        cluster.wait_for_nodes()
        yield cluster.address
    finally:
        cluster.shutdown()


class Placements:
    """Where worker groups lay, seen from beside the sweep."""

    def __init__(self, address: str) -> None:
        self._address = address
        self.of_group: dict[str, frozenset[str]] = {}

    def watch(self, process: subprocess.Popen[str]) -> None:
        """Look until the process ends."""
        import ray

        ray.init(address=self._address, log_to_driver=False, logging_level="ERROR")
        try:
            while process.poll() is None:
                self._look()
                time.sleep(SAMPLE_S)
        finally:
            ray.shutdown()

    def _look(self) -> None:
        import ray
        from ray.util import placement_group_table

        kinds = {node["NodeID"]: _type_of(node["Resources"]) for node in ray.nodes()}
        for group_id, group in placement_group_table().items():
            # Tune's own slots take a byte of memory and no GPU.
            if group["state"] == "CREATED" and any("GPU" in bundle for bundle in group["bundles"].values()):
                on = frozenset(kinds[node] for node in group["bundles_to_node_id"].values() if node in kinds)
                self.of_group[group_id] = on

    def counted(self) -> dict[str, int]:
        """Groups by the types that they lay on."""
        return dict(Counter("+".join(sorted(on)) for on in self.of_group.values()))


def _type_of(resources: dict[str, float]) -> str:
    return next((kind for kind in TYPES if f"accelerator_type:{kind}" in resources), "head")


def busy_share(ran: Ran, slots: int) -> tuple[float, float]:
    """The share of the slots' time that trials worked, and seconds until the last slot had its first trial."""
    works = sorted(ran.works(), key=lambda work: work.started)
    first, _ = startups(works, slots, ran.launched)
    whole = max(work.ended for work in works) - works[0].started
    return sum(work.seconds for work in works) / (whole * slots), max(first)


def run_all(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One cloud, one sweep."""
    about = machine()
    say(describe(about))
    with cloud_of(arguments.nodes, arguments.gpus) as address:
        seen = Placements(address)
        hook = {"RAY_RUNTIME_ENV_HOOK": "benchmarks.trivial_training.runtime_env_hook"}
        raw = sweep_of(arguments.trials, arguments.slots, arguments.steps)
        ran = run_sweep(folder, raw, "--address", address, environment=hook, watch=seen.watch)
    share, start_s = busy_share(ran, arguments.slots)
    return {
        "machine": about,
        "nodes": arguments.nodes,
        "gpus_a_node": arguments.gpus,
        "trials": arguments.trials,
        "slots": arguments.slots,
        "completed": sum(trial.status.value == "completed" for trial in ran.sweep.trials),
        "busy_share": share,
        "start_s": start_s,
        "command_s": ran.command_s,
        "placed": seen.counted(),
    }


def render(result: dict[str, Any]) -> str:
    """The table."""
    placed = ", ".join(f"{count} on {kind}" for kind, count in result["placed"].items())
    row = [result[name] for name in ("trials", "completed", "slots", "busy_share", "start_s", "command_s")]
    header = ["trials", "completed", "slots", "busy", "start-up, s", "command, s", "placed"]
    where = f"{result['nodes']} simulated nodes × {result['gpus_a_node']} GPUs, half T4, half A100; "
    return "\n".join([where + describe(result["machine"]), "", table(header, [[*row, placed]])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument("--gpus", type=int, default=2, help="of each node (default: %(default)s)")
    parser.add_argument("--trials", type=int, default=24, help="(default: %(default)s)")
    parser.add_argument("--slots", type=int, default=4, help="trials at a time (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="of a trial, 20 ms each (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured there")
    measure_and_tell("cloud", parser.parse_args(), run_all, render)


if __name__ == "__main__":
    main()
