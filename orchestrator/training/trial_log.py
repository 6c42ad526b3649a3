"""A trial's log.txt: all that its process prints, kept small while it runs and free of secrets when it has ended."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
import time
from pathlib import Path

from orchestrator.results.secrets import without_secret

LIMIT_BYTES = 16 * 2**20
LOOK_EVERY_S = 5.0


def redirect_output(log: Path, limit_bytes: int = LIMIT_BYTES, look_every_s: float = LOOK_EVERY_S) -> None:
    """Into the log goes what libraries in C print too, hence the file descriptors."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    threading.Thread(target=_keep_small, args=(log, limit_bytes, look_every_s), daemon=True).start()


def hide_secrets(log: Path) -> None:
    """Take out of a finished log what a library may have printed: tokens, passwords in addresses.

    To be called by who has the trial's environment, where the secrets are.
    """
    for file in (log, _earlier(log)):
        with contextlib.suppress(OSError):
            text = file.read_text(encoding="utf-8", errors="surrogateescape")
            if (hidden := without_secret(text)) != text:
                file.write_text(hidden, encoding="utf-8", errors="surrogateescape")


def _earlier(log: Path) -> Path:
    return log.with_name(f"{log.stem}.earlier{log.suffix}")


def _keep_small(log: Path, limit_bytes: int, look_every_s: float) -> None:
    """Move what is too much to a second file, in place of what that held: a log's first part is worth least."""
    while True:
        time.sleep(look_every_s)
        with contextlib.suppress(OSError):
            if log.stat().st_size > limit_bytes:
                shutil.copyfile(log, _earlier(log))
                # Every writer appends, and so goes on at the new end.
                os.truncate(log, 0)
                with log.open("a", encoding="utf-8") as file:
                    told = f"the log grew over {limit_bytes:,} bytes: what came before is in {_earlier(log).name}"
                    file.write(f"[{told}]\n")
