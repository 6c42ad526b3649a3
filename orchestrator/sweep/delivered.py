"""How much of each trial MLflow has, kept beside the records: a sweep that goes on carries over the rest alone."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from orchestrator.errors import FolderError, StorageError
from orchestrator.results.files import read_record, require_there, write_atomically
from orchestrator.results.folders import SweepFolder
from orchestrator.results.records import SweepId, TrialStatus
from orchestrator.results.remote import cache_folder
from orchestrator.results.secrets import without_secret
from orchestrator.results.storage import is_at_work, read_sweep
from orchestrator.sweep import own_database

MOST_SERVERS = 100


class TrialDelivery(BaseModel):
    """One trial's run there."""

    run_id: str | None = None
    offset_bytes: Annotated[int, Field(ge=0)] = 0
    """Of metrics.jsonl, how much has arrived."""
    began_ms: int | None = None
    """When the first point that arrived was made: one of another time belongs to a trial that began again."""
    status: TrialStatus | None = None
    """The last one that was told."""
    late: Annotated[int, Field(ge=0)] = 0
    """How often its files did not arrive, though all else before them had: they may be too large for the way."""


class Delivered(BaseModel):
    """tracking.json."""

    schema_version: Literal[1] = 1
    server: str
    """Its address; another one has nothing of this."""
    is_own: bool | None = None
    """Whether it was the storage's own database, which moves with it; None: an older release did not keep it."""
    sweep_id: SweepId
    trials: dict[str, TrialDelivery] = {}
    is_complete: bool | None = None
    """Whether the sweep's own files have arrived too, after all trials; None: an older release did not keep it."""


def read_delivered(folder: SweepFolder, server: str, sweep_id: str) -> Delivered:
    """What was kept; nothing where it is lost, damaged, or of another server or sweep: all of it is told once more."""
    found = _read(folder)
    where: dict[str, Any] = {"server": server, "is_own": server == _own(folder)}
    if found and found.sweep_id == sweep_id and _went_to(found, server, folder):
        return found.model_copy(update=where)
    return Delivered(sweep_id=sweep_id, **where)


def kept_sweep_id(folder: SweepFolder) -> str | None:
    """The sweep's id, for a folder that has lost its results.json."""
    found = _read(folder)
    return found.sweep_id if found else None


def told_server(folder: SweepFolder) -> str | None:
    """The server that the sweep was tracked by, under the address that it had then."""
    found = _read(folder)
    return found.server if found else None


def known_runs(folder: SweepFolder) -> dict[str, str]:
    """The runs that MLflow has of trials: records name them once the sweep has ended."""
    found = _read(folder)
    return {name: trial.run_id for name, trial in found.trials.items() if trial.run_id} if found else {}


def has_been_told(folder: SweepFolder, server: str) -> bool:
    """Whether the sweep was tracked by this server; it may be the storage's own database, and have moved with it."""
    found = _read(folder)
    return found is not None and _went_to(found, server, folder)


def _went_to(found: Delivered, server: str, folder: SweepFolder) -> bool:
    return found.server == server or (server == _own(folder) and _was_own(found))


def _own(folder: SweepFolder) -> str:
    return without_secret(own_database.address(folder.root.absolute().parent))


def _was_own(found: Delivered) -> bool:
    if found.is_own is not None:
        return found.is_own
    before = Path(found.server.removeprefix("sqlite:///"))
    # What is there still may be one that somebody names.
    return found.server == own_database.address(before.parent) and not before.exists()


def remember_server(server: str) -> None:
    """Note that this account tracks sweeps by this server, for `is_known`; where it cannot be noted it is not known."""
    with contextlib.suppress(StorageError):
        # The newest ones: a server on a port of its own is another each time.
        write_atomically(_servers(), json.dumps([*(one for one in _known() if one != server), server][-MOST_SERVERS:]))


def is_known(server: str) -> bool:
    """Whether this account has tracked a sweep by this server.

    A folder that came from elsewhere names one too, and is not to send logs and a password there.
    """
    return server in _known()


def _servers() -> Path:
    return cache_folder() / "tracking-servers.json"


def _known() -> list[str]:
    try:
        return TypeAdapter(list[str]).validate_json(read_record(_servers()))
    except (OSError, ValidationError):
        return []


def is_owed(folder: SweepFolder) -> bool:
    """Whether the sweep has ended, and its run could not deliver everything.

    Of an address in a store only the records are at hand: its `run` delivers.
    """
    found = None if folder.remote else _read(folder)
    if found is None or found.is_complete is not False or is_at_work(folder):
        return False
    try:
        return read_sweep(folder)[0].ended_ms is not None
    except FolderError:
        return False


def _read(folder: SweepFolder) -> Delivered | None:
    try:
        return Delivered.model_validate_json(read_record(folder.tracking))
    except (OSError, ValidationError):
        return None


def write_delivered(folder: SweepFolder, delivered: Delivered) -> None:
    """Keep it.

    Raises:
        StorageError: it cannot be written.
    """
    require_there(folder.root)
    write_atomically(folder.tracking, delivered.model_dump_json() + "\n")
