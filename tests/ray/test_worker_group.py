"""One warm group in this process's own cluster: what one trial does must not be felt by the next."""

from __future__ import annotations

import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray import tune
from ray.util import placement_group_table

from orchestrator.config.sweep_config import DataConfig
from orchestrator.config.trial_config import TrialConfig
from orchestrator.results.folders import TrialFolder
from orchestrator.results.records import TrialStatus
from orchestrator.sweep import cluster
from orchestrator.sweep.trial import TrialOnWorkers
from orchestrator.sweep.worker import GroupShape
from orchestrator.training import data, model_source
from orchestrator.training.task import TrialEnd, TrialProgress, TrialTask
from tests.ray.sweeps import command_of
from tests.waiting import wait_until

pytestmark = pytest.mark.timeout(600)
MODEL = "builtin:tiny-llama"
LIMIT_S = 120.0
SECRET = "hf_" + "A1b2C3d4" * 4


@dataclass
class Bench:
    """A board, a group, and the worker's process."""

    board: Any
    groups: Any
    group: str
    data_folder: Path
    folder: Path
    count: int = 0
    earlier: frozenset[int] = frozenset()

    def task(self, time_limit_s: float | None = None, **settings: object) -> TrialTask:
        self.count += 1
        trial_id = f"t-{self.count}"
        small = {"precision": "fp32", "global_batch_size": 2, "micro_batch_size": 2, "sequence_length": 16, "rank": 2}
        config = TrialConfig.model_validate(small | {"max_steps": 2, "eval_every": 1} | settings)
        where = (str(self.data_folder), str(self.folder / trial_id))
        return TrialTask(trial_id, config, "", *where, "eval_loss", "min", time_limit_s=time_limit_s)

    def assign(self, time_limit_s: float | None = None, **settings: object) -> str:
        return self.hand_out(self.task(time_limit_s, **settings))

    def hand_out(self, task: TrialTask) -> str:
        # A trial's process outlives its last word by a moment.
        self.earlier = frozenset(p.pid for p in psutil.Process().children(recursive=True))
        ray.get(self.board.assign.remote(self.group, task))
        return task.trial_id

    def end_of(self, trial_id: str) -> TrialEnd:
        while isinstance(event := ray.get(self.board.next_event.remote(trial_id), timeout=LIMIT_S), TrialProgress):
            continue
        return event

    def run(self, **settings: object) -> TrialEnd:
        return self.end_of(self.assign(**settings))

    def process(self) -> psutil.Process:
        """The Ray worker that serves this group."""
        below = psutil.Process().children(recursive=True)
        return next(p for p in below if "RayTrainWorker" in command_of(p))

    def trial_process(self) -> psutil.Process:
        def look() -> list[psutil.Process]:
            template = [p for p in self.process().children() if "forkserver" in command_of(p)]
            return [child for p in template for child in p.children() if child.pid not in self.earlier]

        return wait_until(look, bool, LIMIT_S)[0]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    os.environ["RAY_AUTH_MODE"] = "disabled"
    folder = tmp_path_factory.mktemp("bench")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(f'{{"text": "{"word " * (5 + i % 9)}"}}\n' for i in range(40)))
    data.prepare(
        DataConfig(train=str(rows), eval=0.1), model_source.materialize(model_source.resolve(MODEL)), folder / "data"
    )
    cluster.connect(None)
    board = cluster.start_switchboard()
    groups = cluster.start_groups(board, GroupShape(1, 0, 1), MODEL, folder / "groups", ahead=1)
    made = Bench(board, groups, ray.get(groups.open.remote()), folder / "data", folder)
    # Up, whichever test is the first: they look for its processes at once.
    made.run()
    yield made
    ray.get(groups.close_all.remote())
    cluster.disconnect()


def test_the_group_that_was_started_ahead_is_the_one_that_is_opened(bench: Bench) -> None:
    ray.get(bench.groups.start_ahead.remote())
    assert bench.run().status is TrialStatus.COMPLETED
    assert [g["state"] for g in placement_group_table().values()] == ["CREATED"]


def test_fifty_trials_in_one_group_leave_memory_handles_and_threads_as_they_were(bench: Bench) -> None:
    def held() -> tuple[int, int, int]:
        both = [bench.process(), *bench.process().children()]
        return (
            # Anonymous memory: what is unique to a process changes with every child that shares its pages.
            sum(p.memory_info().rss - p.memory_info().shared for p in both),
            sum(p.num_fds() for p in both),
            sum(p.num_threads() for p in both),
        )

    stages = [0, 1, 2, 3]
    for i in range(8):
        assert bench.run(zero_stage=stages[i % 4]).status is TrialStatus.COMPLETED
    memory_bytes, handles, threads = held()
    for i in range(42):
        assert bench.run(zero_stage=stages[i % 4], seed=i).status is TrialStatus.COMPLETED
    after = held()
    # A process that is just going holds a few for a moment; what every trial left behind would be 42 times as much.
    assert after[0] < memory_bytes + 16 * 2**20
    assert after[1] < handles + 21
    assert after[2] < threads + 21


def leave_no_memory(process: psutil.Process) -> None:
    limit_bytes = process.memory_info().vms + 2**23
    process.rlimit(psutil.RLIMIT_AS, (limit_bytes, limit_bytes))


DEATHS: dict[str, Callable[[psutil.Process], None]] = {
    "killed": lambda process: process.send_signal(signal.SIGKILL),
    "crashed": lambda process: process.send_signal(signal.SIGSEGV),
    "terminated": lambda process: process.send_signal(signal.SIGTERM),
    "hung": lambda process: process.send_signal(signal.SIGSTOP),
    "out of memory": leave_no_memory,
}


@pytest.mark.parametrize("how", DEATHS)
def test_a_trial_that_ends_badly_is_told_and_the_next_one_is_as_ever(bench: Bench, how: str) -> None:
    before = bench.run(seed=7)
    trial_id = bench.assign(
        max_steps=10_000, eval_every=10_000, micro_batch_size=64, global_batch_size=64, time_limit_s=15.0
    )
    process = bench.trial_process()
    log = TrialFolder(bench.folder / trial_id).log
    wait_until(log.exists, bool, LIMIT_S)
    with log.open("a") as file:
        file.write(f"a library prints {SECRET}\n")
    DEATHS[how](process)
    end = bench.end_of(trial_id)
    assert end.status in (TrialStatus.FAILED, TrialStatus.OUT_OF_MEMORY)
    assert end.reason
    assert ("budget.trial_hours" in end.reason) is (how == "hung")
    assert SECRET not in log.read_text()
    after = bench.run(seed=7)
    assert before.progress is not None
    assert after.progress is not None
    assert before.progress.best.eval_loss == after.progress.best.eval_loss


def test_a_stop_ends_the_trial_within_a_tenth_of_a_second_and_the_group_goes_on(bench: Bench) -> None:
    stops_s = []
    for _ in range(5):
        trial_id = bench.assign(max_steps=100_000, eval_every=100_000)
        process = bench.trial_process()
        started = time.perf_counter()
        assert ray.get(bench.board.stop.remote(trial_id, 10.0))
        stops_s.append(time.perf_counter() - started)
        assert not process.is_running()
        assert bench.end_of(trial_id).status is TrialStatus.STOPPED
    # Not a measurement: ten times the contract's figure, so that a busy machine does not fail it.
    assert statistics.median(stops_s) < 1.0
    assert bench.run().status is TrialStatus.COMPLETED


def test_a_slot_that_is_made_for_a_trial_and_not_asked_for_it_leaves_it_to_the_slot_that_is(bench: Bench) -> None:
    # Tune does so where a slot dies with the trial and another falls free before a new one is there.
    task = bench.task(max_steps=100_000, eval_every=100_000)
    bench.hand_out(task)
    at_work = bench.trial_process()
    slot = tune.with_parameters(
        TrialOnWorkers, board=bench.board, groups=bench.groups, shape=GroupShape(1, 0, 1), keeps_group=True
    )
    spare: Any = ray.remote(num_cpus=0)(slot).remote({"task": task})
    ray.get(spare.reset.remote({"task": task}))
    ray.get(spare.stop.remote())
    assert at_work.is_running()
    assert ray.get(bench.board.stop.remote(task.trial_id, LIMIT_S))
    assert bench.end_of(task.trial_id).status is TrialStatus.STOPPED


@pytest.mark.parametrize("killed", ["RayTrainWorker", "TrainController"])
def test_a_group_that_loses_worker_or_controller_takes_template_and_trial_along_says_so_and_gives_its_room_back(
    bench: Bench, killed: str
) -> None:
    mine = {process.pid for process in psutil.Process().children(recursive=True)}
    group = ray.get(bench.groups.open.remote())
    other = Bench(bench.board, bench.groups, group, bench.data_folder, bench.folder / "other", count=1000)

    def new(name: str) -> list[psutil.Process]:
        below = psutil.Process().children(recursive=True)
        return [p for p in below if p.pid not in mine and name in command_of(p)]

    trial_id = other.assign(max_steps=100_000, eval_every=100_000)
    worker = wait_until(lambda: new("RayTrainWorker"), bool, LIMIT_S)[0]
    below = wait_until(lambda: worker.children(recursive=True), lambda seen: len(seen) >= 2, LIMIT_S)
    new(killed)[0].kill()
    end = other.end_of(trial_id)
    assert end.status is TrialStatus.PREEMPTED
    assert psutil.wait_procs([worker, *below], 10)[1] == []
    ray.get(bench.groups.close.remote(group))
    assert not ray.get(bench.groups.is_alive.remote(group))
    wait_until(rooms, lambda seen: seen == 1, LIMIT_S)


def rooms() -> int:
    """Placement groups that hold resources, or wait for them."""
    return sum(group["state"] != "REMOVED" for group in placement_group_table().values())
