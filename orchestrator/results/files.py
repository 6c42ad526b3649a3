"""One file: opened so that it ends, written so that it is never half there, and whose failure an error tells of."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from pydantic import ValidationError

from orchestrator.errors import StorageError, cut

_STORAGE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EHOSTDOWN)
LARGEST_BYTES = 2**30
"""Of a file that is read whole; the records of 100,000 trials have less."""


def why_unread(error: Exception) -> str:
    """Why a record cannot be read, in one line: of a wrong value, or the first of them, where it stands."""
    if isinstance(error, OSError) and error.strerror:
        # Whoever tells it names the file.
        return error.strerror
    if not isinstance(error, ValidationError):
        return " ".join(str(error).split())[:200]
    wrong = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in wrong["loc"])
    # Before the words of a check of ours pydantic puts its own.
    why = wrong["msg"].removeprefix("Value error, ")
    return cut(f"{place}: {why}" if place else why)


@contextmanager
def opened(file: Path) -> Iterator[BinaryIO]:
    """The file, open for reading, and nothing that never ends: a pipe, a device, a file of holes.

    Raises:
        OSError: it cannot be opened, is no regular file, or larger than any of ours.
    """
    # To open a pipe would wait for whoever writes to it.
    with open(file, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as stream:
        found = os.fstat(stream.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(file))
        if found.st_size > LARGEST_BYTES:
            raise OSError(errno.EFBIG, f"larger than {LARGEST_BYTES // 2**20:,} MiB", str(file))
        yield stream


def read_record(file: Path) -> bytes:
    """All of a file.

    Raises:
        OSError: as `opened`.
    """
    with opened(file) as stream:
        return stream.read()


def is_storage_failure(error: BaseException) -> bool:
    """Whether an error says that the disk is full, read-only or away, and nothing about what was to be written."""
    if isinstance(error, StorageError):
        return True
    if isinstance(error, OSError) and error.errno in _STORAGE_ERRNOS:
        return True
    # Libraries in Rust and C tell it in words alone.
    return any(os.strerror(number) in str(error) for number in _STORAGE_ERRNOS)


def write_atomically(path: Path, text: str) -> None:
    """Replace `path`; a reader sees the old text or the new, never half of one.

    What a writer that was killed has left half written of it goes, and so does what finds no room. Of two that write at
    once, one wins.

    Raises:
        StorageError: the file cannot be written.
    """
    # In the same folder, since a rename across file systems is a copy.
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        try:
            partial.replace(path)
        except FileNotFoundError:
            # Another writer has ended meanwhile, and took this for a half of one that is gone.
            if not path.is_file():
                raise
        for half in path.parent.glob(f".{glob.escape(path.name)}.*"):
            half.unlink(missing_ok=True)
    except OSError as error:
        # Where the folder is away or read-only there is nothing to be removed.
        with contextlib.suppress(OSError):
            partial.unlink()
        raise StorageError(f"cannot write {path} ({error}): free some space there, or make it writable") from error


def require_there(folder: Path) -> None:
    """Refuse to begin anything in the place of a folder that was moved away: brought back, it would lie inside of it.

    Raises:
        StorageError: it is not there, as where its mount has gone away, too.
    """
    if not folder.is_dir():
        raise StorageError(f"{folder} is gone, as where it was moved or its mount went away: bring it back")


def let_read(file: Path) -> None:
    """Give a file the mode that its folder has from the umask: safetensors lets only the owner read its files."""
    # A mount that knows no modes refuses, and is no worse a place for it.
    with contextlib.suppress(OSError):
        file.chmod(file.parent.stat().st_mode & 0o666)


def sync(path: Path) -> None:
    """Let what is in a file, or the names in a folder, outlast a power cut, where there is one that can be synced.

    Raises:
        StorageError: the disk is full, read-only or away.
    """
    try:
        # To open a pipe would wait for whoever writes to it.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        # Not all file systems can sync a folder: they say EINVAL (fsync(2)).
        if is_storage_failure(error):
            raise StorageError(f"cannot write {path} ({error}): mend the disk, or its mount") from error
