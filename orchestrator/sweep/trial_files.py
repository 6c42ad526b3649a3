"""Where a worker's trial reads and writes: the sweep's own folders, or copies on this node of those in a store."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from filelock import FileLock

from orchestrator.config.storage_address import is_remote
from orchestrator.errors import StorageError
from orchestrator.results.remote import Mirror, copy_of
from orchestrator.results.storage import TrialFolder
from orchestrator.training.task import TrialTask

Keep = Callable[[float], None]
"""Carry over what the trial has written so far; StorageError after so many seconds of trying."""
RETRY_S = 2.0


@contextmanager
def on_this_node(task: TrialTask, worker: str) -> Iterator[tuple[TrialTask, Keep]]:
    """The task with folders of this node; `worker` is a name that no other process has.

    Raises:
        StorageError: the store does not answer.
    """
    if not is_remote(task.trial_folder):
        yield task, _keep_nothing
        return
    copy = copy_of(task.trial_folder, worker)
    mirror = Mirror(copy, task.trial_folder)
    records = TrialFolder(copy).result.name
    try:
        # The sweep's process alone writes the record.
        mirror.pull(lambda path: path.name != records)
        data = _data_on_this_node(task.data_folder)
        yield replace(task, trial_folder=str(copy), data_folder=str(data)), lambda limit_s: _push(mirror, limit_s)
    finally:
        shutil.rmtree(copy, ignore_errors=True)


def _keep_nothing(_: float) -> None:
    """All see the folder itself."""


def _push(mirror: Mirror, limit_s: float) -> None:
    until_s = time.monotonic() + limit_s
    while True:
        try:
            return mirror.push()
        except StorageError:
            if time.monotonic() + RETRY_S > until_s:
                raise
            time.sleep(RETRY_S)


def _data_on_this_node(uri: str) -> Path:
    """The tokenised data, fetched once a node, whoever comes first."""
    copy = copy_of(uri, "node")
    copy.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(copy.with_name(f".{copy.name}.lock")):
        Mirror(copy, uri).pull(exact=True)
    return copy
