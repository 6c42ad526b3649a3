"""What a result was made with: package versions, and the state of the repository that the command was called in."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from orchestrator.results.records import GitState
from orchestrator.results.secrets import without_secret

COMMIT, DIRTY = "ORCHESTRATOR_GIT_COMMIT", "ORCHESTRATOR_GIT_DIRTY"
"""What `submit` tells a job, whose folder is no repository."""
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
    """Commit and dirty flag of the repository around `folder`; outside of one, or without git, what `submit` told.

    A file that git does not know, such as a sweep file of one's own, changes nothing that is trained.
    """
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return GitState(commit=commit, dirty=bool(_git(folder, "status", "--porcelain", "--untracked-files=no")))
    except (OSError, subprocess.SubprocessError):
        told = os.environ.get(COMMIT)
        return GitState(commit=told, dirty=DIRTY in os.environ) if told else None


def told_to_a_job(state: GitState | None) -> Mapping[str, str]:
    """The environment variables by which a job knows the state of the repository that it was submitted from."""
    if state is None:
        return {}
    return {COMMIT: state.commit, **({DIRTY: "1"} if state.dirty else {})}


def run_page(tracking_uri: str, run_id: str) -> str | None:
    """The address of a run in MLflow's pages; None where the tracking address is no server's."""
    if not tracking_uri.startswith(("http://", "https://")):
        return None
    return f"{without_secret(tracking_uri).rstrip('/')}/#/runs/{run_id}"


def ui_command(tracking_uri: str) -> str | None:
    """What shows the runs of a database that is a file; None where a server shows them."""
    return f"mlflow ui --backend-store-uri {shlex.quote(tracking_uri)}" if tracking_uri.startswith("sqlite:") else None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
