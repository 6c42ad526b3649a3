"""Whether every node sees the storage: the asker leaves a mark, each node answers beside it, and the answers are read.

A folder of the same name that each node has for itself would lose every record written elsewhere.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from orchestrator.errors import counted


@contextmanager
def marked(where: Path) -> Iterator[str]:
    """A mark in the storage, gone after the block with all answers to it; yields its token.

    Raises:
        OSError: the storage cannot be written.
    """
    token = f".storage-{uuid.uuid4().hex}"
    made = [folder for folder in (where, *where.parents) if not folder.exists()]
    try:
        where.mkdir(parents=True, exist_ok=True)
        (where / token).write_text(token, encoding="ascii")
        yield token
    finally:
        with contextlib.suppress(OSError):
            for file in where.glob(f"{token}*"):
                file.unlink()
            for folder in made:
                folder.rmdir()


def answer(where: Path, token: str) -> str | None:
    """On a node: write beside the mark, or say why that cannot be."""
    try:
        if not (where / token).is_file():
            return "is another folder than where the command runs: mount one that all nodes share"
        (where / f"{token}-{uuid.uuid4().hex}").write_text(token, encoding="ascii")
    except OSError as error:
        return f"cannot be written ({error.strerror or error}): mount it writable"
    return None


def problem(where: Path, token: str, answers: Sequence[tuple[str, str | None]]) -> str | None:
    """What is wrong after (host, answer) of every node; None: all share the storage."""
    if told := [f"on {host} it {why}" for host, why in answers if why]:
        return "; ".join(told)
    # A node may have written to a folder of its own that only looks the same.
    seen = len(list(where.glob(f"{token}-*")))
    if seen < len(answers):
        wrote = counted(len(answers), "node")
        return f"of {wrote} that wrote there, {seen} can be read from here: mount one that all share"
    return None
