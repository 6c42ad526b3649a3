"""The TorchTrainers whose workers serve trial after trial, or one trial each (`--isolation fresh`).

Every worker holds a template process with all imports done, and forks one process a trial from it: fresh memory,
fresh CUDA context, fresh process group. See docs/decisions/0001-warm-worker-groups.md.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray
from ray.util import remove_placement_group
from ray.util.placement_group import NODE_ID_LABEL_KEY

from orchestrator.errors import StorageError
from orchestrator.results.files import require_there
from orchestrator.sweep.worker import GroupShape, WorkerConfig, serve

log = logging.getLogger(__name__)
CLOSE_LIMIT_S = 20.0
HURRIED_CLOSE_LIMIT_S = 5.0
"""Where the sweep was interrupted: its workers may wait for a store that is away."""
UNUSED = frozenset({"DatasetsCallback", "PlacementGroupCleanerCallback"})
"""Parts of Ray Train's controller that start a process each for every group (ray 2.60.0): one for Ray Data's datasets,
of which there are none, and one that removes a dead controller's placement group, which `_fit` does."""


class WorkerGroups:
    """All worker groups of a sweep: an asynchronous Ray actor, the one process of ours that TorchTrainers start from.

    A slot that ran its TorchTrainer itself would import torch for nothing but that: 5 s and 300 MB, for every slot.
    """

    def __init__(self, board: Any, shape: GroupShape, model: str, storage: str, ahead: int) -> None:
        """`ahead` is how many groups the first slots will find there, or on their way."""
        # Here and not above: the driver, which makes this actor, needs no torch either.
        import ray.train.torch
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        self._board, self._shape, self._model, self._storage = board, shape, model, storage
        # The trials' processes meet here: a store that outlives them all, so that no port is searched for each.
        self._host = ray.util.get_node_ip_address()
        self._store = TCPStore(self._host, 0, is_master=True, wait_for_workers=False)
        # A thread waits for each TorchTrainer; there are never more than slots, and a few that close.
        self._threads = ThreadPoolExecutor(10_000)
        self._open: dict[str, asyncio.Future[None]] = {}
        self._to_start = ahead
        self._ahead: list[asyncio.Task[str]] = []

    async def start_ahead(self) -> None:
        """Start the first groups, once: a slot's `open`, whose call may overtake this one, does so too.

        Started beside those that slots had opened, they would hold room that nobody asks for.
        """
        self._ahead += [asyncio.create_task(self._start()) for _ in range(self._to_start)]
        self._to_start = 0

    async def open(self, avoided: Collection[str] = ()) -> str:
        """A group's id, its workers there or on their way.

        avoided: ids of nodes that they are not to lie on.
        """
        await self.start_ahead()
        while self._ahead and not avoided:
            group_id = await self._ahead.pop(0)
            if await self.is_alive(group_id):
                return group_id
        return await self._start(avoided)

    async def is_alive(self, group_id: str) -> bool:
        """Whether its workers can take another trial."""
        return group_id in self._open and not self._open[group_id].done()

    async def close(self, group_id: str, limit_s: float = CLOSE_LIMIT_S) -> None:
        """Let the workers end; returns when the trainer gave its resources back, or after `limit_s`."""
        await self._board.close_group.remote(group_id)
        if trainer := self._open.pop(group_id, None):
            await asyncio.wait([trainer], timeout=limit_s)

    async def close_all(self, limit_s: float = CLOSE_LIMIT_S) -> None:
        """The sweep is over."""
        self._to_start = 0
        await asyncio.gather(*self._ahead)
        await asyncio.gather(*(self.close(group_id, limit_s) for group_id in list(self._open)))

    async def life(self) -> None:
        """Returns never: who waits for it hears of this actor's death."""
        await asyncio.Event().wait()

    async def _start(self, avoided: Collection[str] = ()) -> str:
        group_id = uuid.uuid4().hex[:12]
        await self._board.open_group.remote(group_id, self._shape.workers, self._host, self._store.port)
        self._open[group_id] = asyncio.get_running_loop().run_in_executor(self._threads, self._fit, group_id, avoided)
        return group_id

    def _fit(self, group_id: str, avoided: Collection[str]) -> None:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        class LeanTrainer(TorchTrainer):
            """Where another Ray calls it otherwise, the processes are started and do no harm."""

            def _create_default_callbacks(self) -> list[Any]:
                parts = super()._create_default_callbacks()  # type: ignore[misc]
                return [part for part in parts if type(part).__name__ not in UNUSED]

        shape = self._shape
        trainer = LeanTrainer(
            serve,
            train_loop_config={"board": self._board, "group_id": group_id, "model": self._model, "shape": shape},
            torch_config=WorkerConfig(),  # type: ignore[arg-type]
            # Train V2 has it; types are V1's (ray 2.60.0).
            scaling_config=ScalingConfig(  # type: ignore[call-arg]
                num_workers=shape.workers,
                use_gpu=bool(shape.gpus_per_worker),
                resources_per_worker=shape.bundle,
                placement_strategy="STRICT_PACK" if shape.on_one_node else "PACK",
                label_selector={NODE_ID_LABEL_KEY: f"!in({','.join(avoided)})"} if avoided else None,
            ),
            run_config=RunConfig(
                name=f"group-{group_id}",
                storage_path=self._storage,
                # Of a node that was drained Ray would start the workers again itself, without end, and their processes
                # would meet under names that are taken (2.60.0, api/config.py): what follows is failure_policy's.
                failure_config=FailureConfig(max_preemption_failures=0),  # type: ignore[call-arg]
            ),
        )
        try:
            # Ray makes its own folder there, with all above it.
            require_there(Path(self._storage).parents[1])
            trainer.fit()
        except Exception as error:
            # Whatever Ray raises here means the same: this group is gone, and its trial needs another.
            log.warning("worker group %s is gone: %s", group_id, error)
            reason = why_lost(error)
            ranks = tuple(getattr(error, "worker_failures", ()))
            room: Any = ray.get(self._board.lose_group.remote(group_id, reason, ranks))
            if room is not None:
                # A controller that was killed leaves it behind, and with it what the next group would need.
                remove_placement_group(room)


def why_lost(error: Exception) -> str:
    """What took a group's workers, by what `TorchTrainer.fit` raised."""
    if isinstance(error, StorageError):
        return str(error)
    # Ray Train wraps what took a worker (ray 2.60.0, train/v2/_internal/execution/worker_group/worker_group.py).
    deaths = [getattr(one, "health_check_failure", one) for one in getattr(error, "worker_failures", {}).values()]
    if any(isinstance(death, ray.exceptions.OutOfMemoryError) for death in deaths):
        # No word on what the trial needs: it may have been another's greed, and Ray chooses whom it ends.
        return (
            "Ray's memory monitor ended a worker, since its node was running out of host memory: lower "
            "resources.max_concurrent, take nodes with more memory, or, without GPUs, set resources.memory_per_worker"
        )
    return f"a worker or its node died ({type(error).__name__}: {_first_line(error)})"


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "")[:300]
