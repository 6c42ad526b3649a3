"""A folder as a git checkout."""

from __future__ import annotations

import subprocess
from pathlib import Path


def committed(folder: Path) -> str:
    """Everything in the folder as the one commit of a repository that begins there; its hash."""
    _git(folder, "init", "--quiet")
    _git(folder, "add", "--all")
    _git(folder, "-c", "user.name=A", "-c", "user.email=a@example.org", "commit", "--quiet", "--message", "all")
    return _git(folder, "rev-parse", "HEAD").strip()


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True).stdout
