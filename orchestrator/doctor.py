"""What this machine or cluster can run: every setting by planning's own rules, and what a sweep needs around it.

Ray, torch and MLflow are loaded where they are asked, since a broken one is what is looked for.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict

from orchestrator.config.storage_address import DATABASE, is_remote, storage_problem
from orchestrator.config.trial_config import Precision, TrialConfig
from orchestrator.errors import ClusterUnreachableError, counted, cut, first_line
from orchestrator.planning.compatibility import Case, refusals
from orchestrator.planning.hardware import Hardware, this_machine
from orchestrator.planning.model_shape import shape_of
from orchestrator.planning.notes import notes
from orchestrator.planning.nvidia_smi import Gpu, local_gpus
from orchestrator.reporting import quantities
from orchestrator.results import provenance, remote, shared_storage
from orchestrator.results.secrets import without_secret
from orchestrator.training import builtin_models, cpu_adam

EXPECTED = ("bitsandbytes", "flash-attn")
"""Packages that some settings need and others do without."""
PROBE_LIMIT_S = 120.0
CONNECT_LIMIT_S = 5.0
# In a process of its own: it creates no CUDA context here, and a library that crashes takes nothing else along.
_TORCH_PROBE = """
import importlib, json, torch
found = {"cuda": torch.version.cuda, "gpus": torch.cuda.device_count(), "nccl": None, "broken": {}}
if torch.version.cuda and torch.distributed.is_nccl_available():
    found["nccl"] = ".".join(str(part) for part in torch.cuda.nccl.version())
for package, module in (("flash-attn", "flash_attn"), ("bitsandbytes", "bitsandbytes")):
    if importlib.util.find_spec(module):
        try:
            importlib.import_module(module)
        except Exception as error:
            found["broken"][package] = f"{type(error).__name__}: {error}".splitlines()[0]
print(json.dumps(found))
"""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


class Answer(_Part):
    """Whether one setting runs here, all others being ordinary."""

    setting: str
    value: str | int
    runs: bool
    together_with: dict[str, Any] = {}
    """Other settings that it needs, as `zero_stage: 3`."""
    reasons: tuple[str, ...] = ()
    """Why it does not run, each with what to change: the words in which `plan` refuses a trial."""
    notes: tuple[str, ...] = ()


class Space(_Part):
    """The storage as a node sees it."""

    free_bytes: int | None
    """None of an object store."""
    total_bytes: int | None
    problem: str | None = None
    """Why it cannot be written, or is another one than the driver's."""


class Node(_Part):
    """One machine."""

    host: str
    hardware: Hardware
    gpus: tuple[Gpu, ...]
    cuda: str | None = None
    """That torch was built for."""
    nccl: str | None = None
    nccl_settings: dict[str, str] = {}
    """NCCL's variables in the environment, which are the user's matter."""
    versions: dict[str, str]
    has_cpu_adam: bool = False
    """DeepSpeed's AdamW for CPUs, built ahead, steps what `offload` keeps here; torch's does otherwise."""
    models: dict[str, str]
    """Each built-in model: `cached`, `made at first use`, or what is missing for it."""
    problems: tuple[str, ...] = ()
    storage: Space | None = None
    settings: tuple[Answer, ...] = ()
    """None of a node that no trial would run on: without a GPU where others have one, or without CPUs to give."""


class Check(_Part):
    """One thing that a sweep needs beside its hardware."""

    what: str
    ok: bool
    asked: bool
    """Named on the command line, so that the command fails with it."""
    detail: str


class Diagnosis(_Part):
    """All that `doctor` found; its JSON document."""

    schema_version: Literal[1] = 1
    cluster: str | None
    nodes: tuple[Node, ...]
    checks: tuple[Check, ...]

    @property
    def unreachable(self) -> tuple[Check, ...]:
        """What was asked for and cannot be reached."""
        return tuple(check for check in self.checks if check.asked and not check.ok)


def examine(address: str | None, storage: str | None, tracking_uri: str | None) -> Diagnosis:
    """Look at this machine, or at every node of the cluster at `address`."""
    where = storage if storage and is_remote(storage) else str(remote.local_storage(storage or "sweeps"))
    checks: list[Check] = []
    with _marked(where) as (token, problem):
        if address:
            nodes, check = _cluster_nodes(address, where, token)
            checks.append(check)
        else:
            nodes = [look(where, token)]
        checks.append(_storage_check(where, storage is not None, nodes, token, problem))
    checks.append(tracking_check(tracking_uri, remote.local_storage(where)))
    if address and nodes:
        checks.append(versions_check(nodes, provenance.versions()))
    return Diagnosis(cluster=address, nodes=tuple(_with_settings(nodes)), checks=tuple(checks))


# The settings


def answers(hardware: Hardware, workers: int) -> tuple[Answer, ...]:
    """Every value of every setting that hardware or packages decide about."""
    usual = _usual_precision(hardware, workers)
    return tuple(_answer(setting, value, usual, hardware, workers) for setting, value in _values())


def _values() -> Iterator[tuple[str, Any]]:
    for precision in Precision:
        yield "precision", precision
    for setting in ("engine", "zero_stage", "offload", "attention", "optimizer"):
        for value in get_args(TrialConfig.model_fields[setting].annotation):
            yield setting, value


def _answer(setting: str, value: Any, usual: Mapping[str, Any], hardware: Hardware, workers: int) -> Answer:
    plain = _case({**usual, setting: value}, hardware, workers)
    # Parameters are offloaded at ZeRO-3 only, and amp_fp16 runs without ZeRO, which is no fault of this machine.
    for more in ({}, {"zero_stage": 3}, {"zero_stage": 0}):
        case = _case({**usual, **more, setting: value}, hardware, workers)
        if not refusals(case):
            return Answer(setting=setting, value=value, runs=True, together_with=more, notes=notes(case))
    return Answer(setting=setting, value=value, runs=False, reasons=refusals(plain))


def _usual_precision(hardware: Hardware, workers: int) -> dict[str, Any]:
    """What a sweep file that names no precision gets, or the next that the device computes."""
    wanted = ("bf16", "fp16", "fp32") if hardware.device == "cuda" else ("fp32",)
    cases = ({"precision": precision} for precision in wanted)
    # Where none runs each setting is told why.
    return next((case for case in cases if not refusals(_case(case, hardware, workers))), {"precision": "fp32"})


def _case(settings: Mapping[str, Any], hardware: Hardware, workers: int) -> Case:
    shape = shape_of(builtin_models.CONFIGS["tiny-llama"])
    return Case(TrialConfig.model_validate(settings), shape, hardware, workers)


def _with_settings(nodes: Sequence[Node]) -> Iterator[Node]:
    """Two workers a trial where there is room, so that ZeRO has something to shard."""
    gpus = sum(node.hardware.gpus for node in nodes)
    cpus = sum(node.hardware.cpus for node in nodes)
    for node in nodes:
        works = node.hardware.gpus if gpus else node.hardware.cpus
        found = answers(node.hardware, min(2, gpus or cpus)) if works else ()
        yield node.model_copy(update={"settings": found})


# One node: what follows runs there, and imports nothing heavy


def look(storage: str, token: str | None) -> Node:
    """The facts of the machine that this runs on; `token` marks a storage that the asker has written to."""
    gpus, problem = local_gpus()
    problems = [problem] if problem else []
    versions = provenance.versions()
    torch: Mapping[str, Any] = {}
    if "torch" not in versions:
        problems.append("torch is not installed: run scripts/setup")
    elif gpus or "+cpu" not in versions["torch"]:
        torch, problem = _ask_torch()
        problems += [problem] if problem else list(torch_problems(torch, versions, gpus))
    return Node(
        host=platform.node(),
        hardware=this_machine(),
        gpus=gpus,
        cuda=torch.get("cuda"),
        nccl=torch.get("nccl"),
        nccl_settings={name: value for name, value in sorted(os.environ.items()) if name.startswith("NCCL_")},
        versions=versions,
        has_cpu_adam=cpu_adam.is_here("cuda" if gpus else "cpu", versions.get("torch", "")),
        models={f"builtin:{name}": _model_state(name) for name in builtin_models.CONFIGS},
        problems=tuple(problems),
        storage=_space(storage, token),
    )


def look_from_a_task(storage: str, token: str | None) -> Node:
    """The same in a Ray task: one without GPUs may be shown none, and the machine is asked about."""
    if not os.environ.get("CUDA_VISIBLE_DEVICES"):
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    return look(storage, token)


def _ask_torch() -> tuple[dict[str, Any], str | None]:
    try:
        done = subprocess.run(
            [sys.executable, "-c", _TORCH_PROBE],
            capture_output=True,
            text=True,
            timeout=PROBE_LIMIT_S,
        )
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError) as error:
        return {}, f"torch could not be asked ({error}): import it in Python and see"
    except (ValueError, IndexError):
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), f"exit {done.returncode}")
        return {}, f"torch cannot be imported ({last.strip()}): install it again with scripts/setup"
    return found, None


def torch_problems(torch: Mapping[str, Any], versions: Mapping[str, str], gpus: Sequence[Gpu]) -> Iterator[str]:
    """Where torch and its companions do not fit the machine."""
    if gpus and not torch["cuda"]:
        yield f"there are GPUs, and torch {versions['torch']} is built for CPUs only: run scripts/setup again here"
    elif gpus and not torch["gpus"]:
        yield (
            f"torch {versions['torch']} for CUDA {torch['cuda']} sees none of the GPUs with driver {gpus[0].driver}: "
            "update the driver, or unset CUDA_VISIBLE_DEVICES"
        )
    for package, error in torch["broken"].items():
        yield f"{package} is installed and cannot be imported ({error}): install one built for this torch"


def _model_state(name: str) -> str:
    if builtin_models.folder_of(name, remote.cache_folder()).is_dir():
        return "cached"
    return builtin_models.missing_part(name) or "made at first use"


# The storage


@contextmanager
def _marked(where: str) -> Iterator[tuple[str | None, str | None]]:
    """Yields the token of a mark in the storage, or a problem; an object store is the same for all without a mark."""
    if is_remote(where):
        yield None, storage_problem(where) or remote.access_problem(where)
        return
    with contextlib.ExitStack() as stack:
        try:
            token = stack.enter_context(shared_storage.marked(Path(where)))
        except OSError as error:
            yield None, f"cannot be written ({error.strerror or error}): name another with --storage"
        else:
            yield token, None


def _space(storage: str, token: str | None) -> Space | None:
    """Free space, and whether this node sees the asker's mark and can write beside it."""
    if is_remote(storage):
        problem = storage_problem(storage) or remote.access_problem(storage)
        return Space(free_bytes=None, total_bytes=None, problem=problem)
    where = Path(storage)
    there = next((folder for folder in (where, *where.parents) if folder.is_dir()), Path("/"))
    usage = shutil.disk_usage(there)
    return Space(
        free_bytes=usage.free, total_bytes=usage.total, problem=shared_storage.answer(where, token) if token else None
    )


def _storage_check(where: str, asked: bool, nodes: Sequence[Node], token: str | None, problem: str | None) -> Check:
    seen = [(node.host, node.storage) for node in nodes if node.storage]
    if problem is None and token:
        problem = shared_storage.problem(Path(where), token, [(host, space.problem) for host, space in seen])
    elif problem is None:
        problem = "; ".join(f"from {host}: {space.problem}" for host, space in seen if space.problem) or None
    if problem is not None:
        return Check(what=f"storage {cut(where)}", ok=False, asked=asked, detail=problem)
    room = min(
        ((space.free_bytes, space.total_bytes) for _, space in seen if space.free_bytes is not None), default=None
    )
    free = f", {quantities.memory(room[0])} free of {quantities.memory(room[1])}" if room and room[1] else ""
    by = f"writable from {len(seen)} nodes" if len(seen) > 1 else "writable"
    return Check(what=f"storage {cut(where)}", ok=True, asked=asked, detail=by + free)


# The cluster


def _cluster_nodes(address: str, storage: str, token: str | None) -> tuple[list[Node], Check]:
    from orchestrator.sweep import cluster

    what = f"cluster {cut(address)}"
    try:
        cluster.connect(address)
    except ClusterUnreachableError as error:
        return [], Check(what=what, ok=False, asked=True, detail=str(error))
    try:
        nodes, silent, resources = [], [], []
        for node, found in cluster.ask_every_node(look_from_a_task, storage, token):
            if isinstance(found, Exception):
                silent.append(f"{cluster.name_of(node)}: {_last_line(found)}")
                continue
            nodes.append(_as_ray_has_it(found, node["Resources"]))
            resources.append(node["Resources"])
    finally:
        cluster.disconnect()
    nodes.sort(key=lambda node: node.host)
    if silent:
        return nodes, Check(what=what, ok=False, asked=True, detail=f"{'; '.join(silent)}: look at these nodes' logs")
    cpus, gpus = (sum(there.get(kind, 0) for there in resources) for kind in ("CPU", "GPU"))
    has = f"{counted(len(nodes), 'node')}, {counted(cpus, 'CPU')}, {counted(gpus, 'GPU')}"
    return nodes, Check(what=what, ok=True, asked=True, detail=has)


def _as_ray_has_it(node: Node, resources: Mapping[str, float]) -> Node:
    """Ray gives out what it was told of, not what the machine has."""
    cpus, gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
    return node.model_copy(update={"hardware": replace(node.hardware, cpus=cpus, gpus=gpus)})


def _last_line(error: BaseException) -> str:
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)


def versions_check(nodes: Sequence[Node], here: Mapping[str, str]) -> Check:
    """Workers unpickle what the driver sends, and every worker of a trial must compute alike."""
    told = []
    for node in nodes:
        names = [name for name in {**here, **node.versions} if name not in EXPECTED]
        other = [
            f"{name} {node.versions.get(name, 'missing')} (here {here.get(name, 'missing')})"
            for name in names
            if node.versions.get(name) != here.get(name)
        ]
        if other:
            told.append(f"{node.host} has {', '.join(other)}")
    detail = f"{'; '.join(told)}: install the same on every node" if told else "the same as here"
    return Check(what="packages of the nodes", ok=not told, asked=False, detail=detail)


# The tracking server


def tracking_check(named: str | None, storage: Path) -> Check:
    """Asked with the client and the environment that a sweep has."""
    uri = named or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        return Check(what="tracking", ok=True, asked=False, detail=f"no server named: {storage / DATABASE}")
    what = f"tracking {cut(without_secret(uri))}"
    problem = _connect_problem(uri) or _mlflow_problem(uri)
    detail = f"cannot be used ({problem}): start it, or check its address and credentials" if problem else "answers"
    return Check(what=what, ok=problem is None, asked=named is not None, detail=detail)


def _connect_problem(uri: str) -> str | None:
    """Told at once, where MLflow's client would try for long; behind a proxy only that client knows."""
    try:
        parts = urlsplit(uri)
        scheme, host, port = parts.scheme, parts.hostname, parts.port
    except ValueError as error:
        return f"it is no address: {error}"
    if scheme not in ("http", "https") or host is None or urllib.request.getproxies().get(scheme):
        return None
    try:
        socket.create_connection((host, port or (443 if scheme == "https" else 80)), CONNECT_LIMIT_S).close()
    except (OSError, ValueError) as error:
        # A name that no host can have, as a..b, is a UnicodeError.
        return str(error)
    return None


def _mlflow_problem(uri: str) -> str | None:
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    from mlflow import MlflowClient

    try:
        MlflowClient(uri).search_experiments(max_results=1)
    except Exception as error:
        # A database's own kinds and missing drivers among them: whatever it is, it is what was asked for.
        return cut(first_line(error))
    return None


# What a person reads


def render(found: Diagnosis) -> str:
    """Nodes that are alike are told once; then the checks."""
    lines: list[str] = []
    for _, group in groupby(sorted(found.nodes, key=_kind), _kind):
        nodes = list(group)
        lines += [*_node(nodes[0], [node.host for node in nodes]), ""]
    rows = [(check.what, "yes" if check.ok else "no", check.detail) for check in found.checks]
    return "\n".join([*lines, *_aligned([("needed", "there", ""), *rows])])


def _kind(node: Node) -> str:
    # Machines of one kind differ by some KiB of memory.
    memory_gib = round(node.hardware.host_memory_bytes / 2**30)
    return f"{node.hardware.cpus} {memory_gib} {node.model_dump_json(exclude={'host', 'storage', 'hardware'})}"


def _node(node: Node, hosts: Sequence[str]) -> Iterator[str]:
    hardware = node.hardware
    memory = quantities.memory(hardware.host_memory_bytes)
    yield f"{', '.join(hosts)}: {hardware.cpus} CPUs, {memory} of memory, {_gpus(node.gpus)}"
    if node.gpus:
        cuda, nccl = node.cuda or quantities.UNKNOWN, node.nccl or quantities.UNKNOWN
        yield f"driver {node.gpus[0].driver}, torch for CUDA {cuda}, NCCL {nccl}"
    if node.gpus or node.nccl_settings:
        told = ", ".join(f"{name}={value}" for name, value in node.nccl_settings.items())
        yield f"NCCL settings: {told or 'none'}"
    yield ", ".join(f"{package} {version}" for package, version in node.versions.items())
    missing = [package for package in EXPECTED if package not in node.versions]
    if missing:
        yield f"not installed: {', '.join(missing)}"
    yield from (f"{model}: {state}" for model, state in node.models.items())
    yield from (f"problem: {problem}" for problem in node.problems)
    yield ""
    if not node.settings:
        yield "no trial would run here"
        return
    rows = [(f"{a.setting} {a.value}", "yes" if a.runs else "no", _why(a, node.has_cpu_adam)) for a in node.settings]
    yield from _aligned([("setting", "runs", ""), *rows])


def _gpus(gpus: Sequence[Gpu]) -> str:
    told = [
        f"{gpu.name} with {quantities.memory(gpu.memory_bytes)}, compute capability {gpu.compute_capability}"
        for gpu in gpus
    ]
    return ", ".join(f"{len(list(same))} × {name}" for name, same in groupby(told)) or "no GPU"


def _why(answer: Answer, has_cpu_adam: bool) -> str:
    named = f"{answer.setting} {answer.value}: "
    needed = [f"with {name} {value}" for name, value in answer.together_with.items()]
    steps = []
    if answer.runs and answer.setting == "offload" and answer.value != "none":
        steps = ["AdamW is DeepSpeed's, built ahead" if has_cpu_adam else "AdamW is torch's"]
    return "; ".join([*(reason.removeprefix(named) for reason in answer.reasons), *needed, *steps, *answer.notes])


def _aligned(rows: Sequence[tuple[str, str, str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    return ["  ".join((row[0].ljust(widths[0]), row[1].ljust(widths[1]), row[2])).rstrip() for row in rows]
