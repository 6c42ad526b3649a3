"""Submitting a sweep to a cluster's job API, and following it to its end.

It is what `ray job submit --working-dir . -- python -m orchestrator run SWEEP` does, checked before anything is sent.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import os
import platform
import signal
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import ray
import ray.exceptions
from ray.job_submission import JobSubmissionClient

from orchestrator.config.storage_address import is_remote
from orchestrator.config.sweep_config import SweepConfig
from orchestrator.errors import ClusterUnreachableError, InputError, cut, first_line
from orchestrator.results.provenance import git_state
from orchestrator.results.secrets import without_secret
from orchestrator.submit.job import (
    Job,
    entrypoint,
    exit_code_of,
    job_for,
    pinned_requirements,
    runtime_env,
    version_problem,
)
from orchestrator.submit.package import Package, is_the_clusters, pack

CONNECT_LIMIT_S = 5.0
LOST_LIMIT_S = 120.0
"""A cluster that is silent for so long is given up; the job is not."""
SILENCE_LIMIT_S = 60.0
"""A log that says nothing for so long is opened again: the connection may be dead."""
RETRY_S = 1.0
SWEEP_KEY, PACKAGE_KEY = "orchestrator_sweep", "orchestrator_package"
TOKEN_MEND = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH, to the token of the cluster"

AGENT_MEND = (
    "the head's dashboard agent is not up: wait a little, or read dashboard_agent.log there (is its port taken?)"
)


def dashboard_address(given: str) -> str:
    """A dashboard's address without what a browser shows behind it for one of its pages.

    Raises:
        InputError: it is none.
    """
    try:
        parts = urlsplit(given.strip())
        # Reading it raises where it is no number, or none of a port.
        is_address = parts.port != 0 and parts.scheme in ("http", "https") and len((parts.hostname or "").split()) == 1
    except ValueError:
        is_address = False
    if not is_address:
        raise InputError(
            f"--address {cut(without_secret(given))}: takes the address of Ray's dashboard, as http://HEAD:8265"
        )
    return parts._replace(fragment="").geturl().rstrip("/")


class JobServer:
    """The cluster's job API."""

    def __init__(self, address: str) -> None:
        """Reach it.

        Raises:
            InputError: no address of a dashboard, or a cluster that cannot run us.
            ClusterUnreachableError: nothing answers, or it asks for a token.
        """
        self.address = dashboard_address(address)
        self.shown_address = without_secret(self.address)
        self._require_an_answer()
        # To Ray these would weigh more than the address that it is given.
        for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
            os.environ.pop(name, None)
        for handler in logging.getLogger("ray").handlers:
            handler.setLevel(logging.WARNING)
        self._client: Any = self._understood(lambda: JobSubmissionClient(self.address))
        self.python: str | None = self._understood(self._python_of_a_cluster_that_can_run_us)

    def _python_of_a_cluster_that_can_run_us(self) -> Any:
        python = self._get("/api/v0/cluster_metadata").get("data", {}).get("pythonVersion")
        if problem := version_problem(self._get("/api/version")["ray_version"], ray.__version__, python):
            raise InputError(f"{self.shown_address}: {problem}")
        return python

    def _require_an_answer(self) -> None:
        """Ray's client would wait for ever for a port that listens and says nothing."""
        try:
            urllib.request.urlopen(f"{self.shown_address}/api/version", timeout=CONNECT_LIMIT_S).close()
        except urllib.error.HTTPError as error:
            if error.code not in (401, 403):
                raise self._no_dashboard(f"HTTP {error.code}") from error
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise ClusterUnreachableError(
                f"no Ray dashboard answers at {cut(self.shown_address)} ({str(error).strip()}): check host and port of "
                "--address, and that the head was started with its dashboard"
            ) from error

    def _asking(self, ask: Callable[[], Any]) -> Any:
        """Ray's errors in our words."""
        try:
            return ask()
        except ray.exceptions.AuthenticationError as error:
            why = str(error).splitlines()[0].partition(". ")[0]
            raise ClusterUnreachableError(f"{self.shown_address} refuses us ({why}): {TOKEN_MEND}") from error
        except (OSError, RuntimeError) as error:
            # The server's tracebacks end with what happened.
            last_line = str(error).strip().splitlines()[-1]
            mend = (
                AGENT_MEND if "No available agent" in last_line else "check that this is a Ray head with its job server"
            )
            raise ClusterUnreachableError(f"{self.shown_address}: {last_line}; {mend}") from error

    def _understood(self, ask: Callable[[], Any]) -> Any:
        """What is asked for, where the answer has the form of Ray's: its client trusts that it has."""
        try:
            return self._asking(ask)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise self._no_dashboard(f"{type(error).__name__}: {cut(first_line(error))}") from error

    def _no_dashboard(self, why: str) -> ClusterUnreachableError:
        return ClusterUnreachableError(
            f"{self.shown_address} answers, but not as Ray's dashboard ({why}): check --address"
        )

    def _get(self, path: str) -> Any:
        # The client has no public call for the versions; it has the token and the TLS settings (ray 2.60.0).
        response = self._asking(lambda: self._client._do_request("GET", path))
        try:
            return response.json() if response.ok else {}
        except json.JSONDecodeError:
            return {}

    def jobs(self) -> list[Job]:
        """Every job that was submitted to this cluster."""
        known = self._understood(self._client.list_jobs)
        return [
            Job(
                job.submission_id,
                job.status.is_terminal(),
                (job.metadata or {}).get(SWEEP_KEY),
                (job.metadata or {}).get(PACKAGE_KEY),
            )
            for job in known
            if job.submission_id
        ]

    def start(self, job_id: str, sweep: str, package: Package, command: str, requirements: Sequence[str]) -> None:
        """Send the package and start the job; its driver runs on the head and takes neither a CPU nor a GPU there."""
        with tempfile.TemporaryDirectory(prefix="orchestrator-submit-") as folder:
            package.write(Path(folder))
            self._asking(
                lambda: self._client.submit_job(
                    entrypoint=command,
                    submission_id=job_id,
                    runtime_env=runtime_env(Path(folder), requirements, git_state(Path.cwd())),
                    metadata={SWEEP_KEY: sweep, PACKAGE_KEY: package.digest},
                )
            )

    def follow(self, job_id: str, show: Callable[[str], None]) -> Any:
        """Show the job's log as it grows; Ray's JobDetails once the job has ended.

        Raises:
            ClusterUnreachableError: the cluster fell silent; the job may well go on.
        """
        shown = 0
        silent_since_s: float | None = None
        while True:
            try:
                before, shown = shown, asyncio.run(self._tail(job_id, shown, show))
                if shown > before:
                    silent_since_s = None
                details = self._understood(lambda: self._client.get_job_info(job_id))
                silent_since_s = None
                if details.status.is_terminal():
                    return details
            except ClusterUnreachableError as error:
                # From the first question that fails: the log may have been read for hours without one.
                silent_since_s = silent_since_s or time.monotonic()
                if time.monotonic() - silent_since_s > LOST_LIMIT_S:
                    raise ClusterUnreachableError(
                        f"{error}; job {job_id} goes on where its head lives: the same command follows it again"
                    ) from error
            time.sleep(RETRY_S)

    async def _tail(self, job_id: str, shown: int, show: Callable[[str], None]) -> int:
        """Show what comes after the first `shown` characters; how many have been shown in the end."""
        told = 0
        lines = self._client.tail_job_logs(job_id)
        while True:
            try:
                # Not asyncio.wait_for: up to Python 3.11 it loses a Ctrl-C that comes together with a line.
                async with asyncio.timeout(SILENCE_LIMIT_S):
                    text = await anext(lines)
            except (StopAsyncIteration, TimeoutError, aiohttp.ClientError, OSError, RuntimeError):
                # The end, or a connection that was lost: the job's status tells which.
                return shown
            told += len(text)
            if told > shown:
                # Every connection begins with the log's first line.
                show(text[-(told - shown) :])
                shown = told


def submit(
    sweep: SweepConfig,
    text: str,
    address: str,
    isolation: str,
    webhook: str | None,
    *,
    install: bool,
    say: Callable[[str], None],
) -> tuple[JobServer, str]:
    """Start the sweep as a job, or find the one that is at work on it; `text` is its file with the overrides.

    webhook: the address that the job tells of its end.

    Raises:
        InputError: it cannot be run as it is written; nothing was started.
        ClusterUnreachableError: the cluster does not answer, or asks for a token.
    """
    package = pack(sweep, text, webhook)
    requirements = pinned_requirements(sweep) if install else []
    server = JobServer(address)
    if server.python and server.python.split(".")[:2] != platform.python_version().split(".")[:2]:
        say(f"the cluster runs Python {server.python}, and here it is {platform.python_version()}: its own is used")
    job_id, at_work = job_for(sweep.name, package.digest, server.jobs(), server.shown_address)
    if at_work:
        say(f"job {job_id} is at work on this sweep already")
    else:
        server.start(job_id, sweep.name, package, entrypoint(isolation, notifies=bool(webhook)), requirements)
        say(f"job {job_id} was submitted to {server.shown_address}")
    if not (is_remote(sweep.storage) or is_the_clusters(sweep.storage)):
        say(f"storage {sweep.storage} is relative: it is made in the home folder of the cluster's user")
    return server, job_id


def follow(server: JobServer, job_id: str, show: Callable[[str], None], say: Callable[[str], None]) -> int:
    """Show the log to its end; the job's exit code. Ctrl-C ends the showing, and not the job.

    Raises:
        ClusterUnreachableError: the cluster fell silent, or could not run the job.
    """
    try:
        details = server.follow(job_id, show)
    except KeyboardInterrupt:
        with _once_interrupted():
            say(f"no longer following; job {job_id} goes on. The same command follows it again")
            say(f"stop it with: ray job stop {job_id} --address {server.shown_address}")
        return 130
    exit_code = exit_code_of(details.status.value, details.driver_exit_code)
    if exit_code is None:
        raise ClusterUnreachableError(f"job {job_id} was ended by the cluster: {details.message}")
    if exit_code and "No module named" in (details.message or ""):
        say("the cluster lacks packages: submit with --install-requirements, or install them on every node")
    if exit_code == 130:
        say(f"job {job_id} was stopped: submit the same sweep again to go on")
    return exit_code


@contextmanager
def _once_interrupted() -> Iterator[None]:
    """Let a second Ctrl-C not cut what is said of the first: `timeout` sends its signal to its child, and then to the
    group of both."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
