"""What a result was made with: package versions and the state of the checkout."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

from orchestrator.results.records import GitState

HIDDEN = "[hidden]"
SHORTEST_SECRET = 8
"""A shorter value of the environment would be found in words that are no secret."""
_CREDENTIALS = re.compile(r"(?<=://)[^/\s\"'<>]*@")
_QUERY = re.compile(
    r"([?&](?:[\w-]*(?:token|password|passwd|secret|signature|credential|api_?key)|sig|key)=)[^&\s\"'<>]+", re.I
)
_TOKEN = re.compile(r"\b(?:hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|glpat-[\w-]{16,}|AKIA[A-Z0-9]{16})\b")
_SECRET_NAME = re.compile(r"TOKEN$|PASSWORD$|SECRET|ACCESS_KEY|API_KEY|CREDENTIAL|PASSWD$", re.I)
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
    """Commit and dirty flag of the checkout around `folder`; None outside of one, or without git."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return GitState(commit=commit, dirty=bool(_git(folder, "status", "--porcelain")))
    except (OSError, subprocess.SubprocessError):
        return None


def without_secret(text: str) -> str:
    """A text as it may be shown and kept.

    Taken out are the user and password of every address, the value of a query key such as `token=`, tokens that are
    known by their first letters, and the values of this process's environment variables that are named as secrets.
    """
    text = _CREDENTIALS.sub("", text)
    text = _QUERY.sub(rf"\1{HIDDEN}", text)
    text = _TOKEN.sub(HIDDEN, text)
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and len(value) >= SHORTEST_SECRET and not value.startswith(("/", "~")):
            text = text.replace(value, HIDDEN)
    return text


def run_page(tracking_uri: str, run_id: str) -> str | None:
    """The address of a run in MLflow's pages; None where the tracking address is no server's."""
    if not tracking_uri.startswith(("http://", "https://")):
        return None
    return f"{without_secret(tracking_uri).rstrip('/')}/#/runs/{run_id}"


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
