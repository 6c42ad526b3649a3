"""A path on this machine, as a person writes it."""

from __future__ import annotations

import os
from pathlib import Path

from orchestrator.errors import InputError, cut


def local_path(written: str | os.PathLike[str]) -> Path:
    """The path, with `~` and `~user` as their home folders.

    Raises:
        InputError: nobody knows that home.
    """
    try:
        return Path(written).expanduser()
    except RuntimeError as error:
        # No such user; or a container's, that has no entry in passwd and no HOME.
        raise InputError(
            f"{cut(os.fspath(written))}: no home folder is known for it here: write the path in full, or set HOME"
        ) from error
