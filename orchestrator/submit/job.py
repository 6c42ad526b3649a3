"""What a job is: its command, its environment, its id, and the exit code that its end means. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from orchestrator.config.sweep_config import SweepConfig
from orchestrator.errors import InputError
from orchestrator.results.provenance import told_to_a_job
from orchestrator.results.records import GitState
from orchestrator.submit.package import SWEEP_FILE, WEBHOOK_FILE

MINIMUM_PYTHON = (3, 11)
STOP_LIMIT_S = 90
"""So long a job that is stopped may take to save its state; Ray's own default of 3 s kills it before."""
INSTALL_LIMIT_S = 3600


def entrypoint(isolation: str, *, notifies: bool) -> str:
    """The job's command line; all else stands in packed files, since everybody may read a job's command."""
    notify = ["--notify", f"@{WEBHOOK_FILE}"] if notifies else []
    return shlex.join(["python", "-m", "orchestrator", "run", SWEEP_FILE, "--isolation", isolation, *notify])


def runtime_env(folder: Path, requirements: Sequence[str], git: GitState | None) -> dict[str, Any]:
    """Ray's description of the job's environment; `requirements` are installed in it.

    git: of the checkout that it is submitted from. Not a packed file, or a commit alone would make another package.
    """
    environment: dict[str, Any] = {
        "working_dir": str(folder),
        # The limit is read by the process that starts and stops the job's driver.
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_LIMIT_S), **told_to_a_job(git)},
    }
    if requirements:
        environment["pip"] = {"packages": list(requirements), "pip_check": False}
        environment["config"] = {"setup_timeout_seconds": INSTALL_LIMIT_S}
    return environment


def pinned_requirements(sweep: SweepConfig) -> list[str]:
    """What a cluster must have for this package to run the sweep.

    Raises:
        InputError: the sweep needs more than that, or this package is not installed and so nobody knows.
    """
    if problem := not_among_them(sweep):
        raise InputError(f"--install-requirements: {problem}, or set the nodes up by hand and leave it out")
    try:
        return pinned(metadata.requires("orchestrator") or ())
    except metadata.PackageNotFoundError as error:
        raise InputError(
            "orchestrator is not installed here, so that its requirements are not known: "
            "install it with pip, or leave --install-requirements out"
        ) from error


def not_among_them(sweep: SweepConfig) -> str | None:
    """What the sweep needs and the requirements do not bring, with what to change; or None.

    Trials with flash-attn, which they do not bring either, are refused one by one.
    """
    if sweep.model == "builtin:smollm2-135m":
        return f"it does not bring the weights of {sweep.model}: name another model"
    if sweep.evaluate.tasks:
        return "it does not bring lm-eval, which evaluate.tasks needs: leave tasks out"
    return None


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


@dataclass(frozen=True, slots=True)
class Job:
    """A job that the cluster knows."""

    job_id: str
    ended: bool
    sweep: str | None = None
    """The sweep's name, where `submit` sent it."""
    package: str | None = None


def job_for(sweep: str, package: str, known: Collection[Job], address: str) -> tuple[str, bool]:
    """The id of the sweep's job, NAME or NAME-2 and so on, and whether it is there and at work already.

    address: the dashboard's, as it is shown.

    Raises:
        InputError: it is at work with another sweep file, data or code.
    """
    for job in known:
        if job.sweep != sweep or job.ended:
            continue
        if job.package != package:
            raise InputError(
                f"job {job.job_id} is at work on sweep {sweep} as it was before you changed it: "
                f"wait for it, stop it with `ray job stop {job.job_id} --address {address}`, or give this one another "
                "--name"
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
    if status == "SUCCEEDED":
        return 0
    # Any other is not our own: a signal's (negative, or above 128 where a shell tells it), or the shell's.
    return driver_exit_code if driver_exit_code in (1, 2, 3, 70, 130) else None
