"""A sweep as a Ray job: what is packed, what runs there, under which id; and following it to its end.

It is what `ray job submit --working-dir . -- python -m orchestrator run SWEEP` does, checked before anything is sent.
Ray is loaded where it is asked, so that a sweep file that is wrong is told at once.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import platform
import shlex
import shutil
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from orchestrator.config.sweep_config import SweepConfig
from orchestrator.errors import ClusterUnreachableError, InputError
from orchestrator.results.provenance import without_secret
from orchestrator.training import data_rows, model_source

PACKAGE_LIMIT_BYTES = 100 * 2**20
"""Ray keeps the package in the memory of its head and copies it to every node."""
SWEEP_FILE = "sweep.yaml"
MINIMUM_PYTHON = (3, 11)
STOP_LIMIT_S = 90
"""So long a job that is stopped may take to save its state; Ray's own default of 3 s kills it before."""
INSTALL_LIMIT_S = 3600
CONNECT_LIMIT_S = 5.0
LOST_LIMIT_S = 120.0
"""A cluster that is silent for so long is given up; the job is not."""
SILENCE_LIMIT_S = 60.0
"""A log that says nothing for so long is opened again: the connection may be dead."""
RETRY_S = 1.0
SWEEP_KEY, PACKAGE_KEY = "orchestrator_sweep", "orchestrator_package"
TOKEN_MEND = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH, to the token of the cluster"


# What is packed


@dataclass(frozen=True, slots=True)
class Package:
    """The working directory of a job."""

    sweep: str
    """The sweep file's text, with its overrides."""
    files: tuple[tuple[str, Path], ...]
    """Path in the package, and where the file lies here."""

    @property
    def digest(self) -> str:
        """The same for the same sweep, data and code."""
        digest = hashlib.sha256(self.sweep.encode())
        for name, file in self.files:
            digest.update(f"\0{name}\0".encode())
            digest.update(hashlib.sha256(file.read_bytes()).digest())
        return digest.hexdigest()[:16]

    def write(self, folder: Path) -> None:
        """Lay the files out."""
        (folder / SWEEP_FILE).write_text(self.sweep, encoding="utf-8")
        for name, file in self.files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / name)


def pack(sweep: SweepConfig, text: str) -> Package:
    """The sweep file, this package's own code, and the data and model that are named by a relative path.

    What an absolute path names is the cluster's: all its nodes see it there.

    Raises:
        InputError: model or data cannot be found or used, or the package would be too large.
    """
    files = [*_own_code()]
    for key, source, found in _local_sources(sweep):
        for file in found:
            inside = Path(os.path.normpath(file))
            if inside.parts[0] == "..":
                raise InputError(
                    f"{key}: {source} lies outside of {Path.cwd()}, and only what is below is packed: "
                    "submit from a folder above it, or name an absolute path that all nodes see"
                )
            files.append((inside.as_posix(), file))
    require_room(files)
    return Package(text, tuple(sorted(set(files))))


def require_room(files: Iterable[tuple[str, Path]], limit_bytes: int = PACKAGE_LIMIT_BYTES) -> None:
    """Refuse a package that is too large.

    Raises:
        InputError: it is; the largest file is named.
    """
    sizes = {name: file.stat().st_size for name, file in files}
    if (total := sum(sizes.values())) > limit_bytes:
        largest = max(sizes, key=lambda name: sizes[name])
        raise InputError(
            f"the job's package would have {total / 2**20:.0f} MiB, of which {largest} has "
            f"{sizes[largest] / 2**20:.0f} MiB, and Ray copies it to every node: at most {limit_bytes / 2**20:.0f} MiB "
            "go along. Put it where all nodes see it and name its absolute path"
        )


def _own_code() -> Iterator[tuple[str, Path]]:
    here = Path(__file__).parent
    for file in sorted(here.rglob("*")):
        if file.suffix in (".py", ".jinja"):
            yield (Path(here.name) / file.relative_to(here)).as_posix(), file


def _local_sources(sweep: SweepConfig) -> Iterator[tuple[str, str, list[Path]]]:
    """Key, source and files of what is named by a relative path; what cannot be used is told."""
    for key, source in (("data.train", sweep.data.train), ("data.eval", sweep.data.eval)):
        if isinstance(source, str) and not _is_the_clusters(source) and (found := data_rows.local_files(source)):
            yield key, source, found
    if _is_the_clusters(sweep.model):
        return
    folder = Path(sweep.model)
    # A hub id is the cluster's to fetch: it may reach the hub where we do not.
    if folder.is_dir() or not model_source.is_hub_id(sweep.model):
        _require_model(sweep)
        yield "model", sweep.model, sorted(file for pattern in model_source.FILES for file in folder.glob(pattern))


def _require_model(sweep: SweepConfig) -> None:
    from orchestrator.planning.model_shape import shape_of
    from orchestrator.sweep.preparation import require_targets

    require_targets(sweep, shape_of(model_source.resolve(sweep.model).config))


def _is_the_clusters(source: str) -> bool:
    return Path(source).expanduser().is_absolute()


# What runs there


def entrypoint(isolation: str) -> str:
    """The job's command line; all else stands in the packed sweep file, since everybody may read a job's command."""
    return shlex.join(["python", "-m", "orchestrator", "run", SWEEP_FILE, "--isolation", isolation])


def runtime_env(folder: Path, requirements: Sequence[str]) -> dict[str, Any]:
    """Ray's description of the job's environment; `requirements` are installed in it."""
    environment: dict[str, Any] = {
        "working_dir": str(folder),
        # Read by the process that starts and stops the job's driver.
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_LIMIT_S)},
    }
    if requirements:
        environment["pip"] = {"packages": list(requirements), "pip_check": False}
        environment["config"] = {"setup_timeout_seconds": INSTALL_LIMIT_S}
    return environment


def pinned_requirements() -> list[str]:
    """What a cluster must have for this package to run.

    Raises:
        InputError: this package is not installed, and so nobody knows.
    """
    try:
        return pinned(metadata.requires("orchestrator") or ())
    except metadata.PackageNotFoundError as error:
        raise InputError(
            "orchestrator is not installed here, so that its requirements are not known: "
            "install it with pip, or leave --install-requirements out"
        ) from error


def pinned(declared: Iterable[str]) -> list[str]:
    """Of a package's metadata, what every sweep needs and what quantised bases do; without Ray, the cluster's own."""
    from packaging.requirements import Requirement

    wanted = [Requirement(line) for line in declared]
    return [
        f"{one.name}{one.specifier}"
        for one in wanted
        if one.name != "ray" and (one.marker is None or one.marker.evaluate({"extra": "quantization"}))
    ]


def version_problem(ray_there: str, ray_here: str, python_there: str | None) -> str | None:
    """Why the cluster cannot run this package, which goes along and runs on the cluster's Ray and Python; or None."""
    if ray_there.split(".")[:2] != ray_here.split(".")[:2]:
        return (
            f"the cluster runs Ray {ray_there}, and this orchestrator is made for Ray {ray_here}: "
            "start the cluster with that release, or install the orchestrator of the cluster's"
        )
    if python_there and tuple(int(part) for part in python_there.split(".")[:2]) < MINIMUM_PYTHON:
        minimum = ".".join(str(part) for part in MINIMUM_PYTHON)
        return f"the cluster runs Python {python_there}, and {minimum} is needed: take an image with a newer Python"
    return None


# Under which id


@dataclass(frozen=True, slots=True)
class Job:
    """A job that the cluster knows."""

    job_id: str
    ended: bool
    sweep: str | None = None
    """The sweep's name, where `submit` sent it."""
    package: str | None = None


def job_for(sweep: str, package: str, known: Collection[Job]) -> tuple[str, bool]:
    """The id of the sweep's job, NAME or NAME-2 and so on, and whether it is there and at work already.

    Raises:
        InputError: it is at work with another sweep file, data or code.
    """
    for job in known:
        if job.sweep != sweep or job.ended:
            continue
        if job.package != package:
            raise InputError(
                f"job {job.job_id} is at work on sweep {sweep} as it was before you changed it: "
                f"wait for it, stop it with `ray job stop {job.job_id}`, or give this one another --name"
            )
        return job.job_id, True
    taken = {job.job_id for job in known}
    number = 1
    while (job_id := sweep if number == 1 else f"{sweep}-{number}") in taken:
        number += 1
    return job_id, False


def exit_code_of(status: str, driver_exit_code: int | None) -> int | None:
    """The contract's exit code for a job that ended; None where its driver never came to an end of its own."""
    if status == "STOPPED":
        return 130
    if status == "SUCCEEDED" or driver_exit_code is None:
        return 0 if status == "SUCCEEDED" else None
    return driver_exit_code if driver_exit_code in (1, 2, 3, 130) else 1


# The cluster


class JobServer:
    """The cluster's job API."""

    def __init__(self, address: str) -> None:
        """Reach it.

        Raises:
            InputError: no address of a dashboard, or a cluster that cannot run us.
            ClusterUnreachableError: nothing answers, or it asks for a token.
        """
        self.address = address.rstrip("/")
        self.shown_address = without_secret(self.address)
        if not self.address.startswith(("http://", "https://")):
            raise InputError(
                f"--address {self.shown_address}: takes the address of Ray's dashboard, as http://HEAD:8265"
            )
        self._require_an_answer()
        import ray
        from ray.job_submission import JobSubmissionClient

        # To Ray these would weigh more than the address that it is given.
        for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
            os.environ.pop(name, None)
        for handler in logging.getLogger("ray").handlers:
            handler.setLevel(logging.WARNING)
        self._client: Any = self._asking(lambda: JobSubmissionClient(self.address))
        ray_there = self._get("/api/version")["ray_version"]
        self.python = self._get("/api/v0/cluster_metadata").get("data", {}).get("pythonVersion")
        if problem := version_problem(ray_there, ray.__version__, self.python):
            raise InputError(f"{self.shown_address}: {problem}")

    def _require_an_answer(self) -> None:
        """Ray's client would wait for ever for a port that listens and says nothing."""
        try:
            urllib.request.urlopen(f"{self.shown_address}/api/version", timeout=CONNECT_LIMIT_S).close()
        except urllib.error.HTTPError as error:
            if error.code not in (401, 403):
                raise ClusterUnreachableError(
                    f"{self.shown_address} answers, but not as Ray's dashboard (HTTP {error.code}): check --address"
                ) from error
        except (OSError, ValueError) as error:
            raise ClusterUnreachableError(
                f"no Ray dashboard answers at {self.shown_address} ({error}): check host and port of --address, "
                "and that the head was started with its dashboard"
            ) from error

    def _asking(self, ask: Callable[[], Any]) -> Any:
        """Ray's errors in our words."""
        import ray.exceptions

        try:
            return ask()
        except ray.exceptions.AuthenticationError as error:
            first_line = str(error).splitlines()[0]
            raise ClusterUnreachableError(f"{self.shown_address} refuses us ({first_line}): {TOKEN_MEND}") from error
        except (OSError, RuntimeError) as error:
            raise ClusterUnreachableError(
                f"{self.shown_address}: {error}; check that this is a Ray head with its job server"
            ) from error

    def _get(self, path: str) -> Any:
        # The client has no public call for the versions; it has the token and the TLS settings (ray 2.60.0).
        response = self._asking(lambda: self._client._do_request("GET", path))
        try:
            return response.json() if response.ok else {}
        except json.JSONDecodeError:
            return {}

    def jobs(self) -> list[Job]:
        """Every job that was submitted to this cluster."""
        known = self._asking(self._client.list_jobs)
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
                    runtime_env=runtime_env(Path(folder), requirements),
                    metadata={SWEEP_KEY: sweep, PACKAGE_KEY: package.digest},
                )
            )

    def follow(self, job_id: str, show: Callable[[str], None]) -> Any:
        """Show the job's log as it grows; Ray's JobDetails once the job has ended.

        Raises:
            ClusterUnreachableError: the cluster fell silent; the job may well go on.
        """
        shown = 0
        heard = time.monotonic()
        while True:
            try:
                shown = asyncio.run(self._tail(job_id, shown, show))
                details = self._asking(lambda: self._client.get_job_info(job_id))
                heard = time.monotonic()
                if details.status.is_terminal():
                    return details
            except ClusterUnreachableError as error:
                if time.monotonic() - heard > LOST_LIMIT_S:
                    raise ClusterUnreachableError(
                        f"{error}; job {job_id} goes on where its head lives: the same command follows it again"
                    ) from error
            time.sleep(RETRY_S)

    async def _tail(self, job_id: str, shown: int, show: Callable[[str], None]) -> int:
        """Show what comes after the first `shown` characters; how many have been shown in the end."""
        import aiohttp

        told = 0
        lines = self._client.tail_job_logs(job_id)
        try:
            while True:
                text = await asyncio.wait_for(anext(lines), SILENCE_LIMIT_S)
                told += len(text)
                if told > shown:
                    show(text[shown - told :] if told - len(text) < shown else text)
                    shown = told
        except (StopAsyncIteration, TimeoutError, aiohttp.ClientError, OSError, RuntimeError):
            # The end, or a connection that was lost: the job's status tells which.
            return shown


def submit(
    sweep: SweepConfig,
    text: str,
    address: str,
    isolation: str,
    *,
    install: bool,
    say: Callable[[str], None],
) -> tuple[JobServer, str]:
    """Start the sweep as a job, or find the one that is at work on it; `text` is its file with the overrides.

    Raises:
        InputError: it cannot be run as it is written; nothing was started.
        ClusterUnreachableError: the cluster does not answer, or asks for a token.
    """
    package = pack(sweep, text)
    requirements = pinned_requirements() if install else []
    server = JobServer(address)
    if server.python and server.python.split(".")[:2] != platform.python_version().split(".")[:2]:
        say(f"the cluster runs Python {server.python}, and here it is {platform.python_version()}: its own is used")
    job_id, at_work = job_for(sweep.name, package.digest, server.jobs())
    if at_work:
        say(f"job {job_id} is at work on this sweep already")
    else:
        server.start(job_id, sweep.name, package, entrypoint(isolation), requirements)
        say(f"job {job_id} was submitted to {server.shown_address}")
    if not _is_the_clusters(sweep.storage):
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
