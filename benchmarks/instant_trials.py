"""`orchestrator run` with trials that end at once: what the driver keeps of each, without the time that processes take.

    python -m benchmarks.instant_trials run sweep.yaml

Tune, slots, switchboard, records, MLflow and report are real. Replaced are the worker groups: the switchboard writes a
trial's curve itself and says that it has ended. benchmarks/driver_memory.py measures this process.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Collection
from pathlib import Path
from typing import Any

from benchmarks.trivial_training import point_at, progress_at
from orchestrator.cli import app
from orchestrator.results.folders import TrialFolder
from orchestrator.results.records import TrialStatus
from orchestrator.sweep import cluster, preparation
from orchestrator.sweep.switchboard import Switchboard
from orchestrator.training.task import TrialEnd, TrialTask

TRIAL_S = 0.05
GROUP_START_S = 40.0
"""As real groups take: Tune gives a trial to whichever slot is free, and ends the one that was starting for it (ray
2.60.0): with trials that are shorter than a slot's start there would only ever be one."""


class InstantBoard(Switchboard):
    """Plays the workers of every group, too."""

    async def assign(self, group_id: str, task: TrialTask) -> None:
        await super().assign(group_id, task)
        turn = self._groups[group_id].begun
        await asyncio.sleep(TRIAL_S)
        points = [point_at(step, task.config.learning_rate, step * TRIAL_S, step % 2 == 0) for step in range(1, 7)]
        folder = TrialFolder(Path(task.trial_folder))
        folder.root.mkdir(parents=True, exist_ok=True)
        folder.metrics.write_text("".join(point.model_dump_json(exclude_none=True) + "\n" for point in points))
        for reported in points[1::2]:
            progress = progress_at(reported)
            await self.send(group_id, turn, 0, progress)
        await self.send(group_id, turn, 0, TrialEnd(TrialStatus.COMPLETED, None, progress))


class InstantGroups:
    """Names of groups without workers."""

    def __init__(self, board: Any) -> None:
        self._board = board

    async def start_ahead(self) -> None:
        pass

    async def open(self, avoided: Collection[str] = ()) -> str:  # noqa: ARG002
        await asyncio.sleep(GROUP_START_S)
        group_id = uuid.uuid4().hex
        await self._board.open_group.remote(group_id, 1, "", 0)
        return group_id

    async def is_alive(self, group_id: str) -> bool:
        return bool(group_id)

    async def close(self, group_id: str) -> None:
        await self._board.close_group.remote(group_id)

    async def close_all(self, limit_s: float = 0.0) -> None:
        pass

    async def life(self) -> None:
        await asyncio.Event().wait()


def start_board() -> Any:
    return cluster._beside_the_driver(InstantBoard).remote()


def start_groups(board: Any, *_: Any) -> Any:
    return cluster._beside_the_driver(InstantGroups).remote(board)


if __name__ == "__main__":
    cluster.start_switchboard, cluster.start_groups = start_board, start_groups
    assert preparation.cluster is cluster
    app()
