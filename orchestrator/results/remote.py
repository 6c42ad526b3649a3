"""A sweep folder in an object store: everybody works in a copy of their own, and what changed is carried over.

A file has one writer there as in a shared folder, and is put there whole. The store is the truth: whoever begins, or
goes on, reads it first. Credentials come from the environment alone, as AWS's own tools read them.
"""

from __future__ import annotations

import itertools
import os
import shutil
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from orchestrator.config.local_path import local_path
from orchestrator.config.storage_address import SCHEME, is_remote, storage_problem
from orchestrator.errors import FolderError, StorageError, cut
from orchestrator.results.folders import CHECKPOINT, CHECKPOINT_PART, TABLE, TRIALS, TUNE, SweepFolder

if TYPE_CHECKING:
    from pyarrow.fs import FileInfo, S3FileSystem

CONNECT_LIMIT_S = 10.0
REQUEST_LIMIT_S = 20.0
"""Without a byte, of each of three attempts (pyarrow 25): a store that is silent holds whoever asks for a minute."""
TRANSFERS = 8
"""Files at a time."""
ATTEMPTS = 3
"""To fetch a file whole, which may be written anew meanwhile."""
CHUNK_BYTES = 8 * 2**20
Wanted = Callable[[PurePosixPath], bool]
"""Whether a file, by its path in the folder, is to be brought."""


def cache_folder() -> Path:
    """Where this user's models and copies are kept."""
    named = os.environ.get("ORCHESTRATOR_CACHE")
    return local_path(named or "~/.cache/orchestrator")


def copy_of(uri: str, whose: str) -> Path:
    """Where `whose` copy of an address lies; no two processes that write may share one."""
    return cache_folder() / "copies" / whose / uri.removeprefix(SCHEME).strip("/")


def local_storage(storage: str) -> Path:
    """The storage folder on the driver's own disk: itself, or its copy."""
    return copy_of(storage, "driver") if is_remote(storage) else local_path(storage).absolute()


def sweep_folder(storage: str, name: str) -> SweepFolder:
    """STORAGE/NAME, as the sweep's driver writes it."""
    return SweepFolder(local_storage(storage) / name, f"{storage.rstrip('/')}/{name}" if is_remote(storage) else None)


def opened(where: str) -> SweepFolder:
    """A sweep's folder for reading; of an address, the records are fetched, and what they name is not.

    Raises:
        FolderError: it is no address that can be read.
        StorageError: the store does not answer.
    """
    if not is_remote(where):
        return SweepFolder(Path(where))
    if problem := storage_problem(where):
        raise FolderError(f"{cut(where)}: {problem}")
    uri = where.rstrip("/")
    folder = SweepFolder(copy_of(uri, "reader"), uri)
    # Another sweep may have lain there; the pages are made here, and another command may be about to show one.
    Mirror(folder.root, uri).pull(is_record, exact=True, ours={folder.report.name, folder.comparison.name})
    return folder


def fetch_trial(folder: SweepFolder, trial_id: str) -> None:
    """Bring what a trial trained; nothing to do where the folder is no copy.

    Not its records: a reader has them, and the sweep's driver may have newer ones than the store.
    """
    if folder.remote:
        Mirror(folder.root, folder.remote).pull(is_trained, under=folder.inside(folder.trial(trial_id).root))


def publish(folder: SweepFolder, file: Path) -> None:
    """Put one file of a copy into the store; nothing to do where the folder is no copy."""
    if folder.remote:
        write_text(folder.location(file), file.read_text(encoding="utf-8"))


def is_record(path: PurePosixPath) -> bool:
    """What says how a sweep stands: its own files and those of each trial, without adapters and data."""
    return len(path.parts) == 1 or (path.parts[0] == TRIALS and len(path.parts) == 3)


def is_result(path: PurePosixPath) -> bool:
    """A record or what a trial trained; not the checkpoints, from which only its workers go on."""
    return is_record(path) or is_trained(path)


def is_trained(path: PurePosixPath) -> bool:
    """What a trial leaves but its records and checkpoints: its adapter."""
    return path.parts[0] == TRIALS and not is_record(path) and not is_checkpoint(path)


def is_checkpoint(path: PurePosixPath) -> bool:
    """What a trial goes on from while it has not ended."""
    return path.parent.name.startswith(CHECKPOINT)


def whole_checkpoints(names: Iterable[str]) -> set[PurePosixPath]:
    """Those of which every worker's part is among the files: several objects of a store are not one change."""
    parts: Counter[tuple[PurePosixPath, int]] = Counter()
    for path in map(PurePosixPath, names):
        if is_checkpoint(path) and (part := CHECKPOINT_PART.fullmatch(path.name)):
            parts[path.parent, int(part[1])] += 1
    return {folder for (folder, workers), count in parts.items() if count == workers}


def speaks_of_others(path: PurePosixPath) -> bool:
    """A checkpoint of the curve that it belongs to, the sweep's table of the trials' own records."""
    return is_checkpoint(path) or path.name == TABLE


def everything(path: PurePosixPath) -> bool:  # noqa: ARG001
    """All that is there."""
    return True


class Mirror:
    """A folder here and the same in the store."""

    def __init__(self, local: Path, uri: str) -> None:
        self.local, self.uri = local, uri
        self._base = uri.removeprefix(SCHEME).strip("/")
        # Of each file that is the same on both sides: size and time of the local one.
        self._same: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()

    def pull(
        self, wanted: Wanted = everything, *, under: str = "", exact: bool = False, ours: Collection[str] = ()
    ) -> None:
        """Bring what the store has and this copy has not, all or what is `under` a folder of it.

        The folders of what is not wanted are made, so that their names tell, but for a checkpoint's that is not whole
        there: the empty folder of one goes. `exact` removes what the store does not have, folders of trials too, and of
        trials what it has otherwise and is not wanted: an adapter of before would be put over a newer one. What is in
        `ours` stays.

        Raises:
            StorageError: the store cannot be read, or the copy not written.
        """
        with self._lock, _told(self.uri, "read"):
            there = self._there(under)
            if exact:
                self._compare(there, wanted, ours)
            changed = [(name, info) for name, info in there.items() if wanted(PurePosixPath(name))]
            whole = whole_checkpoints(there)
            for known in list((self.local / under).rglob(f"{CHECKPOINT}*")):
                if PurePosixPath(known.relative_to(self.local)) not in whole:
                    # Left where it is no empty folder.
                    with suppress(OSError):
                        known.rmdir()
            if exact:
                # A trial whose folder is gone there is run again: an empty one must not stand for it.
                for empty, _, _ in os.walk(self.local / TRIALS, topdown=False):
                    with suppress(OSError):
                        Path(empty).rmdir()
            folders = {path.parent for path in map(PurePosixPath, there) if not is_checkpoint(path)}
            for folder in folders | whole | {PurePosixPath(name).parent for name, _ in changed}:
                (self.local / folder).mkdir(parents=True, exist_ok=True)
            with ThreadPoolExecutor(TRANSFERS) as pool:
                # Until all are here, or one failed.
                list(pool.map(self._bring, changed))

    def push(self, wanted: Wanted = everything, *, within: Collection[str] | None = None) -> None:
        """Carry over what changed here since the last time, and remove checkpoints that are gone.

        within: folders of it, which are looked at alone beside the files at its top, and nothing is removed.

        What speaks of others goes last, so that they are there. Nothing but a checkpoint is ever given up on purpose:
        whatever else is gone here was removed by somebody from a copy, and stays in the store. A checkpoint stays there
        until the one in its place is whole: another node's workers may have their part still to carry.

        Raises:
            StorageError: the store cannot be written, or the copy itself is gone.
        """
        if not self.local.is_dir():
            raise StorageError(
                f"{self.local}, the copy of {self.uri} here, was removed while it was in use: leave it until the sweep "
                "has ended"
            )
        with self._lock, _told(self.uri, "written"):
            changed = [
                (name, state)
                for name, state in self._here(within)
                if self._same.get(name) != state and wanted(PurePosixPath(name))
            ]
            with ThreadPoolExecutor(TRANSFERS) as pool:
                for last in (False, True):
                    some = [one for one in changed if speaks_of_others(PurePosixPath(one[0])) is last]
                    for name, state in pool.map(self._carry, some):
                        if state is not None:
                            self._same[name] = state
            if within is not None:
                return
            known = [path for path in map(PurePosixPath, self._same) if is_checkpoint(path) and wanted(path)]
            gone = [str(path) for path in known if not (self.local / path).exists()]
            needed = self._needed_until_whole(gone)
            self._remove([name for name in gone if PurePosixPath(name).parent not in needed])

    def remove(self, unwanted: Wanted, *, under: str = "") -> None:
        """Remove from the store alone.

        Raises:
            StorageError: the store cannot be written.
        """
        with self._lock, _told(self.uri, "written"):
            self._remove([name for name in self._there(under) if unwanted(PurePosixPath(name))])

    def _needed_until_whole(self, gone: Collection[str]) -> set[PurePosixPath]:
        """The whole checkpoints there, as long as one that took the place of those that are gone is not whole there."""
        beside = {self.local / path.parent.parent for path in map(PurePosixPath, gone) if is_checkpoint(path)}
        newer = {PurePosixPath(new.relative_to(self.local)) for one in beside for new in one.glob(f"{CHECKPOINT}*")}
        if not newer:
            return set()
        whole = whole_checkpoints(self._there(""))
        return set() if newer <= whole else whole

    def _there(self, under: str) -> dict[str, FileInfo]:
        from pyarrow import fs

        where = f"{self._base}/{under}".rstrip("/")
        found = store(self.uri).get_file_info(fs.FileSelector(where, allow_not_found=True, recursive=True))
        named = {info.path[len(self._base) + 1 :]: info for info in found if info.type == fs.FileType.File}
        return {name: info for name, info in named.items() if not _is_hidden(PurePosixPath(name))}

    def _here(self, within: Collection[str] | None = None) -> Iterator[tuple[str, tuple[int, int]]]:
        walks = [os.walk(self.local)]
        if within is not None:
            walks = [itertools.islice(walks[0], 1), *(os.walk(self.local / folder) for folder in within)]
        for folder, below, files in itertools.chain.from_iterable(walks):
            inside = PurePosixPath(Path(folder).relative_to(self.local))
            below[:] = [name for name in below if not _is_hidden(inside / name)]
            for name in files:
                if not _is_hidden(inside / name) and (state := _state(Path(folder, name))):
                    yield str(inside / name), state

    def _bring(self, named: tuple[str, FileInfo]) -> None:
        """Noted as the same at once: where another file fails, this one must not seem to be changed by us."""
        name, info = named
        file = self.local / name
        if (state := _state(file)) == (info.size, info.mtime_ns):
            self._same[name] = state
            return
        partial = file.with_name(f".{file.name}.{os.getpid()}.{threading.get_ident()}")
        for _ in range(ATTEMPTS):
            with store(self.uri).open_input_stream(info.path) as source, partial.open("wb") as target:
                shutil.copyfileobj(source, target, CHUNK_BYTES)
                arrived_bytes = target.tell()
            # It may be written anew while it comes, which is several requests: then what came is cut, or of two kinds.
            now = store(self.uri).get_file_info(info.path)
            if arrived_bytes == info.size and _version(now) == _version(info):
                # The store's time, by which the next pull knows that nothing has changed.
                os.utime(partial, ns=(info.mtime_ns, info.mtime_ns))
                partial.replace(file)
                self._same[name] = _state(file) or (info.size, info.mtime_ns)
                return
            info = now
        partial.unlink()
        raise OSError(f"of {name} {arrived_bytes} bytes arrived where it has {info.size}, {ATTEMPTS} times in a row")

    def _carry(self, changed: tuple[str, tuple[int, int]]) -> tuple[str, tuple[int, int] | None]:
        """State of before it was read: what is written meanwhile is carried the next time."""
        name, state = changed
        try:
            source = (self.local / name).open("rb")
        except FileNotFoundError:
            return name, None
        unread = None
        with source, store(self.uri).open_output_stream(f"{self._base}/{name}") as target:
            while unread is None:
                try:
                    chunk = source.read(CHUNK_BYTES)
                except OSError as error:
                    unread = error
                else:
                    if not chunk:
                        return name, state
                    target.write(chunk)
        # Closed, the stream has published what came before (pyarrow 25 hands on no Abort): none is better than a part.
        delete(f"{self.uri}/{name}")
        raise unread

    def _remove(self, names: Collection[str]) -> None:
        checkpoints = {path.parent for path in map(PurePosixPath, names) if is_checkpoint(path)}
        for folder in checkpoints:
            # File by file it would leave an object that stands for the empty folder (Arrow's s3fs.cc, DeleteFile).
            with _missing_is_fine():
                store(self.uri).delete_dir(f"{self._base}/{folder}")
        for name in names:
            if PurePosixPath(name).parent not in checkpoints:
                with _missing_is_fine():
                    store(self.uri).delete_file(f"{self._base}/{name}")
            self._same.pop(name, None)

    def _compare(self, there: dict[str, FileInfo], wanted: Wanted, ours: Collection[str]) -> None:
        for name, state in list(self._here()):
            info, path = there.get(name), PurePosixPath(name)
            if info and state == (info.size, info.mtime_ns):
                self._same[name] = state
            elif (info is None and name not in ours) or (path.parts[0] == TRIALS and not wanted(path)):
                (self.local / name).unlink(missing_ok=True)
                self._same.pop(name, None)


def store(uri: str) -> S3FileSystem:
    """The object store, with the environment's credentials."""
    from pyarrow import fs

    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    bucket = uri.removeprefix(SCHEME).partition("/")[0]
    key = (bucket, endpoint, region, os.getpid())
    if key not in _STORES:
        if region is None:
            region = "us-east-1" if endpoint else fs.resolve_s3_region(bucket)
        _STORES[key] = fs.S3FileSystem(
            region=region,
            endpoint_override=endpoint,
            connect_timeout=CONNECT_LIMIT_S,
            request_timeout=REQUEST_LIMIT_S,
            # A small file is then one request.
            allow_delayed_open=True,
        )
    return _STORES[key]


_STORES: dict[Any, Any] = {}


def write_text(uri: str, text: str) -> None:
    """Put one small object."""
    with _told(uri, "written"), store(uri).open_output_stream(uri.removeprefix(SCHEME)) as target:
        target.write(text.encode())


def read_text(uri: str) -> tuple[str, float] | None:
    """One small object and when it was written, in seconds of the store's own clock; None where there is none."""
    from pyarrow import fs

    path = uri.removeprefix(SCHEME)
    with _told(uri, "read"):
        info = store(uri).get_file_info(path)
        if info.type != fs.FileType.File:
            return None
        with _missing_is_fine():
            return str(store(uri).open_input_stream(path).read(), "utf-8", "replace"), info.mtime_ns / 1e9
    return None


def delete(uri: str) -> None:
    """Remove one object, if it is there."""
    with _told(uri, "written"), _missing_is_fine():
        store(uri).delete_file(uri.removeprefix(SCHEME))


def access_problem(uri: str) -> str | None:
    """From where this runs: why an object cannot be written beside the sweep, read and removed, or None."""
    token = uuid.uuid4().hex
    probe = f"{uri}/.access-{token}"
    try:
        write_text(probe, token)
        found = read_text(probe)
        delete(probe)
    except (StorageError, ImportError) as error:
        return str(error)
    return None if found and found[0] == token else "what is written there cannot be read back"


def _version(info: FileInfo) -> tuple[int | None, int | None]:
    """Size and second of writing: a listing may tell parts of a second that the answer for one object has not."""
    return info.size, None if info.mtime_ns is None else info.mtime_ns // 10**9


def _state(file: Path) -> tuple[int, int] | None:
    try:
        found = file.stat()
    except FileNotFoundError:
        return None
    return found.st_size, found.st_mtime_ns


def _is_hidden(path: PurePosixPath) -> bool:
    """Locks, what is half written, and Ray Tune's own state: nobody reads them back."""
    return path.parts[0] == TUNE or any(part.startswith(".") for part in path.parts)


@contextmanager
def _told(uri: str, what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        why = " ".join(str(error).split())[:300]
        raise StorageError(
            f"storage {uri} cannot be {what} ({why}): check its name and the credentials and endpoint in the "
            "environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL and so on)"
        ) from error


@contextmanager
def _missing_is_fine() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        return
