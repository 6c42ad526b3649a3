"""What a result was made with: package versions and the state of the checkout."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path

from orchestrator.results.records import GitState
from orchestrator.results.secrets import without_secret

PACKAGES = ("orchestrator", "torch", "transformers", "peft", "deepspeed", "ray", "mlflow", "bitsandbytes", "flash-attn")


def versions() -> dict[str, str]:
    """Installed versions, by package; one that is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_state(folder: Path) -> GitState | None:
    """Commit and dirty flag of the checkout around `folder`; None outside of one, or without git.

    A file that git does not know, such as a sweep file of one's own, changes nothing that is trained.
    """
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return GitState(commit=commit, dirty=bool(_git(folder, "status", "--porcelain", "--untracked-files=no")))
    except (OSError, subprocess.SubprocessError):
        return None


def run_page(tracking_uri: str, run_id: str) -> str | None:
    """The address of a run in MLflow's pages; None where the tracking address is no server's."""
    if not tracking_uri.startswith(("http://", "https://")):
        return None
    return f"{without_secret(tracking_uri).rstrip('/')}/#/runs/{run_id}"


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
