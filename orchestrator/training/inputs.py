"""What a sweep file names, looked at before anything starts: the model, its modules, the data. Loads nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.config.sweep_config import SweepConfig
from orchestrator.planning.model_shape import ModelShape, shape_of
from orchestrator.planning.plan import require_targets
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
