"""Workers of one trial as processes of their own, without Ray."""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from orchestrator.config.trial_config import TrialConfig
from orchestrator.results.folders import TrialFolder
from orchestrator.results.records import MetricPoint
from orchestrator.training.task import Alive, TrialEnd, TrialProgress, TrialTask, WorkerPlace

LIMIT_S = 120.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the workers sent."""

    ends: tuple[TrialEnd, ...]
    reports: tuple[TrialProgress, ...]
    folder: TrialFolder

    @property
    def end(self) -> TrialEnd:
        """Worker 0's."""
        return self.ends[0]

    @property
    def points(self) -> tuple[MetricPoint, ...]:
        """The curve."""
        return self.folder.read_metrics()

    @property
    def losses(self) -> list[float]:
        """Of each step."""
        return [point.loss for point in self.points if point.loss is not None]

    @property
    def log(self) -> str:
        """What worker 0 printed."""
        return self.folder.log.read_text(encoding="utf-8")


def make_task(config: TrialConfig, model: Path, data: Path, trial: Path, metric: str = "eval_loss") -> TrialTask:
    """A task with this configuration."""
    return TrialTask(trial.name, config, str(model), str(data), str(trial), metric, "min")


def run_trial(task: TrialTask, workers: int = 1, more_address_space_bytes: int | None = None) -> Outcome:
    """Run a trial in fresh processes and collect what they send.

    more_address_space_bytes: how much a worker may map on top of what its imports have mapped.
    """
    ends, reports = [], []
    for message in itertools.chain(*in_workers(workers, _worker, task, more_address_space_bytes)):
        if isinstance(message, Alive):
            continue
        (ends if isinstance(message, TrialEnd) else reports).append(message)
    return Outcome(tuple(ends), tuple(reports), TrialFolder(Path(task.trial_folder)))


def in_workers(workers: int, target: Callable[..., None], *arguments: object) -> list[list[Any]]:
    """What `target(place, pipe, *arguments)` sends through its pipe in each of so many fresh processes, by rank."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["orchestrator.training.template"])
    port_reader, port_writer = context.Pipe(duplex=False)
    closer_reader, closer_writer = context.Pipe(duplex=False)
    keeper = context.Process(target=_keep_store, args=(port_writer, closer_reader), daemon=True)
    keeper.start()
    port = port_reader.recv()
    pipes = [context.Pipe(duplex=False) for _ in range(workers)]
    processes = [
        context.Process(
            target=target,
            args=(WorkerPlace(rank, workers, rank, "127.0.0.1", port, "trial"), pipe[1], *arguments),
            daemon=True,
        )
        for rank, pipe in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    for _, writer in pipes:
        writer.close()
    received = [_received(reader) for reader, _ in pipes]
    closer_writer.send(None)
    for process in [*processes, keeper]:
        process.join(LIMIT_S)
    return received


def _received(reader: Connection) -> list[Any]:
    messages: list[Any] = []
    while reader.poll(LIMIT_S):
        try:
            messages.append(reader.recv())
        except EOFError:
            return messages
    raise TimeoutError(f"a worker was silent for {LIMIT_S} s")


def _keep_store(port: Connection, closer: Connection) -> None:
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port.send(store.port)
    closer.poll(LIMIT_S * 2)
    del store


def _worker(place: WorkerPlace, pipe: Connection, task: TrialTask, more_address_space_bytes: int | None) -> None:
    import resource

    import psutil

    from orchestrator.training import worker_process

    if more_address_space_bytes is not None:
        limit_bytes = psutil.Process().memory_info().vms + more_address_space_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))
    worker_process.run(task, place, pipe.send)
