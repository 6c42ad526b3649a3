"""What a sweep file names, looked at before anything starts: the model, its modules, the data. Loads nothing heavy."""

from __future__ import annotations

from orchestrator.config.sweep_config import SweepConfig
from orchestrator.planning.model_shape import ModelShape, shape_of
from orchestrator.planning.plan import require_targets
from orchestrator.training import data_rows, model_source
from orchestrator.training.model_source import ModelSource


def look_at(sweep: SweepConfig) -> tuple[ModelSource, ModelShape]:
    """The sweep's model, found.

    Raises:
        ModelError: it cannot be found or used, or lacks a module that a trial adapts.
        DataError: a source does not exist, or its first rows cannot be used.
    """
    source = model_source.resolve(sweep.model)
    shape = shape_of(source.config)
    require_targets(sweep, shape)
    data_rows.check(sweep.data)
    return source, shape
