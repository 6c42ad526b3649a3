"""What telling of an evaluation takes out of the training loop: ours, and Ray Train's `report`, side by side.

    python -m benchmarks.report_cost                          # a minute on 2 cores
    python -m benchmarks.report_cost --reports 5000 --json report_cost.json

- ours: a process forked from a trial's template writes the step's line and sends its progress, as `training_loop.train`
  does; the reader at the pipe's other end is the one of a real worker (`sweep.trial_messages`).
- ray: the same numbers through `ray.train.report` in a TorchTrainer's worker, Ray's defaults: a fiftieth as many, since
  each waits for Ray Train's controller to look.

Between two reports the loop computes for `--work-ms`. Milliseconds a report, as the loop's own clock has them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.sweeps import describe, environ, machine, measure_and_tell, table
from benchmarks.trivial_training import point_at, progress_at
from orchestrator.results.records import MetricPoint
from orchestrator.sweep.trial_messages import messages
from orchestrator.sweep.worker import TEMPLATE
from orchestrator.training.task import TrialEnd, TrialProgress


def timed(reports: int, work_s: float, report: Callable[[MetricPoint], None]) -> list[float]:
    """Seconds of each."""
    found = []
    for step in range(1, reports + 1):
        until = time.perf_counter() + work_s
        while time.perf_counter() < until:
            pass
        point = point_at(step, 1e-3, step * work_s, evaluated=True)
        started = time.perf_counter()
        report(point)
        found.append(time.perf_counter() - started)
    return found


def loop_of_ours(reports: int, work_s: float, curve: str, out: str, pipe: Connection) -> None:
    """In the child."""
    from orchestrator.results.records import TrialStatus
    from orchestrator.training.ledger import open_metrics
    from orchestrator.training.training_loop import write_point

    with open_metrics(Path(curve)) as metrics:

        def report(point: MetricPoint) -> None:
            write_point(metrics, point)
            pipe.send(progress_at(point))

        found = timed(reports, work_s, report)
    Path(out).write_text(json.dumps(found))
    pipe.send(TrialEnd(TrialStatus.COMPLETED, None, None))


def run_ours(reports: int, work_s: float, folder: Path) -> list[float]:
    """One trial's process, and its worker's reading."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([TEMPLATE])
    reader, writer = multiprocessing.Pipe(duplex=False)
    out = folder / "ours.json"
    process = context.Process(
        target=loop_of_ours, args=(reports, work_s, str(folder / "metrics.jsonl"), str(out), writer), daemon=True
    )
    process.start()
    writer.close()
    told = sum(isinstance(message, TrialProgress) for message in messages(reader, process, None))
    process.join()
    if told != reports:
        raise RuntimeError(f"{told} of {reports} reports arrived")
    found: list[float] = json.loads(out.read_text())
    return found


def loop_of_ray(config: dict[str, Any]) -> None:
    """In Ray Train's worker."""
    import ray.train

    def report(point: MetricPoint) -> None:
        ray.train.report(asdict(progress_at(point)) | {"last": point.model_dump(), "best": point.model_dump()})

    Path(config["out"]).write_text(json.dumps(timed(config["reports"], config["work_s"], report)))


def run_ray(reports: int, work_s: float, folder: Path) -> list[float]:
    """One TorchTrainer."""
    import ray
    import ray.train
    from ray.train.torch import TorchTrainer

    ray.init(
        log_to_driver=False, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": environ()["PYTHONPATH"]}}
    )
    out = folder / "ray.json"
    TorchTrainer(
        loop_of_ray,
        train_loop_config={"reports": reports, "work_s": work_s, "out": str(out)},
        scaling_config=ray.train.ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
        run_config=ray.train.RunConfig(storage_path=str(folder / "train")),
    ).fit()
    ray.shutdown()
    found: list[float] = json.loads(out.read_text())
    return found


def run_all(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Ours, then Ray's."""
    about, work_s = machine(), arguments.work_ms / 1000
    seconds = {
        "ours": run_ours(arguments.reports, work_s, folder),
        "ray": run_ray(max(10, arguments.reports // 50), work_s, folder),
    }
    return {"machine": about, "reports": arguments.reports, "seconds": seconds}


def render(result: dict[str, Any]) -> str:
    """The table."""
    rows = []
    for name, seconds in result["seconds"].items():
        ordered = sorted(second * 1000 for second in seconds)
        rows.append([name, statistics.mean(ordered), statistics.median(ordered), ordered[len(ordered) * 99 // 100]])
    ratio = statistics.mean(result["seconds"]["ray"]) / statistics.mean(result["seconds"]["ours"])
    header = ["milliseconds a report", "mean", "median", "99th percentile"]
    return "\n".join([describe(result["machine"]), "", table(header, rows), "", f"ray over ours, means: {ratio:.1f}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reports", type=int, default=1000, help="of ours (default: %(default)s)")
    parser.add_argument("--work-ms", type=float, default=20.0, help="between two (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured there")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    measure_and_tell("report-cost", parser.parse_args(), run_all, render)


if __name__ == "__main__":
    main()
