"""Where a worker's trial reads and writes: the sweep's own folders, or copies on this node of those in a store."""

from __future__ import annotations

import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath

from filelock import FileLock

from orchestrator.config.storage_address import is_remote
from orchestrator.errors import StorageError
from orchestrator.results.files import require_there
from orchestrator.results.folders import TrialFolder
from orchestrator.results.remote import Mirror, Wanted, copy_of, everything
from orchestrator.training.task import TrialTask, WorkerPlace

Keep = Callable[[float], None]
"""Carry over what the trial has written so far; StorageError after so many seconds of trying."""
RETRY_S = 2.0


def on_this_node(task: TrialTask, place: WorkerPlace, group_id: str) -> tuple[TrialTask, Keep]:
    """The task with folders of this node, and what carries over what the trial wrote there.

    The workers of a group on one node share a copy of the trial's folder; the first of them carries it over, and the
    others their own logs.

    Raises:
        StorageError: the store does not answer, or the sweep's folder was moved away.
    """
    if not is_remote(task.trial_folder):
        # Not the trial's own, which is new: a node may hear of it late (NFS).
        require_there(Path(task.trial_folder).parents[1])
        return task, _keep_nothing
    copy = copy_of(task.trial_folder, _owner(group_id))
    mirror = Mirror(copy, task.trial_folder)
    folder = TrialFolder(copy)
    copy.mkdir(parents=True, exist_ok=True)
    if place.local_rank == 0:
        _remove_earlier(task, group_id)
    with FileLock(copy.with_name(f".{copy.name}.lock")):
        # The sweep's process alone writes the record.
        mirror.pull(lambda path: path.name != folder.result.name)
    mine = everything if place.local_rank == 0 else partial(_is_log, folder.worker_log(place.rank).name)
    data = _data_on_this_node(task.data_folder)
    here = replace(task, trial_folder=str(copy), data_folder=str(data), parent_folder=_parent_here(task, group_id))
    return here, partial(_push, mirror, mine)


def _parent_here(task: TrialTask, group_id: str) -> str | None:
    """The checkpoint that the trial begins with, beside the group's own copies."""
    if task.parent_folder is None:
        return None
    copy = copy_of(task.parent_folder, _owner(group_id))
    copy.mkdir(parents=True, exist_ok=True)
    with FileLock(copy.with_name(f".{copy.name}.lock")):
        Mirror(copy, task.parent_folder).pull(partial(_is_under, TrialFolder(copy).checkpoint(task.first_step).name))
    return str(copy)


def _remove_earlier(task: TrialTask, group_id: str) -> None:
    """The copies of trials that the group had before: a turn begins once all workers have kept what the last one left.

    One that outlived the limit of its stop has no more than its own log to carry, and finds its copy gone.
    """
    needed = {copy_of(folder, _owner(group_id)) for folder in (task.trial_folder, task.parent_folder) if folder}
    for copy in copy_of(task.trial_folder, _owner(group_id)).parent.iterdir():
        if copy not in needed:
            # Of the locks beside them, which are empty, this removes none.
            shutil.rmtree(copy, ignore_errors=True)


@contextmanager
def weights_on_this_node(where: str) -> Iterator[Path]:
    """What a trial trained: its folder, or of one in a store a copy for as long as the block lasts.

    Raises:
        StorageError: the store does not answer.
    """
    if not is_remote(where):
        yield Path(where)
        return
    whose = f"weights-{uuid.uuid4().hex}"
    copy = copy_of(where, whose)
    try:
        Mirror(copy, where).pull()
        yield copy
    finally:
        shutil.rmtree(copy_of("", whose), ignore_errors=True)


def leave_nothing(task: TrialTask, group_id: str) -> None:
    """Remove the group's copies of trials on this node."""
    if is_remote(task.trial_folder):
        shutil.rmtree(copy_of("", _owner(group_id)), ignore_errors=True)


def _owner(group_id: str) -> str:
    # A home folder may be one that nodes share.
    return f"{group_id}-{socket.gethostname()}"


def _keep_nothing(_: float) -> None:
    """All see the folder itself."""


def _is_log(name: str, path: PurePosixPath) -> bool:
    return path.name == name


def _is_under(folder: str, path: PurePosixPath) -> bool:
    return path.parts[0] == folder


def _push(mirror: Mirror, mine: Wanted, limit_s: float) -> None:
    until_s = time.monotonic() + limit_s
    while True:
        try:
            return mirror.push(mine)
        except StorageError:
            # A copy that was removed does not come back.
            if time.monotonic() + RETRY_S > until_s or not mirror.local.is_dir():
                raise
            time.sleep(RETRY_S)


def _data_on_this_node(uri: str) -> Path:
    """The tokenised data, fetched once a node, whoever comes first."""
    copy = copy_of(uri, "node")
    copy.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(copy.with_name(f".{copy.name}.lock")):
        Mirror(copy, uri).pull(exact=True)
    return copy
