"""The word that a sweep has ended, as JSON to a webhook: bounded in time, and never what a sweep fails by."""

from __future__ import annotations

import json
import threading
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from orchestrator.config.local_path import local_path
from orchestrator.errors import InputError, cut
from orchestrator.reporting.findings import Report
from orchestrator.results.provenance import run_page
from orchestrator.results.secrets import without_secret

LIMIT_S = 10.0
LONGEST_BYTES = 4096
"""Of a file that holds an address."""


def address_of(given: str) -> str:
    """The webhook's address as `--notify` has it: itself, or `@FILE`, which no list of processes or jobs shows.

    Raises:
        InputError: it is no address that can be posted to, or the file cannot be read.
    """
    url = given
    if given.startswith("@"):
        try:
            file = local_path(given[1:])
            # A device or a pipe may have no end.
            if file.exists() and not (file.is_file() and file.stat().st_size <= LONGEST_BYTES):
                raise InputError(
                    f"--notify {cut(given)}: is no file of at most 4 KB: name one that holds the address alone"
                )
            url = file.read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            raise InputError(f"--notify {cut(given)}: the file cannot be read: write the address into it") from error
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        good = False
    if not good:
        raise InputError("--notify takes an address such as https://example.com/hook, or @FILE that holds one")
    return url


def end_of(report: Report, page: str, exit_code: int, tracking_uri: str) -> dict[str, Any]:
    """What is told of a sweep that has ended; `page` is where its report lies."""
    sweep = report.sweep
    status = {0: "completed", 1: "completed with failed trials", 130: "interrupted"}[exit_code]
    answer = without_secret(report.recommendation.answer)
    return {
        # What Slack and its likes show.
        "text": f"Sweep {sweep.name}: {status}. {answer}",
        "name": sweep.name,
        "status": status,
        "question": sweep.question,
        "answer": answer,
        "trials": {status.value: count for status, count in report.counts.items()},
        "report": page,
        "mlflow": run_page(tracking_uri, sweep.mlflow_run_id) if sweep.mlflow_run_id else None,
    }


def failure_of(name: str, page: str, error: Exception) -> dict[str, Any]:
    """What is told of a sweep that could not go on; `page` is where its report lies, or will."""
    why = without_secret(str(error))
    return {
        "text": f"Sweep {name}: failed. {why}",
        "name": name,
        "status": "failed",
        "error": why,
        "report": page,
    }


def post(url: str, body: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """Tell the webhook; a failure is said, with its host alone, since such an address is often a secret."""
    problem: list[str] = [f"no answer in {LIMIT_S:.0f} s"]
    # In a thread: a time-out of the library's bounds each read of the socket, and no look-up of a name.
    sender = threading.Thread(target=_send, args=(url, dict(body), problem), daemon=True)
    sender.start()
    sender.join(LIMIT_S)
    if problem:
        say(f"the webhook at {urlsplit(url).hostname} was not told ({problem[0]})")


def _send(url: str, body: Mapping[str, Any], problem: list[str]) -> None:
    data = json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "User-Agent": "orchestrator"}
    request = urllib.request.Request(url, data, headers, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=LIMIT_S):
            problem.clear()
    except (OSError, ValueError) as error:
        # Without the address, which some errors repeat.
        problem[0] = str(getattr(error, "reason", error)).replace(url, "its address")[:200]
    except Exception as error:
        problem[0] = type(error).__name__
