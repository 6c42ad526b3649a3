"""The Ray cluster: joining it or starting one here, and how many trials it has room for."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray._private import services
from ray.autoscaler import sdk
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.config.sweep_config import ResourcesConfig
from orchestrator.errors import ClusterUnreachableError, InputError, StorageError, cut
from orchestrator.planning.room import trials_that_fit, workers_on
from orchestrator.results import remote, shared_storage
from orchestrator.results.folders import SweepFolder
from orchestrator.sweep.own_sessions import children_in_own_sessions
from orchestrator.sweep.worker import ACCELERATOR, GroupShape

CONNECT_LIMIT_S = 5.0
NODE_LIMIT_S = 180.0
"""A node that starts its first worker may take minutes."""
JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""What a Ray job's driver is told of its job (ray 2.60.0, dashboard/modules/job/job_supervisor.py)."""
LOCAL, AUTO = "local", "auto"
SCALE_UP_LOOK_S = 2.0
# Read by Ray in this process and handed on to its workers; each is our need, and a user's own value wins.
ENVIRONMENT = {
    "RAY_TRAIN_V2_ENABLED": "1",
    # Ray's controller looks after its workers this often; our reports do not pass through it.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # A process each for every group, for what does not pass through Ray Train here: metrics, and notices to its loop.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    # Ours to record: trials that end without a metric are results too, and Tune's loggers would write all twice.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # Signals are heard by `sweep.signals`.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # Nobody reads Tune's own state back: it is written at the start and the end, and not all of it every ten seconds.
    "TUNE_GLOBAL_CHECKPOINT_S": "inf",
    # A trial is many tasks for Ray, and a cluster of our own kept 46 KiB of their story, up to 100,000 tasks.
    "RAY_task_events_max_num_task_in_gcs": "10000",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # In a job whose environment sets one of the variables that we hand on, Ray would refuse to start (ray 2.60.0).
    "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1",
}


def address_of(address: str | None) -> str:
    """The cluster at `address`, or that of the Ray job we run in, or a new one on this machine."""
    return address or os.environ.get("RAY_ADDRESS") or LOCAL


def runs_in_a_job() -> bool:
    """Whether this process is the driver of a Ray job, whose working directory is removed after it."""
    return JOB in os.environ


def node_limit_s(job: str | None) -> float:
    """How long a node may take to its first answer, by what stands in `JOB`: it installs the job's packages first."""
    environment = (json.loads(job).get("runtime_env") if job else None) or {}
    if not environment.get("pip"):
        return NODE_LIMIT_S
    return max(NODE_LIMIT_S, float((environment.get("config") or {}).get("setup_timeout_seconds", 0)))


def connect(address: str | None) -> None:
    """Join the cluster that `address_of` names, or start it.

    Raises:
        ClusterUnreachableError: nothing answers there.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    address = _reachable(address_of(address))
    # The processes of a cluster of our own inherit our environment; those of another are told.
    told = {name: os.environ[name] for name in ENVIRONMENT if name.startswith("RAY_TRAIN_")}
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        with children_in_own_sessions():
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                # A cluster of our own ends with us: it needs no dashboard, whose start takes seconds.
                include_dashboard=False if address == LOCAL else None,
                runtime_env=None if address == LOCAL else {"env_vars": told},
            )
    except Exception as error:
        # Ray has no type of its own for this; a raylet that takes over 30 s is a bare Exception (ray 2.60.0, node.py).
        raise not_joined(address, error) from error
    except SystemExit as ended:
        raise KeyboardInterrupt from ended
    finally:
        # In a main thread Ray sets one of its own, which exits with the signal's number (2.60.0, worker.py, init).
        if signal.getsignal(signal.SIGTERM) is not on_sigterm:
            signal.signal(signal.SIGTERM, on_sigterm)


def not_joined(address: str, error: Exception) -> ClusterUnreachableError:
    """Why a cluster was not joined, out of Ray's words."""
    why = " ".join(str(error).split())
    if isinstance(error, OSError) and error.filename:
        return ClusterUnreachableError(
            f"Ray cannot be used here, since {error.filename} cannot be had ({error.strerror}): mend that, or give Ray "
            "other folders, by HOME and RAY_TMPDIR"
        )
    if address == LOCAL:
        return ClusterUnreachableError(
            f"Ray did not start on this machine ({why}): run the same command again when it is less busy, and see "
            "Ray's logs in /tmp/ray/session_latest/logs"
        )
    if why.startswith("Version mismatch"):
        # Ray's words, with both versions in them (ray 2.60.0, ray/_private/utils.py).
        mend = "take the cluster's versions here, or use `orchestrator submit`, whose driver runs on the cluster's own"
        return ClusterUnreachableError(f"the cluster at {address} cannot be joined ({why}): {mend}")
    mend = "start one with `ray start --head`, or leave --address out"
    return ClusterUnreachableError(f"no Ray cluster answers at {cut(address)} ({cut(why)}): {mend}")


def _reachable(address: str) -> str:
    """Where Ray would go, after a look whether somebody listens there: Ray itself would try for minutes.

    Raises:
        ClusterUnreachableError: nobody does, or no port is named.
    """
    if address == LOCAL:
        return address
    named, mend = address, "check host and port, or leave --address out"
    if address == AUTO:
        try:
            named = services.get_ray_address_from_environment(AUTO, None)
        except ConnectionError as error:
            raise not_joined(AUTO, error) from error
        mend = (
            "auto stands for it by RAY_ADDRESS, by a Ray process here, or by Ray's file ray_current_cluster, which a "
            "head that was killed leaves behind; start a cluster with `ray start --head`, or name its host and port"
        )
    host, sign, port = named.removeprefix("ray://").rpartition(":")
    try:
        if not sign:
            raise ValueError("it names no port")
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_LIMIT_S).close()
    except (OSError, ValueError) as error:
        raise ClusterUnreachableError(f"no Ray cluster answers at {cut(named)} ({error}): {mend}") from error
    return named


def nodes() -> tuple[Mapping[str, float], ...]:
    """What each living node has."""
    return tuple(node["Resources"] for node in _alive())


def _alive() -> list[Mapping[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def ask_every_node(look: Any, *arguments: Any) -> Iterator[tuple[Mapping[str, Any], Any]]:
    """Call `look` on each living node, without taking a CPU: (Ray's node, result), or the error in place of it."""
    probe = ray.remote(num_cpus=0, max_retries=0)(look)
    asked = {
        probe.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
            *arguments
        ): node
        for node in _alive()
    }
    limit_s = node_limit_s(os.environ.get(JOB))
    ready, late = ray.wait(list(asked), num_returns=len(asked), timeout=limit_s)
    for task in ready:
        try:
            yield asked[task], ray.get(task)
        except ray.exceptions.RayError as error:
            yield asked[task], error
    for task in late:
        yield asked[task], TimeoutError(f"no answer in {limit_s:.0f} s")


def require_shared(folder: SweepFolder, say: Callable[[str], None]) -> None:
    """Ask every node of a cluster that has several.

    Raises:
        StorageError: one of them does not see this storage, or cannot write there.
    """
    if len(nodes()) < 2:
        return
    if (limit_s := node_limit_s(os.environ.get(JOB))) > NODE_LIMIT_S:
        say(f"waiting for all nodes to install the job's packages, {limit_s / 60:.0f} minutes at most")
    if folder.remote:
        _require_access(folder.remote)
        return
    where = folder.root
    with shared_storage.marked(where) as token:
        answers = _answers(shared_storage.answer, where, token)
        why = shared_storage.problem(where, token, answers)
    if why:
        raise StorageError(
            f"storage {where} is not one for all {len(answers)} nodes: {why}. Name a mount that all of them see with "
            "--storage"
        )


def _require_access(uri: str) -> None:
    answers = _answers(remote.access_problem, uri)
    if told := [f"from {host}: {why}" for host, why in answers if why]:
        raise StorageError(f"not all {len(answers)} nodes can use the storage: {'; '.join(told)}")


def _answers(look: Any, *arguments: Any) -> list[tuple[str, str | None]]:
    """What each node says of the storage, None where all is well."""
    return [
        (name_of(node), f"cannot be tried ({found})" if isinstance(found, Exception) else found)
        for node, found in ask_every_node(look, *arguments)
        # A node that has gone is counted as alive for some seconds more: no trial will run there.
        if not isinstance(found, ray.exceptions.TaskUnschedulableError | ray.exceptions.NodeDiedError)
    ]


def name_of(node: Mapping[str, Any]) -> str:
    """One of Ray's nodes, as a message names it."""
    return f"node {node.get('NodeManagerHostname') or node['NodeManagerAddress']}"


def room_for(shape: GroupShape, resources: Sequence[Mapping[str, float]]) -> int:
    """Groups of this shape that fit at a time: workers are packed node by node.

    Raises:
        InputError: not one fits.
    """
    groups = _room(shape, resources)
    if not groups:
        have = ", ".join(f"{n.get('CPU', 0):g} CPUs and {n.get('GPU', 0):g} GPUs" for n in resources)
        raise InputError(
            f"a trial takes {_told(shape)}, and the cluster has {have}: lower resources.workers_per_trial, "
            "cpus_per_worker or gpus_per_worker, or give resources.scale_up_minutes where nodes come when asked"
        )
    return groups


def await_room(resources: ResourcesConfig, say: Callable[[str], None]) -> None:
    """Where the sweep file says that nodes come when asked, ask for one trial's and wait for them.

    Ray does not tell what an autoscaler could start, nor whether there is one (2.60.0): so the sweep file must.

    Raises:
        InputError: they did not come in time.
    """
    if resources.scale_up_minutes is None:
        return
    gpus = resources.gpus_per_worker
    gpus = float(gpus) if isinstance(gpus, int | float) else 1.0
    shape = GroupShape(resources.workers_per_trial, gpus, resources.cpus_per_worker, resources.accelerator)
    until_s = time.monotonic() + resources.scale_up_minutes * 60
    asked = False
    try:
        while _room(shape, nodes()) == 0:
            if time.monotonic() > until_s:
                raise InputError(
                    f"no node for a trial came up in {resources.scale_up_minutes:g} minutes: see the autoscaler's log "
                    "(`ray status`), raise resources.scale_up_minutes, or ask for less"
                )
            if not asked:
                say(f"asking the cluster for room for one trial ({_told(shape)}), and waiting for it")
                sdk.request_resources(bundles=[shape.bundle] * shape.workers)
                asked = True
            time.sleep(SCALE_UP_LOOK_S)
    finally:
        if asked:
            # From here on the trials' own placement groups ask: idle nodes may go again.
            sdk.request_resources(bundles=[])


def has_room_beside(shape: GroupShape, avoided: Collection[str]) -> bool:
    """Whether a group fits on the living nodes but these; what is busy now may be free later."""
    return _room(shape, [node["Resources"] for node in _alive() if node["NodeID"] not in avoided]) > 0


def _told(shape: GroupShape) -> str:
    gpu = f" {shape.accelerator}" if shape.accelerator else ""
    return f"{shape.workers} workers of {shape.cpus_per_worker:g} CPUs and {shape.gpus_per_worker:g}{gpu} GPUs each"


def placed(shape: GroupShape, resources: Sequence[Mapping[str, float]]) -> GroupShape:
    """The shape, kept on one node wherever a node has room for all its workers.

    Spread over nodes because some are busy, a trial would be slower than its like by the network's share.
    """
    return replace(shape, on_one_node=any(_workers_on(node, shape) >= shape.workers for node in resources))


def _room(shape: GroupShape, resources: Sequence[Mapping[str, float]]) -> int:
    rooms = [_workers_on(node, shape) for node in resources]
    return trials_that_fit(rooms, shape.workers, on_one_node=shape.on_one_node)


def _workers_on(node: Mapping[str, float], shape: GroupShape) -> int:
    if shape.accelerator and f"{ACCELERATOR}{shape.accelerator}" not in node:
        return 0
    return workers_on(node.get("CPU", 0), node.get("GPU", 0), shape.cpus_per_worker, shape.gpus_per_worker)


def disconnect() -> None:
    """Leave the cluster; one that `connect` started ends."""
    ray.shutdown()


def start_switchboard() -> Any:
    """The sweep's switchboard."""
    from orchestrator.sweep.switchboard import Switchboard

    # Every group waits here with several calls at a time.
    return _beside_the_driver(Switchboard).remote()


def start_groups(board: Any, shape: GroupShape, model: str, storage: Path, ahead: int) -> Any:
    """The sweep's worker groups, so many of them on their way."""
    from orchestrator.sweep.worker_group import WorkerGroups

    groups = _beside_the_driver(WorkerGroups).remote(board, shape, model, str(storage), ahead)
    groups.start_ahead.remote()
    return groups


def watch(board: Any, groups: Any) -> Callable[[], ClusterUnreachableError | None]:
    """A look at whether one of the sweep's own actors has died, without which no trial goes on."""
    lives = {board.life.remote(): "switchboard", groups.life.remote(): "worker groups"}

    def look() -> ClusterUnreachableError | None:
        ended, _ = ray.wait(list(lives), num_returns=1, timeout=0)
        if not ended:
            return None
        return ClusterUnreachableError(
            f"the process of its {lives[ended[0]]} on the driver's node was killed, as where memory runs out"
        )

    return look


def _beside_the_driver(actor: type) -> Any:
    """On the driver's node, so that it lives as long as the driver; a slot or worker may wait in each of its calls."""
    # Not softly: Ray put such an actor, which takes no CPU, on another node all the same (seen in ray 2.60.0).
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote: Any = ray.remote(actor)
    return remote.options(num_cpus=0, max_concurrency=10_000, scheduling_strategy=here)
