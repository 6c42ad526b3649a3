"""The TorchTrainer whose workers serve trial after trial, or one trial each (`--isolation fresh`).

Every worker holds a template process with all imports done, and forks one process a trial from it: fresh memory,
fresh CUDA context, fresh process group. See docs/decisions/0001-warm-worker-groups.md.
"""

from __future__ import annotations

import logging
import threading
import uuid
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchTrainer
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from orchestrator.sweep.cluster import worker_bundle
from orchestrator.sweep.worker import GroupShape, WorkerConfig, serve
from orchestrator.training.task import TrialTask

log = logging.getLogger(__name__)
CLOSE_LIMIT_S = 20.0


class WorkerGroup:
    """One TorchTrainer and its workers, from the trial's side."""

    def __init__(self, board: Any, shape: GroupShape, model: str, storage: str) -> None:
        self.shape = shape
        self._board = board
        self._id = uuid.uuid4().hex[:12]
        # The trials' processes meet here: a store that outlives them all, so that no port is searched for each.
        host = ray.util.get_node_ip_address()
        self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        ray.get(board.open_group.remote(self._id, shape.workers, host, self._store.port))
        self._thread = threading.Thread(target=self._serve, args=(model, storage), daemon=True)
        self._thread.start()

    def assign(self, task: TrialTask) -> None:
        """Hand a trial to the workers; they start as soon as they are there."""
        ray.get(self._board.assign.remote(self._id, task))

    @property
    def is_alive(self) -> bool:
        """Whether the workers can take another trial."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Let the workers end; returns when the trainer gave its resources back."""
        ray.get(self._board.close_group.remote(self._id))
        self._thread.join(CLOSE_LIMIT_S)

    def _serve(self, model: str, storage: str) -> None:
        shape = self.shape
        trainer = TorchTrainer(
            serve,
            train_loop_config={"board": self._board, "group_id": self._id, "model": model, "shape": shape},
            torch_config=WorkerConfig(),  # type: ignore[arg-type]
            scaling_config=ray.train.ScalingConfig(
                num_workers=shape.workers,
                use_gpu=bool(shape.gpus_per_worker),
                resources_per_worker=worker_bundle(shape),
                placement_strategy="STRICT_PACK" if shape.on_one_node else "PACK",
            ),
            run_config=ray.train.RunConfig(name=f"group-{self._id}", storage_path=storage),
        )
        try:
            trainer.fit()
        except Exception as error:
            # Whatever Ray raises here means the same: this group is gone, and its trial needs another.
            log.warning("worker group %s is gone: %s", self._id, error)
            reason = f"a worker or its node died ({type(error).__name__}: {_first_line(error)})"
            ray.get(self._board.lose_group.remote(self._id, reason))


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "")[:300]
