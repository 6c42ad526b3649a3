"""What a sweep file names, looked at before anything starts: model, modules, data, an earlier sweep. Nothing heavy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from orchestrator.config.local_path import local_path
from orchestrator.config.sweep_config import SweepConfig
from orchestrator.errors import DataError, FolderError, InputError
from orchestrator.planning.model_shape import ModelShape, shape_of
from orchestrator.planning.plan import require_targets
from orchestrator.results.folders import SweepFolder
from orchestrator.results.remote import sweep_folder
from orchestrator.results.storage import read_sweep
from orchestrator.training import data_rows, evaluation, model_source
from orchestrator.training.model_source import ModelSource


@dataclass(frozen=True, slots=True)
class FoundModel:
    """A sweep's model, that has every module which its trials adapt."""

    source: ModelSource
    shape: ModelShape


def find_model(sweep: SweepConfig) -> FoundModel:
    """The sweep's model.

    Raises:
        ModelError: it cannot be found or used, or lacks a module that a trial adapts.
    """
    source = model_source.resolve(sweep.model)
    shape = shape_of(source.config)
    require_targets(sweep, shape)
    return FoundModel(source, shape)


def require_warm_start(sweep: SweepConfig) -> None:
    """Look for the earlier sweep that this one is to learn from, if any.

    Raises:
        FolderError: there is none where the sweep file says.
        InputError: it is this sweep itself.
    """
    if sweep.search.warm_start is None:
        return
    own, earlier = sweep_folder(sweep.storage, sweep.name).root, local_path(sweep.search.warm_start)
    if earlier.resolve() == own.resolve():
        raise InputError(
            f"search.warm_start names this sweep's own folder, {own}, of which it knows everything anyway: name "
            "another sweep's, or leave it out"
        )
    try:
        read_sweep(SweepFolder(earlier))
    except FolderError as error:
        raise FolderError(f"search.warm_start: {error}") from error


def missing_here(sweep: SweepConfig) -> Iterator[str]:
    """What `run` would refuse on this machine, where a plan may be made all the same for one that has it."""
    for look in (partial(data_rows.check, sweep.data), partial(require_warm_start, sweep)):
        try:
            look()
        except (DataError, FolderError) as error:
            yield f"run would end at once on this machine: {error}"


def doubts(sweep: SweepConfig) -> Iterator[str]:
    """What `run` takes, and a reader should know."""
    # Of a source that is not here `missing_here` tells.
    with suppress(DataError):
        if told := data_rows.rows_in_both(sweep.data):
            yield told


def look_at(sweep: SweepConfig) -> FoundModel:
    """The sweep's model, with its data looked at too.

    Raises:
        ModelError: as `find_model`.
        DataError: a source does not exist, or its first rows cannot be used.
        InputError: what is to evaluate with is not installed.
    """
    evaluation.require(sweep.evaluate)
    model = find_model(sweep)
    data_rows.check(sweep.data)
    return model
