"""What goes along with a job: the sweep file, this package's own code, and data and model that lie here."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import orchestrator
from orchestrator.config.local_path import local_path
from orchestrator.config.sweep_config import SweepConfig
from orchestrator.errors import InputError
from orchestrator.training import data_rows, inputs, model_source

LIMIT_BYTES = 100 * 2**20
"""Ray keeps the package in the memory of its head and copies it to every node."""
SWEEP_FILE = "sweep.yaml"
WEBHOOK_FILE = "webhook.txt"


@dataclass(frozen=True, slots=True)
class Package:
    """The working directory of a job."""

    sweep: str
    """The sweep file's text, with its overrides."""
    files: tuple[tuple[str, Path], ...]
    """Path in the package, and where the file lies here."""
    webhook: str | None = None
    """The address that is told of the end."""

    @property
    def digest(self) -> str:
        """The same for the same sweep, data and code."""
        digest = hashlib.sha256(self.sweep.encode())
        if self.webhook:
            digest.update(f"\0{WEBHOOK_FILE}\0{self.webhook}".encode())
        for name, file in self.files:
            digest.update(f"\0{name}\0".encode())
            digest.update(hashlib.sha256(file.read_bytes()).digest())
        return digest.hexdigest()[:16]

    def write(self, folder: Path) -> None:
        """Lay the files out."""
        (folder / SWEEP_FILE).write_text(self.sweep, encoding="utf-8")
        if self.webhook:
            (folder / WEBHOOK_FILE).write_text(self.webhook, encoding="utf-8")
        for name, file in self.files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / name)


def pack(sweep: SweepConfig, text: str, webhook: str | None = None) -> Package:
    """The sweep file, this package's own code, and the data and model that are named by a relative path.

    What an absolute path names is the cluster's: all its nodes see it there.

    Raises:
        InputError: model or data cannot be found or used, or the package would be too large.
    """
    tasks = sweep.evaluate.task_folder
    if tasks and not is_the_clusters(tasks):
        raise InputError(
            f"evaluate.task_folder: {tasks} is relative, and a job has no such folder: name an absolute path that all "
            "nodes see"
        )
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
    return Package(text, tuple(sorted(set(files))), webhook)


def require_room(files: Iterable[tuple[str, Path]], limit_bytes: int = LIMIT_BYTES) -> None:
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
    here = Path(str(orchestrator.__file__)).parent
    for file in sorted(here.rglob("*")):
        if file.suffix in (".py", ".jinja"):
            yield (Path(here.name) / file.relative_to(here)).as_posix(), file


def _local_sources(sweep: SweepConfig) -> Iterator[tuple[str, str, list[Path]]]:
    """Key, source and files of what is named by a relative path; what cannot be used is told."""
    for key, source in (("data.train", sweep.data.train), ("data.eval", sweep.data.eval)):
        if isinstance(source, str) and not is_the_clusters(source) and (found := data_rows.local_files(source)):
            yield key, source, found
    if is_the_clusters(sweep.model):
        return
    folder = Path(sweep.model)
    # A hub id is the cluster's to fetch: it may reach the hub where we do not.
    if folder.is_dir() or not model_source.is_hub_id(sweep.model):
        inputs.find_model(sweep)
        yield "model", sweep.model, sorted(file for pattern in model_source.FILES for file in folder.glob(pattern))


def is_the_clusters(source: str) -> bool:
    """Whether a path is one that all nodes see, and not one of this machine."""
    return local_path(source).is_absolute()
