"""A trial's state while it trains: written whole, found again by whoever goes on with it.

Tensors and plain values alone, in safetensors files: what is read back from a sweep's folder can run no code.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from orchestrator.config.trial_config import CHANGEABLE
from orchestrator.errors import CheckpointError, StorageError
from orchestrator.results.files import let_read, sync
from orchestrator.results.folders import TrialFolder, checkpoint_part
from orchestrator.training.agreement import all_say_yes, told_by_first
from orchestrator.training.data import read_summary
from orchestrator.training.task import TrialTask, WorkerPlace

log = logging.getLogger(__name__)
FORMAT = 1
INTERVAL_S = 60.0
SHARE = 0.05
"""Checkpoints take no more than about this part of the time."""
INSTEAD = "the trial goes on from the one before, where there is one, or begins again"
# What a file raises that is not there, cut, or not ours; and a state in which a library holds more than plain values.
_UNUSABLE = (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError)


def is_due(evaluated: bool, since_s: float, cost_s: float) -> bool:
    """Whether to write one after this step.

    At every evaluation, and a minute after the last one; later where that would take more than a twentieth of the time.

    since_s: seconds since the last one, or since the trial began.
    cost_s: what the last one took.
    """
    return since_s * SHARE >= cost_s and (evaluated or since_s >= INTERVAL_S)


class Checkpoints:
    """One worker's side of its trial's checkpoints: only the last one is kept; every worker calls every method."""

    def __init__(self, task: TrialTask, place: WorkerPlace, device: torch.device) -> None:
        self._folder, self._place, self._device = TrialFolder(Path(task.trial_folder)), place, device
        self._task = task
        summary = read_summary(Path(task.data_folder))
        self._fits = json.dumps(
            {
                "format": FORMAT,
                "config": task.config.model_dump(mode="json"),
                "workers": place.world_size,
                "device": device.type,
                "data": summary.hash if summary else None,
            }
        )
        """A checkpoint of anything else would go on with another trial."""
        self._last_at, self._cost_s = time.monotonic(), 0.0

    def find(self) -> tuple[int, dict[str, Any]] | None:
        """The step of the last one that all workers can read, and this worker's state; None: begin at the first step.

        All others are removed.
        """
        workers = self._place.world_size
        usable = self._usable() if self._place.rank == 0 else iter(())
        while step := told_by_first(next(usable, 0), self._device, workers):
            state = None
            try:
                state = _read(self._file(self._folder.checkpoint(step)), self._fits)
            except _UNUSABLE as error:
                log.warning("the checkpoint of step %d cannot be read (%s): %s", step, error, INSTEAD)
            if all_say_yes(state is not None, self._device, workers):
                assert state is not None
                self._forget(but=step)
                return step, state
        self._forget()
        return None

    def of_parent(self) -> tuple[int, dict[str, Any]]:
        """The step and this worker's state of the trial that this one begins with; the same in all but CHANGEABLE.

        Raises:
            CheckpointError: it is gone, damaged, or of other settings, data or workers.
        """
        assert self._task.parent_folder
        folder = TrialFolder(Path(self._task.parent_folder)).checkpoint(self._task.first_step)
        try:
            state, why = _read(self._file(folder), self._fits, changes=CHANGEABLE), ""
        except _UNUSABLE as error:
            state, why = None, str(error)
        if all_say_yes(state is not None, self._device, self._place.world_size):
            assert state is not None
            return self._task.first_step, state
        raise CheckpointError(
            f"it cannot begin with {folder} ({why or 'another worker cannot read its part'}): run the sweep with the "
            "workers and data that it began with, or begin anew with another --name"
        )

    def is_due(self, evaluated: bool) -> bool:
        """See the function of this name; worker 0's clock decides."""
        due = is_due(evaluated, time.monotonic() - self._last_at, self._cost_s)
        return bool(told_by_first(int(due), self._device, self._place.world_size))

    def save(self, step: int, state: dict[str, Any], metrics: int) -> bool:
        """Write the state after `step`, then forget the one before; a full disk leaves that one in place.

        metrics: the open curve's file descriptor, which must not be behind the checkpoint after a power cut.
        Returns whether it is there.
        """
        started = time.monotonic()
        partial = self._folder.partial_checkpoint(step)
        try:
            partial.mkdir(exist_ok=True)
            _write(self._file(partial), state, self._fits)
            written = True
        except _UNUSABLE as error:
            # The trial is worth more than its checkpoint.
            log.warning("no checkpoint at step %d (%s): the trial goes on without", step, error)
            written = False
        workers = self._place.world_size
        complete = all_say_yes(written, self._device, workers)
        if self._place.rank == 0:
            complete = self._conclude(step, partial, metrics, complete)
        complete = bool(told_by_first(int(complete), self._device, workers))
        if self._place.local_rank == 0 and self._place.rank:
            # Nodes that share no folder have each its own workers' part.
            complete = self._conclude(step, partial, metrics, complete)
        complete = all_say_yes(complete, self._device, workers)
        self._last_at = time.monotonic()
        self._cost_s = self._last_at - started
        return complete

    def _conclude(self, step: int, partial: Path, metrics: int, complete: bool) -> bool:
        """All workers have written theirs: the checkpoint counts from its rename on."""
        try:
            if complete:
                if self._place.rank == 0:
                    os.fsync(metrics)
                sync(partial)
                partial.rename(self._folder.checkpoint(step))
                sync(self._folder.root)
                self._folder.forget_checkpoints(but=step)
                return True
            shutil.rmtree(partial, ignore_errors=True)
        except (OSError, StorageError) as error:
            if self._place.rank and isinstance(error, FileNotFoundError):
                # In a folder that nodes share the first worker has renamed it.
                return True
            log.warning("no checkpoint at step %d (%s): the trial goes on without", step, error)
        return False

    def _usable(self) -> Iterator[int]:
        """Steps of those that belong to the curve on disk, the last one first."""
        for step in reversed(self._folder.checkpoint_steps()):
            if self._fits_on_disk(step):
                yield step
            else:
                log.warning("the checkpoint of step %d is damaged or of other settings: %s", step, INSTEAD)

    def _fits_on_disk(self, step: int) -> bool:
        try:
            with safe_open(self._file(self._folder.checkpoint(step)), framework="pt") as file:
                fits = (file.metadata() or {}).get("fits") == self._fits
        except _UNUSABLE:
            return False
        return fits and self._folder.curve_bytes(step, self._task.first_step) is not None

    def _forget(self, but: int | None = None) -> None:
        if self._place.local_rank == 0:
            self._folder.forget_checkpoints(but)

    def _file(self, folder: Path) -> Path:
        return folder / checkpoint_part(self._place.rank, self._place.world_size)


def random_states(device: torch.device) -> dict[str, Any]:
    """Of every generator that a trial draws from."""
    _, keys, position, has_gauss, cached = np.random.get_state()
    states = {
        "python": random.getstate(),
        "numpy": [torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    """Draw on as if nothing had been between."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


def _write(file: Path, state: dict[str, Any], fits: str) -> None:
    tensors: dict[str, torch.Tensor] = {}
    plain = json.dumps(_without_tensors(state, tensors))
    seen: set[int] = set()
    for name, tensor in tensors.items():
        # safetensors refuses one that stands twice, as bitsandbytes' table of 8-bit values in every weight's state.
        tensors[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    save_file(tensors, file, {"fits": fits, "state": plain})
    let_read(file)
    with file.open("rb") as written:
        os.fsync(written.fileno())


def _read(file: Path, fits: str, changes: Sequence[str] = ()) -> dict[str, Any]:
    """The state in a file that fits, whatever the settings in `changes` are there.

    Raises:
        One of _UNUSABLE.
    """
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata() or {}
        there, wanted = json.loads(metadata["fits"]), json.loads(fits)
        for name in changes:
            there["config"][name] = wanted["config"][name]
        if other := [key for key in wanted if there.get(key) != wanted[key]]:
            raise ValueError(f"it is of another trial: {', '.join(other)}")
        # Copies: the file is removed while they are in use.
        tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
    state: dict[str, Any] = _with_tensors(json.loads(metadata["state"]), tensors)
    return state


def _without_tensors(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """As JSON: a tensor becomes its name in `tensors`; a dict its items, since its keys may be numbers."""
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = _alone(value)
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"items": [[key, _without_tensors(entry, tensors)] for key, entry in value.items()]}
    if isinstance(value, list | tuple):
        return [_without_tensors(entry, tensors) for entry in value]
    return value


def _with_tensors(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_with_tensors(entry, tensors) for entry in value]
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        return {key: _with_tensors(entry, tensors) for key, entry in value["items"]}
    return value


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """On the CPU and in no larger storage: safetensors refuses tensors that share one, as ZeRO's parameters do."""
    tensor = tensor.detach().to("cpu")
    if tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
