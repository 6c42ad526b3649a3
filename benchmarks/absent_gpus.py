"""Worker groups on GPUs that are not there: they take their room on the cluster, and start no process in it.

Ray calls `runtime_env_hook` in the driver where RAY_RUNTIME_ENV_HOOK names it. From that, every Ray worker of the job
calls `replace_trainer` before its first task: the sweep's worker groups then find `TorchTrainer` below in place of Ray
Train's. It asks for the placement group that Ray Train would ask for; its workers are coroutines that speak with the
switchboard as `sweep.worker.serve` does, and train by waiting. Ray Tune, slots, switchboard, groups, records, MLflow
and report are real.
"""

from __future__ import annotations

import asyncio
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.trivial_training import point_at

if TYPE_CHECKING:
    from orchestrator.sweep.switchboard import Assignment
    from orchestrator.training.task import TrialProgress, TrialTask

STEP_S = 1.0
ROOM_LIMIT_S = 300.0
NODE_LIMIT_S = 900.0


def runtime_env_hook(runtime_env: dict[str, Any] | None) -> dict[str, Any]:
    """What `ray.init` makes of the job's runtime environment."""
    from orchestrator.sweep import cluster

    # Every node is asked for the storage by a first worker of its own, and here all of them start on a few cores.
    cluster.NODE_LIMIT_S = NODE_LIMIT_S
    return {**(runtime_env or {}), "worker_process_setup_hook": f"{__name__}.replace_trainer"}


def replace_trainer() -> None:
    """In a Ray worker, before anything imports Ray Train's own."""
    module = types.ModuleType("ray.train.torch")
    module.TorchTrainer = TorchTrainer  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module


class TorchTrainer:
    """As `sweep.worker_group` uses Ray Train's."""

    def __init__(
        self,
        train_loop_per_worker: Callable[[dict[str, Any]], None],  # noqa: ARG002
        *,
        train_loop_config: dict[str, Any],
        scaling_config: Any,
        **more: Any,  # noqa: ARG002
    ) -> None:
        self._board, self._group_id = train_loop_config["board"], train_loop_config["group_id"]
        self._scaling = scaling_config

    def fit(self) -> None:
        """Hold the room until the group is closed."""
        from ray.util import placement_group, placement_group_table, remove_placement_group

        scaling = self._scaling
        bundles = [dict(scaling.resources_per_worker) for _ in range(scaling.num_workers)]
        room = placement_group(bundles, strategy=scaling.placement_strategy)
        try:
            if not room.wait(ROOM_LIMIT_S):
                raise TimeoutError(f"no room for a worker group in {ROOM_LIMIT_S:.0f} s")
            nodes = placement_group_table(room)["bundles_to_node_id"]
            asyncio.run(self._work([nodes[bundle] for bundle in sorted(nodes)]))
        finally:
            remove_placement_group(room)

    async def _work(self, nodes: list[str]) -> None:
        places = [(rank, nodes[:rank].count(node), node) for rank, node in enumerate(nodes)]
        where = ",".join(sorted(set(nodes)))
        await asyncio.gather(*(_Worker(self._board, self._group_id, *place, where).serve() for place in places))


@dataclass(frozen=True, slots=True)
class _Worker:
    """One worker of a group, as the switchboard sees it."""

    board: Any
    group_id: str
    rank: int
    local_rank: int
    node: str
    where: str
    """All nodes of the group; of one, its id."""

    async def serve(self) -> None:
        """Wait for a trial, train it, wait again."""
        from orchestrator.results.records import TrialStatus
        from orchestrator.training.task import TrialEnd, WorkerNode

        await self.board.come_up.remote(self.group_id, self.rank, WorkerNode(self.node, self.node))
        turn = 0
        while assignment := await self._next(turn):
            turn = assignment.turn
            progress = await self._train(assignment.task) if self.rank == 0 else None
            self._send(turn, TrialEnd(TrialStatus.COMPLETED, None, progress))

    async def _next(self, turn: int) -> Assignment | None:
        found: Assignment | None = await self.board.next_assignment.remote(
            self.group_id, self.rank, self.local_rank, turn
        )
        return found

    def _send(self, turn: int, message: Any) -> None:
        self.board.send.remote(self.group_id, turn, self.rank, message)

    async def _train(self, task: TrialTask) -> TrialProgress:
        """Its curve, with made-up losses; the first worker's part, for which the others wait."""
        from orchestrator.results.folders import TrialFolder

        file = TrialFolder(Path(task.trial_folder)).metrics
        file.parent.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        with file.open("w", encoding="utf-8", buffering=1) as metrics:
            for step in range(1, task.config.max_steps + 1):
                await asyncio.sleep(started + step * STEP_S - time.monotonic())
                point = point_at(step, task.config.learning_rate, time.monotonic() - started, evaluated=True)
                metrics.write(point.model_dump_json(exclude_none=True) + "\n")
        return _progress(point, self.where)


def _progress(point: Any, where: str) -> TrialProgress:
    from orchestrator.training.task import TrialProgress

    return TrialProgress(
        last=point,
        best=point,
        trainable_parameters=0,
        startup_s=0.0,
        data_s=0.0,
        model_s=0.0,
        training_s=point.seconds,
        evaluation_s=0.0,
        saving_s=0.0,
        peak_memory_bytes=point.peak_memory_bytes,
        reserved_bytes=None,
        memory_kind="cuda_allocated",
        device="none",
        host=where,
        has_adapter=False,
    )
